"""Text from data, models and file names cannot drive a terminal; data on stdout is never changed."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from conftest import ROOT, chat, write_lines

from sftcli import console

PAYLOADS = [
    "\x1b[31mred", "\x1b[2J", "\x1b[H", "\x1b[1A\x1b[2K", "\x1b]0;title\x07", "\x1b]2;title\x1b\\", "\x1b]52;c;aGk=\x07",
    "\x1b]8;;http://evil\x07link\x1b]8;;\x07", "\x1b[?1049h", "\x1b[?25l", "\x1b[6n", "\x1b[c", "\x1b[0c", "\x1b[>c",
    "\x1b[21t", "\x1bP$qm\x1b\\", "\x1b_Gf=100\x1b\\", "\x1b^x\x1b\\", "\x1bc", "\x1b(0", "\x1b[4:3m", "\x1b[38;5;1m", "\x1b[200~",
    "\x9b31m", "\x9d0;title\x9c", "\x90q\x9c", "\x85", "\x84", "\x07", "\x08\x08\x08", "\r over", "\x0b", "\x0c", "\x00", "\x7f",
    "\x0e\x0f", "\u202egpj.exe", "\u2066x\u2069", "\u200b\u200d\ufeff", "\u2028\u2029", "\u061c", "\U000e0041", "[red]markup[/red]", "[/foo]",
    "\\x1b[31m", "%s%n", "\u0600\u070f",
]  # fmt: skip
STYLE = re.compile(r"\x1b\[[0-9;]*m")  # our own colours
LINE = re.compile(r"\r?\x1b\[2K|\r")  # our own live line, and what a terminal makes of \n
FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f\u0600-\u0605\u070f]"
)


def harmful(text):
    """What of a text would drive a terminal: nothing but our own colours may be in it."""
    return FORBIDDEN.findall(STYLE.sub("", text))


def test_there_are_forty_of_them_and_each_is_seen_as_it_is():
    assert len(PAYLOADS) >= 40
    for payload in PAYLOADS:
        assert not harmful(console.safe(payload)), repr(payload)
        ours = console.safe(payload)
        assert ours == payload or "\\" in ours or "⏎" in ours


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [
        chat(payload + "x", "y" + payload, id=payload, source=payload, **{payload + "z": payload})
        for payload in PAYLOADS
    ]
    return write_lines(tmp_path_factory.mktemp("terminal") / "data.jsonl", *rows)


def test_no_view_passes_them_on(sft, data, base, tmp_path):
    tokens = sft("tokenize", data, "-m", base)
    assert tokens.code == 0
    rows = write_lines(tmp_path / "rows.jsonl", sft("mask", stdin=tokens.out).out)
    sft("mask", "-o", tmp_path / "rows.safetensors", stdin=tokens.out)
    documents = write_lines(tmp_path / "tokens.jsonl", tokens.out)
    seen = sft("mask", "--show", 99, stdin=tokens.out).err + tokens.err
    for path in (data, documents, rows, tmp_path / "rows.safetensors"):
        shown = sft("show", path, "-n", 99)
        assert shown.code == 0
        seen += shown.out.decode() + shown.err
    seen += sft("check", data, "-m", base).out.decode()
    assert not harmful(seen) and len(seen) > 10_000 and "markup" in seen and "[/foo]" in seen


def test_data_on_stdout_is_as_it_was(sft, data, base):
    found = sft("tokenize", data, "-m", base).rows
    assert [row["id"] for row in found] == PAYLOADS
    assert [row[payload + "z"] for row, payload in zip(found, PAYLOADS, strict=True)] == PAYLOADS


def places(payload):
    """Lines that are refused for something, with the payload where the refusal could quote it."""
    yield {payload: 1}
    yield {"messages": [{"role": payload, "content": "x"}]}
    yield {"conversations": [{"from": payload, "value": "x"}]}
    yield {"prompt": "x", "completion": 5, payload: payload}
    yield {"messages": [{"role": "user", "content": "x"}], "weight": payload}
    yield {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": payload + "f"}}],
    }
    yield {"sft_error": {"code": 3, "message": payload}}  # the last: it ends the stage


def test_no_error_passes_them_on(sft, base):
    seen = ""
    for payload in PAYLOADS:
        content = b"".join(json.dumps(row).encode() + b"\n" for row in places(payload))
        seen += sft("tokenize", "-", "-m", base, "--on-error", "skip", stdin=content).err
    assert not harmful(seen) and seen.count("rejected: ") >= 5 * len(PAYLOADS) == 5 * seen.count("error: ")


@pytest.mark.parametrize("first", range(0, len(PAYLOADS), 12))
def test_no_argument_passes_them_on(sft, base, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # --rejects makes its file
    payload = "".join(PAYLOADS[first : first + 12]).replace("\0", "").replace("/", "")
    flags = ["--template", "--columns", "--rejects", "--tokenizer", "--template-text", "--set", "--recipe", "-m"]
    seen = "".join(sft("tokenize", "-", "-m", base, flag, payload).err for flag in flags)
    seen += sft("show", payload).err + sft("check", payload, "-m", base).err + sft(payload).err
    assert not harmful(seen) and seen.count("error: ") >= 5


def test_names_of_files_are_made_harmless(sft, base, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    names = [payload for payload in PAYLOADS if "/" not in payload and "\0" not in payload]
    paths = [folder / f"{number}{payload}.jsonl" for number, payload in enumerate(names)]
    for path in paths:
        write_lines(path, chat("q", "a"), b"nonsense\n")
    seen = "".join(sft("show", path).err + sft("tokenize", path, "-m", base).err for path in paths)
    for first in range(0, len(paths), 10):  # so many rejects are told
        some = paths[first : first + 10]
        seen += sft("tokenize", *some, "-m", base, "-o", tmp_path / "out.jsonl", "--on-error", "skip").err
    seen += sft("check", folder).out.decode()
    assert not harmful(seen) and seen.count("rejected: ") == len(paths) > 30


def test_a_terminal_gets_our_own_escapes_only(sft, data, base, tmp_path):
    """Through a pseudo-terminal, where colours and the live line are on."""
    path = write_lines(tmp_path / "tokens.jsonl", sft("tokenize", data, "-m", base).out)
    for command in (["mask", path, "--show", "99", "-o", tmp_path / "rows.jsonl"], ["show", data, "-n", "99"]):
        ours, theirs = pty.openpty()
        process = subprocess.Popen([sys.executable, "-m", "sftcli", *map(str, command)], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=os.environ | {"TERM": "xterm"})  # fmt: skip
        os.close(theirs)
        seen = b""
        while chunk := _read(ours):
            seen += chunk
        os.close(ours)
        assert process.wait() == 0 and STYLE.search(seen.decode())
        assert not harmful(LINE.sub("", seen.decode()))


def _read(descriptor):
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # how Linux says that the other side is closed
        return b""


@pytest.mark.parametrize("flag", ["messages", "prompt"])
def test_metrics_and_other_lines_are_shown_safely(sft, tmp_path, flag):
    rows = [{"step": 1, "loss": payload, "lr": payload, flag: payload} for payload in PAYLOADS]
    shown = sft("show", write_lines(tmp_path / "metrics.jsonl", *rows))
    assert not harmful(shown.out.decode() + shown.err)


# ---- the live line


def test_a_live_line_that_is_too_long_keeps_its_rate_and_the_time_left():
    text = "train 1200/12000  epoch 1.2  loss 2.345  eval 2.345  12,345 tokens/s  10:02:03 left"
    assert console.fitted(text, 90) == text
    assert console.fitted(text, 79) == text.replace("epoch 1.2  ", "")
    assert console.fitted(text, 50) == "train 1200/12000  12,345 tokens/s  10:02:03 left"
    assert console.fitted(text, 10) == "train 1200"
