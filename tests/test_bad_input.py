"""Bad input: one line on stderr with file, line and field, the exit code, and after the last good row one line."""

import base64
import gzip
import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, Pipe, chat, run_in_process, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcli import console
from sftcli.signals import Terminated
from sftcli.writing import open_output

GOOD = chat("q", "a")
DOCUMENT = {
    "id": "d",
    "input_ids": [5, 6],
    "segments": [[0, 2, "assistant", True, 1.0]],
    "tokenizer": None,
    "template": None,
}


def failed(result, code, *told):
    """One error line, no traceback, and stdout ends with the error for the next stage."""
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.err.splitlines()[-1] == errors[0]
    for part in told:
        assert str(part) in errors[0], errors[0]
    *before, last = result.rows
    assert list(last) == ["sft_error"]
    assert last["sft_error"]["code"] == code
    assert errors[0].startswith(f"error: {last['sft_error']['message']}")
    return before


BAD_LINES = {
    "not JSON": (b"{nonsense}\n", "not JSON: "),
    "half a line": (b'{"messages": [{"role": "us\n', "not JSON: "),
    "a list": (b"[1, 2]\n", "Expected `object`, got `array`"),
    "a number": (b"5\n", "Expected `object`, got `int`"),
    "null": (b"null\n", "got `null`"),
    "NaN": (b'{"messages": NaN}\n', "not JSON: "),
    "a lone surrogate": (b'{"prompt": "\\ud800", "completion": "x"}\n', "not JSON: "),
    "bytes that are no UTF-8": (b'{"prompt": "\xff", "completion": "x"}\n', ":13: not UTF-8: invalid start byte"),
    "no UTF-8 in a field nobody reads": (b'{"prompt": "x", "completion": "x", "z": "\xff"}\n', "not UTF-8: "),
    "nested deeply": (b'{"prompt": ' + b"[" * 100_000 + b"}\n", "not JSON: "),
    "wrong type in messages": (b'{"messages": [{"role": "user", "content": 5}]}\n', "at $.messages[0].content"),
    "unknown role": (b'{"messages": [{"role": "narrator", "content": "x"}]}\n', "chatml has no role narrator at $.messages[0]"),
    "no known shape": (b'{"q": 1}\n', "no known shape: the line has q"),
    "a huge weight": (b'{"prompt": "x", "completion": "x", "weight": 1e999}\n', "Number out of range at $.weight"),
    "weights that are huge together": (b'{"input_ids": [5, 6], "loss_mask": [0, 1e200], "weight": 1e200}\n', "the weights of row and tokens are too large together at $.weight"),
    "ids beyond the vocabulary": (b'{"input_ids": [5, 999], "labels": [5, 999]}\n', "id 999 is beyond the vocabulary of 400"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_stops_tokenize_after_the_good_ones(sft, lines, base, name):
    line, told = BAD_LINES[name]
    data = lines(GOOD, GOOD, line)
    before = failed(sft("tokenize", data, "-m", base), 3, f"{data}:3:", told)
    assert [row["id"] for row in before] == ["1", "2"]


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_skipped_and_written_to_the_rejects(sft, lines, base, tmp_path, name):
    line, told = BAD_LINES[name]
    data = lines(GOOD, line.rstrip(b"\n") + b"\n", GOOD)
    result = sft("tokenize", data, "-m", base, "--on-error", "skip", "--rejects", tmp_path / "r.jsonl")
    assert result.code == 0
    assert [row["id"] for row in result.rows] == ["1", "3"]
    assert "3 rows in (" in result.err and "2 documents, 1 rejected" in result.err
    (reject,) = [json.loads(text) for text in (tmp_path / "r.jsonl").read_bytes().splitlines()]
    assert (reject["file"], reject["line"]) == (str(data), 2)
    reason, _, field = told.partition("at $")
    assert reason.removeprefix(":13: ").rstrip() in reject["reason"] and (reject["field"] or "").endswith(field)
    assert base64.b64decode(reject["raw_b64"]) == line.rstrip(b"\n")


def test_the_text_of_a_bad_line_is_not_printed(sft, lines, base):
    result = sft("tokenize", lines({"prompt": "my secret", "completion": 5}), "-m", base)
    assert result.code == 3 and "secret" not in result.err


@pytest.mark.parametrize("name", ["not JSON", "half a line", "a list", "no UTF-8 in a field nobody reads"])
def test_a_bad_line_stops_mask_too(sft, lines, name):
    line, told = BAD_LINES[name]
    data = lines(DOCUMENT, line)
    assert len(failed(sft("mask", data), 3, f"{data}:2:", told)) == 1


def test_the_error_line_of_the_stage_before_is_refused(sft, lines, base):
    """A pipe whose first stage failed never ends in rows that look whole."""
    first = sft("tokenize", lines(GOOD, b"nonsense\n"), "-m", base)
    second = sft("mask", stdin=first.out)
    before = failed(second, 3, "<stdin>:2: the stage before this one failed: ", "data.jsonl:2:5: not JSON")
    assert len(before) == 1
    failed(sft("mask", stdin=second.out), 3, "the stage before this one failed")  # and so on, to the end of the pipe
    again = sft("tokenize", "-", "-m", base, "--on-error", "skip", stdin=first.out)
    assert failed(again, 3, "<stdin>:2: the stage before this one failed") == first.rows[:1]


def test_the_error_line_is_not_skipped(sft, lines, base):
    data = lines(GOOD, {"sft_error": {"code": 3, "message": "no more"}})
    before = failed(
        sft("tokenize", data, "-m", base, "--on-error", "skip"), 3, "the stage before this one failed: no more"
    )
    assert len(before) == 1


def test_a_file_is_written_whole_or_not_at_all(sft, lines, base, tmp_path):
    out = tmp_path / "tokens.jsonl"
    out.write_bytes(b"what was there\n")
    result = sft("tokenize", lines(GOOD, b"nonsense\n"), "-m", base, "-o", out)
    assert (result.code, result.out) == (3, b"")
    assert out.read_bytes() == b"what was there\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "tokens.jsonl"]


# ---- empty input


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_empty_input_is_a_warning(sft, lines, base, tmp_path, content):
    data = lines(content)
    for args in (("tokenize", data, "-m", base), ("mask", data), ("show", data)):
        result = sft(*args)
        assert (result.code, result.out) == (0, b"")
        assert result.err.startswith("warning: ") and "is empty" in result.err
    assert sft("mask", data, "-o", tmp_path / "r.safetensors").code == 0


def test_init_without_data_knows_bytes_and_says_so(sft, tmp_path):
    result = sft("init", "-o", tmp_path / "base", "--vocab-size", 300)
    assert result.code == 0
    assert "warning: init: no data: the tokenizer knows bytes only" in result.err
    result = sft("init", "-o", tmp_path / "words", "--tokenizer", "whitespace")
    assert result.code == 2 and "a whitespace vocabulary needs data" in result.err


# ---- files


def test_a_missing_file_and_a_folder_are_usage_errors(sft, base, tmp_path):
    failed(sft("tokenize", tmp_path / "none.jsonl", "-m", base), 2, f"cannot read {tmp_path}/none.jsonl: No such file")
    failed(sft("tokenize", tmp_path, "-m", base), 2, f"cannot read {tmp_path}: ", "directory")
    failed(sft("mask", tmp_path / "none.jsonl"), 2, "cannot read")
    assert sft("show", tmp_path / "none.jsonl").code == 2


def test_the_rows_of_the_files_before_a_missing_one_are_written(sft, lines, base, tmp_path):
    before = failed(sft("tokenize", lines(GOOD), tmp_path / "none.jsonl", "-m", base), 2, "none.jsonl")
    assert len(before) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_is_a_usage_error(sft, lines, base):
    data = lines(GOOD)
    data.chmod(0)
    failed(sft("tokenize", data, "-m", base), 2, "Permission denied")


def test_no_model_no_data_and_no_tokenizer_are_told_with_the_way_out(sft, lines, base, tmp_path):
    data = lines(GOOD)
    failed(sft("tokenize", data), 2, "no model; hint: -m MODEL (a folder or a run), or --tokenizer FILE")
    failed(sft("tokenize", data, "-m", tmp_path / "none"), 5, "no model at", "`sft init DATA -o base` makes one")
    failed(sft("tokenize", data, "-m", tmp_path), 5, "is neither a model folder (no config.json) nor a run")
    (tmp_path / "config.json").write_text("{}")
    failed(sft("tokenize", data, "-m", tmp_path), 5, f"model folder {tmp_path} has no tokenizer.json")
    failed(sft("tokenize", data, "--tokenizer", tmp_path / "none.json"), 2, "no tokenizer file")
    failed(sft("tokenize", data, "--tokenizer", "whitespace"), 2, "has no chat template; hint: --template")


def test_a_broken_tokenizer_or_template_file_is_one_line(sft, lines, base, tmp_path):
    data = lines(GOOD)
    (tmp_path / "tokenizer.json").write_bytes(b'{"model"')
    failed(
        sft("tokenize", data, "--tokenizer", tmp_path / "tokenizer.json", "--template", "chatml"),
        5,
        "cannot load tokenizer",
    )
    (tmp_path / "t.jinja").write_bytes(b"{% for %}")
    failed(sft("tokenize", data, "-m", base, "--template", tmp_path / "t.jinja"), 2, "template t.jinja, line 1: ")
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    failed(sft("tokenize", data, "-m", base, "--template", tmp_path / "t.jinja"), 2, "is not UTF-8 text")


def test_a_folder_that_holds_something_else_is_left_alone(sft, lines, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("")
    result = sft("init", lines(GOOD), "-o", folder)
    assert result.code == 2
    assert f"{folder} holds something else (chapter.tex); hint: choose another -o" in result.err
    assert [path.name for path in folder.iterdir()] == ["chapter.tex"]


def test_an_init_that_fails_says_which_line(sft, lines, tmp_path):
    data = lines(GOOD, {"messages": [{"role": "narrator", "content": "x"}]})
    for tokenizer in ("bpe", "whitespace"):
        result = sft("init", data, "-o", tmp_path / "base", "--tokenizer", tokenizer)
        assert result.code == 3 and f"{data}:2: template chatml refused it: chatml has no role narrator" in result.err
    result = sft("init", lines({"input_ids": [1]}), "-o", tmp_path / "base")
    assert result.code == 3 and "these rows are tokenised already" in result.err


def test_output_that_cannot_be_written_exits_6(sft, lines, base, tmp_path):
    data = lines(GOOD)
    for args, names in (
        (("tokenize", data, "-m", base), ["none/out.jsonl"]),
        (("mask", lines(DOCUMENT, name="d.jsonl")), ["none/out.jsonl", "none/out.safetensors"]),
    ):
        for name in names:
            result = sft(*args, "-o", tmp_path / name)
            assert result.code == 6 and f"cannot write {tmp_path}/{name}: No such file" in result.err
            assert "Traceback" not in result.err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_line_and_exit_6(lines):
    data = lines(*[DOCUMENT] * 5)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sftcli", "mask", str(data)], stdout=full, stderr=subprocess.PIPE, cwd=ROOT
        )
    assert done.returncode == 6
    assert done.stderr.decode().splitlines()[-1] == "error: cannot write standard output: No space left on device"
    assert b"Traceback" not in done.stderr


def test_a_reader_that_goes_away_ends_a_filter_quietly(lines):
    data = lines(*[{**DOCUMENT, "input_ids": [5] * 500, "segments": [[0, 500, "assistant", True, 1.0]]}] * 2000)
    command = [sys.executable, "-m", "sftcli", "-q", "mask", str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert json.loads(process.stdout.readline())["id"] == "d"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE


# ---- what is allowed


def test_gzip_byte_order_mark_carriage_returns_and_blank_lines_change_nothing(sft, lines, base):
    plain = json.dumps(GOOD).encode()
    expected = sft("tokenize", "-", "-m", base, stdin=plain + b"\n" + plain).out
    for content in (
        b"\xef\xbb\xbf" + plain + b"\n" + plain + b"\n",
        plain + b"\r\n" + plain + b"\r\n",
        b"\n\n" + plain + b"\n   \n\n" + plain,
        gzip.compress(plain + b"\n" + plain),
    ):
        assert sft("tokenize", lines(content), "-m", base).out == expected
        assert sft("tokenize", "-", "-m", base, stdin=content).out == expected


def test_line_numbers_count_blank_lines(sft, lines, base):
    data = lines(GOOD, b"\n\n", b"nonsense\n")
    failed(sft("tokenize", data, "-m", base), 3, f"{data}:4:5: ")


def test_zstandard_is_read_or_says_what_it_needs(sft, lines, base):
    content = b"\x28\xb5\x2f\xfd" + b"rest"
    try:
        import zstandard
    except ImportError:
        failed(sft("tokenize", lines(content), "-m", base), 2, "reading .zst needs zstandard; hint: pip install")
    else:
        packed = zstandard.compress(json.dumps(GOOD).encode())
        assert sft("tokenize", lines(packed), "-m", base).code == 0


@pytest.mark.parametrize(
    "spoil", [lambda z: z[:-9], lambda z: z[:-4] + b"abcd", lambda z: z[:20] + b"\xff" * 9 + z[29:]]
)
def test_a_damaged_gzip_file_is_one_line(sft, lines, base, spoil):
    rows = b"".join(json.dumps(chat("q", str(i))).encode() + b"\n" for i in range(50))
    failed(sft("tokenize", lines(spoil(gzip.compress(rows))), "-m", base), 3, "damaged compressed file: ")


def test_only_a_newline_ends_a_line(sft, lines, base):
    """U+2028 and U+0085 are characters of a text like any other."""
    line = json.dumps({"prompt": "a\u2028b\u0085c", "completion": "d"}, ensure_ascii=False).encode()
    assert len(sft("tokenize", lines(line), "-m", base).rows) == 1


def test_a_line_that_is_too_long_is_named_and_not_held_in_memory(sft, lines, base):
    data = lines(GOOD, b'{"prompt": "' + b"x" * (9 << 20) + b'"}\n')
    before = failed(sft("tokenize", data, "-m", base), 3, f"{data}:2: line longer than 8388608 bytes")
    assert len(before) == 1


def test_a_long_line_below_the_limit_is_read(sft, lines, base):
    result = sft("tokenize", lines({"prompt": "word " * 20_000, "completion": "a"}), "-m", base)
    assert result.code == 0 and len(result.rows[0]["input_ids"]) > 20_000


def test_control_characters_in_data_do_not_reach_the_terminal(sft, lines, base):
    data = lines({"prompt": "\x1b[31m\x07\u202ex", "completion": "\x1b]0;title\x07"})
    tokens = sft("tokenize", data, "-m", base)
    shown = sft("mask", "--show", 1, stdin=tokens.out)
    reached = shown.err + sft("show", data).out.decode()
    assert not any(character in reached for character in "\x1b\x07\u202e")
    assert "\\x1b[31m\\x07\\u202ex" in reached


@pytest.mark.parametrize(
    "error, code, told",
    [
        (ZeroDivisionError("by zero"), 1, "by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(signal.SIGTERM), 143, "ended by SIGTERM"),
    ],
)
def test_an_error_that_nobody_foresaw_still_tells_the_next_stage(monkeypatch, error, code, told):
    out = Pipe()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    with pytest.raises(type(error)), open_output(None) as file:
        file.write(b"{}\n")
        raise error
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        {},
        {"sft_error": {"code": code, "message": told}},
    ]


def test_an_error_of_an_input_is_not_said_of_the_output(monkeypatch):
    out = Pipe()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    with pytest.raises(PermissionError, match="config"), open_output(None):
        raise PermissionError(13, "Permission denied", "locked/config.json")
    assert json.loads(out.getvalue())["sft_error"]["code"] == 1


def test_a_person_reads_an_error_once(monkeypatch):
    out = Pipe()
    out.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    with pytest.raises(ZeroDivisionError), open_output(None):
        raise ZeroDivisionError
    assert out.getvalue() == b""


def test_a_model_that_cannot_answer_tells_the_next_stage(sft, base, lines):
    result = sft("generate", lines({"prompt": "q"}), "-m", base)
    assert result.code == 5 and result.rows == [{"sft_error": {"code": 5, "message": f"{base} has no weights yet"}}]


def test_files_of_another_stage_are_told_apart(sft, base, lines, tmp_path):
    tokens = write_lines(tmp_path / "t.jsonl", sft("tokenize", lines(chat("q", "a")), "-m", base).out)
    rows = tmp_path / "rows.safetensors"
    assert sft("mask", tokens, "-o", rows).code == 0
    before = rows.read_bytes()
    for command in (("tokenize", rows, "-m", base), ("mask", rows)):
        result = sft(*command)
        assert result.code == 3 and "hint: rows of `sft mask`? `sft train`" in result.err
    result = sft("tokenize", lines(chat("q", "a")), "-m", base, "-o", rows)
    assert result.code == 2 and "documents are JSON lines" in result.err and rows.read_bytes() == before
    result = sft("mask", tokens, "--seq-len", 8)
    assert result.code == 2 and "hint: --format neox, or --max-length" in result.err
    result = sft("train", f"{rows}*-1", "-m", base, "-o", tmp_path / "run")
    assert result.code == 2 and "this is no weight; hint: FILE*0.3 or FILE#500" in result.err


def test_a_key_of_a_section_inside_is_named_with_it(sft):
    for setting, told in (("lr=1", "optimizer.lr"), ("rank=1", "adapter.rank"), ("warmup=0.1", "schedule.warmup")):
        result = sft("train", "x", "-m", "y", "--set", setting)
        assert result.code == 2 and f"unknown key; hint: did you mean {told}?" in result.err


def test_whoever_waits_for_a_person_says_so(sft, base, monkeypatch):
    monkeypatch.setattr("sftcli.console.sys.stdin", SimpleNamespace(isatty=lambda: True))
    notes = []
    monkeypatch.setattr("sftcli.console.note", notes.append)
    for path in ("-", "data.jsonl"):
        console.tell_of_waiting(path)
    assert notes == ["reading from the terminal: a JSON object a line, Ctrl-D ends; or name a FILE"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "text",
    "tools",
    "id",
    "source",
    "weight",
]
NAMES += ["input_ids", "labels", "loss_mask", "segments", "system", "sft_error"]
FIELDS = st.dictionaries(st.sampled_from(NAMES), json_values, max_size=4)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "train", "weight", "tool_calls", "from", "value"]), json_values | st.sampled_from(["user", "assistant"]), max_size=4),
    max_size=3,
)  # fmt: skip
EXAMPLES = pytest.mark.parametrize("examples", [20, pytest.param(100, marks=pytest.mark.slow)])


