"""What a line may be: the table of bad lines through every reader, positions, sizes, compressed and changing files."""

import base64
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib

import pytest
import zstandard
from conftest import ROOT, chat, run_in_process, run_process, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcli.errors import DataError
from sftcli.lines import MAX_LINE_BYTES, deeper_than, read_lines

GOOD = json.dumps(chat("q", "a")).encode() + b"\n"
DOCUMENT = b'{"id": "d", "input_ids": [5, 6], "segments": [[0, 2, "assistant", true, 1.0]]}\n'
DEEP = b'{"z": ' + b"[" * 300 + b"]" * 300 + b", "

# what stands after the first brace of a row that is otherwise good -> what is said; None: the row is read
TABLE = {
    "a key twice": (b'{"id": "x", "id": "y", ', None),
    "NaN": (b'{"z": NaN, ', ":7: not JSON: invalid character"),
    "Infinity": (b'{"z": -Infinity, ', ":8: not JSON: invalid character"),
    "NaN inside of a field that passes through": (b'{"z": {"y": [NaN]}, ', "not JSON: invalid character"),
    "a number beyond float64": (b'{"z": 1e999, ', ": Number out of range at $.z"),
    "a number beyond float64 inside of a field": (b'{"z": {"y": [-1E400]}, ', ": Number out of range at $.z[...][0]"),
    "so many digits": (b'{"z": ' + b"1" * 400 + b".5, ", ": Number out of range at $.z"),
    "30 digits": (b'{"z": 123456789012345678901234567890, ', None),
    "many decimals": (b'{"z": 0.1000000000000000055511151231257827, ', None),
    "a lone surrogate": (b'{"z": "\\ud800 and on", ', "not JSON: "),
    "two surrogates in the wrong order": (b'{"z": "\\udc00\\ud800", ', "not JSON: invalid utf-16 surrogate pair"),
    "a pair of surrogates": (b'{"z": "\\ud83d\\ude42", ', None),
    "a byte that is no UTF-8": (b'{"z": "\xff", ', ":8: not UTF-8: invalid start byte"),
    "a surrogate in bytes (CESU-8)": (
        b'{"z": "\xed\xa0\xbd\xed\xb9\x82", ',
        ":8: not UTF-8: invalid continuation byte",
    ),
    "an overlong encoding": (b'{"z": "\xc0\xaf", ', ":8: not UTF-8: invalid start byte"),
    "a byte order mark in the middle": (b'\xef\xbb\xbf{"z": 1, ', "not JSON: "),
    "a carriage return": (b'{"z": 1,\r', None),
    "U+2028 and U+0085": ('{"z": "\u2028\u0085", '.encode(), None),
    "NUL and noncharacters": ('{"z": "\\u0000\ufffe\ue000", '.encode(), None),
    "a control character": (b'{"z": "\x01", ', "not JSON: invalid character"),
    "nested too deeply": (DEEP, "not JSON: nested deeper than 256"),
    "nested beyond any stack": (b'{"z": ' + b"[" * 100_000 + b", ", "not JSON: nested too deeply"),
    "brackets in a text": (b'{"z": "' + b"[{" * 500 + b'", ', None),
    "a list of many lists": (b'{"z": [' + b"[]," * 500 + b"1], ", None),
    "a trailing comma": (b'{"z": [1,], ', "not JSON: trailing comma in array"),
    "a comment": (b'{"z": /* no */ 1, ', "not JSON: invalid character"),
    "a number with a zero first": (b'{"z": 01, ', "not JSON: invalid number"),
}


