"""`sft` as a fork of a process that has loaded everything already: 46 commands need not import torch 20 times.

As a program, `warm.py SOCKET` is that process and `warm.py SOCKET run ARGS` runs `sft ARGS` in a copy of it, with its own
streams, folder, environment and exit code. What a new process does differently (closed streams, signals, the cost of a
start) is tested with new processes.
"""

import json
import os
import select
import signal
import socket
import struct
import sys

STREAMS = (0, 1, 2)


def run(path, args):
    """Ask for a copy that becomes `sft ARGS`; end as it ended."""
    asked = json.dumps({"args": args, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        socket.send_fds(line, [struct.pack("!I", len(asked))], STREAMS)
        line.sendall(asked)
        for stream in STREAMS:  # the copy alone holds them: who reads learns when it is gone
            os.close(stream)
        answer = line.recv(4)
    code = struct.unpack("!i", answer)[0] if answer else 99
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)  # Python ignores SIGPIPE
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(path):
    """Copies for whoever asks, until stdin ends: whoever started this process is gone."""
    import torch  # noqa: F401

    from sftcli.cli import app
    from sftcli.stages import chat, evaluate, export, generate, import_gguf, init, merge, tokenize, train  # noqa: F401

    door = socket.socket(socket.AF_UNIX)
    door.bind(path)
    door.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    print("ready", flush=True)
    while door in select.select([door, sys.stdin], [], [])[0]:
        line, _ = door.accept()
        if os.fork() == 0:  # who waits for a copy is a copy itself: pipes need several at a time
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            door.close()
            _answer(line, app)
        line.close()


def _answer(line, app):
    head, streams, *_ = socket.recv_fds(line, 4, len(STREAMS))
    asked = line.makefile("rb").read(struct.unpack("!I", head)[0])  # shorter if who asks was killed: no JSON then
    copy = os.fork()
    if copy == 0:
        line.close()
        _become(app, json.loads(asked), streams)
    for stream in streams:
        os.close(stream)
    line.sendall(struct.pack("!i", os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])))
    os._exit(0)


def _become(app, asked, streams):
    for stream, number in zip(streams, STREAMS, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode) for number, mode in zip(STREAMS, "rww", strict=True))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = ["sft", *asked["args"]]
    try:
        code = app()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    if sys.argv[2:]:
        run(sys.argv[1], sys.argv[3:])
    serve(sys.argv[1])
