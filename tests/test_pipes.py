"""Streams that are closed, full or left by their reader: one line or none, and the exit code that says why."""

import json
import os
import re
import select
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLES, chat, run_process, write_lines
from model_fixtures import model_folder, write_turns

from sftcli.errors import Exit

SFT = f"{sys.executable} -m sftcli"
DATA = SAMPLES / "chats.jsonl"
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


def shell(script, **env):
    """(exit codes of the pipe's commands, stdout, stderr)"""
    script = f"{script}; echo ${{PIPESTATUS[@]}} >&3"
    read, write = os.pipe()
    command = ["bash", "-c", f"exec 3>&{write}; {script}"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, pass_fds=[write], env=os.environ | env, timeout=100)
    os.close(write)
    with os.fdopen(read) as codes:
        return [int(code) for code in codes.read().split()], done.stdout, done.stderr.decode()


@pytest.fixture(scope="module")
def made(model_folders, tmp_path_factory):
    """Places of a model folder, many documents and one."""
    folder = tmp_path_factory.mktemp("pipes")
    base = model_folders["chatml"]
    data = write_lines(folder / "many.jsonl", *[chat(f"question {i}", "an answer " * 30) for i in range(3000)])
    tokens = folder / "tokens.jsonl"
    run_process("tokenize", DATA, "-m", base, "-o", tokens)
    prompts, model = write_lines(folder / "prompts.jsonl", {"prompt": "q"}), model_folder(folder / "model", "llama")
    rows = write_turns(model, folder / "rows.safetensors", [7])
    places = {"base": base, "data": DATA, "many": data, "tokens": tokens, "model": model}
    return places | {"prompts": prompts, "rows": rows}


@pytest.mark.parametrize("env", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["", "unbuffered"])
def test_head_gets_the_first_line_and_ends_the_filter_quietly(made, env):
    command = "{many} -m {base}".format(**made)
    codes, out, err = shell(f"{SFT} -q tokenize {command} | head -n1", **env)
    whole = run_process("tokenize", made["data"], "-m", made["base"])
    assert codes == [141, 0] and err == ""
    assert json.loads(out)["id"] == "1" and out.count(b"\n") == 1
    assert json.loads(out).keys() == whole.rows[0].keys()


FILTERS = {
    "tokenize": "tokenize {data} -m {base}",
    "mask": "mask {tokens}",
    "generate": "generate {prompts} -m {model} --max-new-tokens 2",
    "evaluate": "evaluate {rows} -m {model} --per-row -",
    "show": "show {tokens}",
    "show of a folder": "show {base}",
    "check": "check {data} -m {base}",
    "check of a folder": "check {base}",
    "help": "--help",
    "help of a command": "mask --help",
    "version": "--version",
    "schema": "run --schema",
}


@needs_full
@pytest.mark.parametrize("name", FILTERS)
def test_a_full_disk_is_one_line_and_exit_6(made, warm_sft, name):
    """Where the output is small, the write that fails is the last flush."""
    sft = f"{warm_sft}/sft" if name in ("generate", "evaluate") else SFT
    codes, _, err = shell(f"{sft} -q {FILTERS[name].format(**made)} > /dev/full")
    assert codes == [int(Exit.WRITE)], err
    assert err.splitlines()[-1] == "error: cannot write standard output: No space left on device"
    assert "Traceback" not in err and "Exception ignored" not in err and err.count("error: ") == 1


def test_closed_streams_are_one_line_and_no_data_goes_astray(made, tmp_path):
    tokenize = FILTERS["tokenize"].format(**made)
    codes, out, err = shell(f"{SFT} tokenize - -m {made['base']} <&-")
    assert codes == [2] and "error: cannot read <stdin>: Bad file descriptor" in err and "Traceback" not in err
    codes, out, err = shell(f"{SFT} {tokenize} >&-")
    assert codes == [6] and "error: cannot write standard output: Bad file descriptor" in err
    codes, out, err = shell(f"{SFT} {tokenize} 2>&-")
    assert codes == [0] and out == run_process("tokenize", DATA, "-m", made["base"]).out
    out = tmp_path / "t.jsonl"  # which must not get the number of a closed stream
    codes, _, _ = shell(f"{SFT} {tokenize} -o {out} <&- >&- 2>&-")
    assert codes == [0] and out.read_bytes() == run_process("tokenize", DATA, "-m", made["base"]).out


def test_a_reader_that_is_gone_ends_any_command_with_141(made):
    for command in ("run --schema", "show {tokens} -n 999", "--help"):
        codes, _, err = shell(f"{SFT} {command.format(**made)} | true")
        assert codes[0] in (141, 0) and "Traceback" not in err and "Exception" not in err  # 0: it was written before


def delivered(process, count):
    """The next `count` lines of a process that waits for input."""
    seen = b""
    while seen.count(b"\n") < count:
        assert select.select([process.stdout], [], [], 60)[0], f"{seen.count(10)} of {count} lines"
        seen += os.read(process.stdout.fileno(), 1 << 16)
    return [json.loads(line)["id"] for line in seen.splitlines()]


@pytest.mark.parametrize("name", ["tokenize", "mask", "generate"])
def test_lines_leave_before_the_next_one_comes(made, name):
    """A pipe that delivers some lines, then a part of one, and waits: all that are whole come out."""
    lines = [json.dumps(chat("q", "a", id=str(i))).encode() + b"\n" for i in range(8)]
    if name == "mask":
        lines = made["tokens"].read_bytes().splitlines(keepends=True)[:8]
    flags = [] if name == "mask" else ["-m", made["model"]]
    command = [sys.executable, "-m", "sftcli", "-q", name, "-", *map(str, flags)]
    whole, rest = 0, b""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, bufsize=0) as process:
        for end in (1, 4, 5, 7):
            process.stdin.write(rest + b"".join(lines[whole + bool(rest) : end]) + lines[end][:9])
            assert delivered(process, end - whole) == [json.loads(line)["id"] for line in lines[whole:end]]
            whole, rest = end, lines[end][9:]
        process.kill()


def test_empty_input_is_no_error_for_filters_and_exit_3_for_train(sft, made, lines, tmp_path):
    empty = lines(b"")
    for command in ("tokenize - -m {base}", "mask -", "generate - -m {model}"):
        result = sft(*command.format(**made).split())
        assert (result.code, result.out) == (0, b"")
    result = sft("train", empty, "-m", made["base"], "-o", tmp_path / "run")
    assert result.code == 3 and result.err.count("error: ") == 1


def test_every_exit_code_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## Exit codes")[2]
    assert all(f"\n| {int(code)} | " in table for code in (0, *Exit))
    assert all(re.search(rf"^\|.*\b{code}\b.*\|", table, re.M) for code in (130, 141, 143))
    assert "--traceback" in table


def test_traceback_shows_where_an_error_comes_from(made):
    for flags, env in ((["--traceback"], {}), ([], {"SFT_TRACEBACK": "1"})):
        result = run_process(*flags, "tokenize", "none.jsonl", "-m", made["base"], **env)
        assert result.code == 1 and "Traceback" in result.err and "cannot read none.jsonl" in result.err