def altered(row, start):
    return start + row[1:]


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("command, row", [("tokenize", GOOD), ("mask", DOCUMENT)], ids=["tokenize", "mask"])
def test_a_line_is_read_or_refused_with_its_place(sft, lines, base, command, row, name):
    start, told = TABLE[name]
    data = lines(row, altered(row, start))
    result = sft(command, data, *(["-m", base] if command == "tokenize" else []))
    if told is None:
        assert result.code == 0 and len(result.rows) == 2, result.err
        unknown = start[start.find(b'"z": ') + 5 :].rstrip(b", \r")
        assert b'"z"' not in start or b'"z":' + unknown in result.out  # byte for byte
    else:
        error = result.err.splitlines()[-1]
        assert result.code == 3 and error.startswith(f"error: {data}:2:") and told in error
        assert len(error) < len(str(data)) + 120 and "Traceback" not in result.err


def test_the_last_of_two_equal_keys_counts(sft, lines, base):
    result = sft("tokenize", lines(altered(GOOD, TABLE["a key twice"][0])), "-m", base)
    assert [row["id"] for row in result.rows] == ["y"]


def test_a_byte_order_mark_opens_a_file_and_nothing_else(sft, lines, base):
    mark = b"\xef\xbb\xbf"
    assert sft("tokenize", lines(mark + GOOD), "-m", base).out == sft("tokenize", lines(GOOD), "-m", base).out
    assert sft("tokenize", lines(GOOD, mark + GOOD), "-m", base).code == 3


@pytest.mark.parametrize("cut", [1, 2, 20, len(GOOD) - 2])
def test_a_last_line_that_was_cut_off_says_how_long_it_is(sft, lines, base, cut):
    data = lines(GOOD, GOOD[:cut])
    result = sft("tokenize", data, "-m", base)
    assert result.code == 3
    assert f"error: {data}:2: truncated last line, {cut} bytes" in result.err
    again = sft("tokenize", lines(GOOD, GOOD[:cut] + b"\n"), "-m", base)
    assert again.code == 3 and "truncated last line" not in again.err


def test_a_last_line_cut_inside_of_a_character_is_cut_off_too(sft, lines, base):
    data = lines(GOOD, '{"prompt": "ça'.encode()[:-2])
    assert f"{data}:2: truncated last line, 13 bytes" in sft("tokenize", data, "-m", base).err


# ---- rejects


def test_ten_rejects_are_told_and_all_are_counted_and_written(sft, lines, base, tmp_path):
    data = lines(GOOD, *[b'{"z": NaN}\n'] * 25, b"my secret\n", GOOD)
    result = sft("tokenize", data, "-m", base, "--on-error", "skip", "--rejects", tmp_path / "r.jsonl")
    assert result.code == 0 and result.err.count("rejected: ") == 10 and "secret" not in result.err
    assert "28 rows in" in result.err and "2 documents, 26 rejected" in result.err
    rejects = [json.loads(line) for line in (tmp_path / "r.jsonl").read_bytes().splitlines()]
    assert [row["line"] for row in rejects] == list(range(2, 28))
    assert rejects[0] == {
        "file": str(data), "line": 2, "byte": 7, "reason": "not JSON: invalid character", "field": None,
        "raw_b64": base64.b64encode(b'{"z": NaN}').decode(),
    }  # fmt: skip


BAD = st.one_of(
    st.sampled_from([altered(GOOD, start) for start, _ in TABLE.values() if len(start) < 5000]),
    st.binary(min_size=1, max_size=40).map(lambda text: text.replace(b"\n", b" ") + b"\n"),
    st.just(GOOD),
    st.just(b"  \n"),
)