def tried(strategy, examples, work):
    """work(drawn) for that many examples."""
    settings(max_examples=examples)(given(strategy)(work))()


@EXAMPLES
def test_any_json_in_any_field_gives_rows_or_one_line(base, examples):
    def work(record):
        result = run_in_process("tokenize", "-", "-m", base, stdin=json.dumps(record).encode())
        assert result.code in (0, 3)
        if result.code:
            failed(result, 3, "<stdin>:1: ")
            return
        masked = run_in_process("mask", stdin=result.out)
        assert masked.code in (0, 3) and "Traceback" not in masked.err

    turns = [st.fixed_dictionaries({name: MESSAGES}) for name in ("messages", "conversations")]
    tried(st.one_of(FIELDS, *turns), examples, work)


SHOWN = [
    "messages",
    "labels",
    "align",
    "segments",
    "input_ids",
    "step",
    "loss",
    "eval_loss",
    "turns",
    "id",
    "tokenizer",
]


@EXAMPLES
def test_anything_can_be_shown_or_is_one_line(tmp_path, examples):
    def work(records):
        path = write_lines(tmp_path / "any.jsonl", *records)
        result = run_in_process("show", path)
        assert result.code in (0, 3) and "Traceback" not in result.err
        assert result.code == 0 or result.err.count("error: ") == 1

    row = st.dictionaries(st.sampled_from(SHOWN), json_values, max_size=6)
    tried(st.lists(row, min_size=1, max_size=3), examples, work)


@EXAMPLES
def test_any_bytes_give_rows_or_one_line(base, examples):
    def work(content):
        for args in (("tokenize", "-", "-m", base), ("mask", "-")):
            result = run_in_process(*args, stdin=content)
            assert result.code in (0, 2, 3)
            if result.code:
                failed(result, result.code)

    tried(st.binary(max_size=60), examples, work)