@pytest.mark.parametrize("examples", [25, pytest.param(250, marks=pytest.mark.slow)])
def test_rows_in_are_rows_out_and_rejected(base, tmp_path, examples):
    """Every line that is not blank comes out once, as a document or with its bytes among the rejects, in order."""
    rejected = tmp_path / "r.jsonl"

    @settings(max_examples=examples)
    @given(st.lists(BAD, min_size=1, max_size=8), st.booleans())
    def each(rows, ended):
        content = b"".join(rows)
        content = content if ended else content[:-1]
        if content.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
            return
        result = run_in_process("tokenize", "-", "-m", base, "--on-error", "skip", "--rejects", rejected, stdin=content)
        given = [line.removeprefix(b"\xef\xbb\xbf" if not i else b"") for i, line in enumerate(content.split(b"\n"))]
        given = {i: line.rstrip(b"\r") for i, line in enumerate(given, 1) if line.strip()}
        bad = {row["line"]: row for row in map(json.loads, rejected.read_bytes().splitlines())}
        good = [row for row in result.rows if "sft_error" not in row]
        assert result.code == (3 if given and not good else 0)
        assert len(given) == len(good) + len(bad) and list(bad) == sorted(bad) and bad.keys() <= given.keys()
        assert all(base64.b64decode(row["raw_b64"]) == given[number] for number, row in bad.items())
        if given and good:
            assert f"{len(given)} rows in" in result.err and f"{len(good)} documents, {len(bad)} rejected" in result.err

    each()


# ---- long lines, in memory that does not grow with them

PROBE = """
from sftcli.errors import SftError
from sftcli.lines import read_lines
try:
    print(sum(1 for _ in read_lines("-")))
except SftError as error:
    print(error)
status = open("/proc/self/status").read()  # getrusage would begin with the peak of the process that started this one
print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)
"""


def piped(chunks):
    """(what was read or the error, peak MiB) of a process that reads lines from a pipe."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a filter that ran in this process has set it
    process = subprocess.Popen([sys.executable, "-c", PROBE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        for chunk in chunks:
            process.stdin.write(chunk)
        process.stdin.close()
    except BrokenPipeError:
        pass
    told, peak = process.stdout.read().decode().splitlines()
    process.wait()
    return told, int(peak)


def packed(kind, chunks, level=-1):
    packer = zstandard.ZstdCompressor().compressobj() if kind == "zst" else zlib.compressobj(level, wbits=31)
    for chunk in chunks:
        yield packer.compress(chunk)
    yield packer.flush()


@pytest.mark.parametrize("kind", ["plain", "gz", "zst"])
@pytest.mark.parametrize("end", [b"\n" + GOOD, b""], ids=["ended", "not ended"])
def test_a_line_of_60_mib_is_read_past_in_bounded_memory(kind, end):
    chunk = os.urandom(1 << 20).replace(b"\n", b"x")  # hard to compress: no bomb
    chunks = [GOOD, *[chunk] * 60, end]
    told, peak = piped(chunks if kind == "plain" else packed(kind, chunks, level=0))  # gzip would look for repeats
    assert told == ("3" if end else "2") and peak < 100  # a few times the longest line


def test_a_long_line_is_rejected_with_its_first_bytes_and_the_next_one_is_read(sft, lines, base, tmp_path):
    data = lines(GOOD, b'{"prompt": "' + b"x" * (9 << 20) + b'"}\n', GOOD)
    result = sft("tokenize", data, "-m", base, "--on-error", "skip", "--rejects", tmp_path / "r.jsonl")
    assert result.code == 0 and [row["id"] for row in result.rows] == ["1", "3"]
    assert f"rejected: {data}:2: line longer than {MAX_LINE_BYTES} bytes" in result.err
    (reject,) = [json.loads(line) for line in (tmp_path / "r.jsonl").read_bytes().splitlines()]
    assert len(base64.b64decode(reject["raw_b64"])) == MAX_LINE_BYTES + 1


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("line", [b"\0", b" " * 4095 + b"\n"], ids=["one line", "blank lines"])
def test_a_decompression_bomb_is_refused_soon(kind, line):
    start = time.process_time()
    told, peak = piped(packed(kind, [line * ((1 << 20) // len(line))] * 200))
    assert "damaged compressed file: " in told and "more than 200 times as many" in told
    assert peak < 150 and time.process_time() - start < 5


def test_text_that_compresses_well_is_no_bomb(sft, lines, base):
    assert len(list(read_lines(str(lines(gzip.compress(GOOD * 10_000)))))) == 10_000


# ---- files that are cut off or change while they are read


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_a_compressed_file_in_parts_is_read_and_a_cut_one_is_refused_at_every_byte(lines, pack):
    whole = pack(GOOD * 3) + pack(GOOD * 2)
    assert len(list(read_lines(str(lines(whole))))) == 5
    first = len(pack(GOOD * 3))
    for cut in range(5, len(whole)):
        path = str(lines(whole[:cut]))
        if cut == first:  # a whole file of its own
            assert len(list(read_lines(path))) == 3
        else:
            with pytest.raises(DataError, match="damaged compressed file"):
                list(read_lines(path))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_a_changed_byte_in_a_compressed_file_gives_lines_or_one_error(lines, pack):
    whole = pack(GOOD * 3)
    for place in range(4, len(whole)):
        try:
            list(read_lines(str(lines(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]))))
        except DataError as error:
            assert "damaged compressed file" in str(error)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD * 10_000)
    found = read_lines(str(path))
    next(found)
    os.truncate(path, len(GOOD) * 5000)
    with pytest.raises(DataError, match="became shorter while it was read"):
        list(found)


def test_what_is_appended_while_a_file_is_read_is_read_too(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD * 3)
    count = 0
    for _ in read_lines(str(path)):
        count += 1
        if count == 1:
            with open(path, "ab") as file:
                file.write(GOOD * 2)
    assert count == 5


def test_a_named_pipe_is_read(sft, base, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(GOOD * 3))
    writer.start()
    assert len(sft("tokenize", path, "-m", base).rows) == 3
    writer.join()


def test_stdin_may_be_a_file_from_its_middle_on(base, tmp_path):
    """Its size is then more than what is read."""
    path = write_lines(tmp_path / "data.jsonl", GOOD, GOOD)
    script = f"(read -r first; exec {sys.executable} -m sftcli tokenize - -m {base}) < {path}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr


@settings(max_examples=100)
@given(st.recursive(st.text(max_size=4), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)), st.integers(0, 6))  # fmt: skip
def test_depth_is_that_of_the_value(value, limit):
    def depth(part):
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    assert deeper_than(json.dumps(value).encode(), limit) == (depth(value) > limit)


# ---- a rejected row of a tokenizer that panics


def test_a_panic_of_the_library_leaves_no_backtrace_and_is_a_rejected_row(tmp_path, lines):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate("ab")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    panics = {"prompt": "a" * 27 + "b", "completion": "b"}
    data = lines({"prompt": "a", "completion": "b"}, panics, {"prompt": "b", "completion": "b"})
    flags = ("--tokenizer", tmp_path / "tokenizer.json", "--template-text", "{prompt}{completion}")
    result = run_process("tokenize", data, *flags, "--on-error", "skip", RUST_BACKTRACE="1")
    assert result.code == 0 and [row["id"] for row in result.rows] == ["1", "3"]
    assert f"rejected: {data}:2: the tokenizer refused it: " in result.err
    assert "panicked" not in result.err and "stack backtrace" not in result.err and "RUST" not in result.err


# ---- the whole of it


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_of_the_pipe_does_not_grow_with_the_file(base):
    """benchmarks/bounded_memory.py over five times as many lines, the longest of them of 256 KiB."""
    script = [sys.executable, str(ROOT / "benchmarks" / "bounded_memory.py"), "-m", str(base), "--gigabytes"]
    peaks = []
    for size in ("0.005", "0.025"):
        done = subprocess.run([*script, size], capture_output=True, check=True, cwd=ROOT)
        peaks.append(json.loads(done.stdout))
    for name in ("tokenize_peak_bytes", "mask_peak_bytes"):
        assert peaks[1][name] <= 400e6 and peaks[1][name] < 1.25 * peaks[0][name] + 20e6, peaks
