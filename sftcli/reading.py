"""JSON in: lines of data, undecoded until they are needed, and the small objects of model and run folders."""

import re
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import msgspec

from sftcli.errors import CheckpointError, DataError
from sftcli.lines import MAX_DEPTH, deeper_than, name_of, read_lines, refuse_too_long

ERROR_FIELD = "sft_error"  # a stage that fails ends its stdout with this line; the next stage refuses it
BYTE = re.compile(r" \(byte (\d+)\)$")  # how msgspec says where, from 0
TABLES = (  # how a table's first line begins, how its name ends, and what pandas reads it with
    (b"PAR1", "", "read_parquet({!r})"),
    (b"", ".csv", "read_csv({!r})"),
    (b"", ".tsv", "read_csv({!r}, sep='\\t')"),
)
CUT_OFF = "not JSON: Input data was truncated"


def decode_json(line: bytes, where: str, kind: Any = Any) -> Any:
    """Decode one JSON line into `kind`. Raises DataError with file:line, the byte and the JSON path."""
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.ValidationError as error:
        reason, _, field = str(error).partition(" - at `")
        raise DataError(reason, where, field.rstrip("`") or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        place = BYTE.search(reason)
        reason = reason[: place.start()] if place else reason
        raise DataError(f"not JSON: {reason}", where, byte=int(place[1]) + 1 if place else None) from None
    except RecursionError:
        raise DataError("not JSON: nested too deeply", where) from None


class PreviousStageFailed(DataError):
    """The input ends with the error line of the stage that wrote it."""


def line_fields(line: bytes, where: str, last: bool = False) -> dict[str, msgspec.Raw]:
    """The fields of one JSON line, undecoded. Raises DataError; PreviousStageFailed for another stage's error line.

    `last`: no newline came after it, so that it may have been cut off."""
    refuse_too_long(line, where)
    try:
        line.decode()  # msgspec takes any bytes inside a Raw, and unknown fields pass through
        fields: dict[str, msgspec.Raw] = decode_json(line, where, dict[str, msgspec.Raw])
    except UnicodeDecodeError as error:
        if last and error.end == len(line) and error.reason == "unexpected end of data":
            raise _cut_off(line, where) from None
        hint = _other_format(line, where)
        raise DataError(f"not UTF-8: {error.reason}", where, hint=hint, byte=error.start + 1) from None
    except DataError as error:
        error.hint = _other_format(line, where)
        raise _cut_off(line, where) if last and error.reason == CUT_OFF and not error.hint else error from None
    if ERROR_FIELD in fields:
        told = decode_json(bytes(fields[ERROR_FIELD]), where)
        message = told.get("message", "") if isinstance(told, dict) else told
        raise PreviousStageFailed(f"the stage before this one failed: {message}", where)
    if deeper_than(line, MAX_DEPTH):
        raise DataError(f"not JSON: nested deeper than {MAX_DEPTH}", where)
    for name, raw in fields.items():
        _refuse_infinite(bytes(raw), where, name)
    return fields


def _other_format(line: bytes, where: str) -> str | None:
    """What to do with a file whose first line shows that it holds no JSON lines."""
    path, _, number = where.rpartition(":")
    if number != "1":
        return None
    if path.endswith(".safetensors"):
        return "rows of `sft mask`? `sft train`, `sft evaluate` and `sft show` read them"
    read = next((call for start, end, call in TABLES if line.startswith(start) and path.endswith(end)), None)
    if read:
        return f"`pandas.{read.format(path)}.to_json('NEW.jsonl', orient='records', lines=True)` makes lines of it"
    name, start = "FILE" if path == name_of("-") else quote(path), line.strip()[:1]
    if start == b"[":
        return f"a JSON array? `jq -c '.[]' {name}` writes its objects as lines"
    if line.strip() == b"{":
        return f"an object a line: `jq -c . {name}` writes them so"
    if start == b"{" or not line.isascii() or b"\0" in line:  # a bad line, or no text at all
        return None
    return f"an object a line; `jq -cR '{{text: .}}' {name}` makes one of each line of text"


def _cut_off(line: bytes, where: str) -> DataError:
    return DataError(f"truncated last line, {len(line)} bytes", where)


def _refuse_infinite(value: bytes, where: str, name: str) -> None:
    """Numbers beyond float64, such as 1e999, would be infinite for whoever reads the field later."""
    if value[:1] != b'"' and (b"e" in value or b"E" in value or (len(value) > 308 and b"." in value)):
        try:
            decode_json(value, where)
        except DataError as error:
            raise DataError(error.reason, where, f"$.{name}" + (error.field or "$")[1:]) from None


def read_objects(path: str) -> Iterator[tuple[str, bytes, dict[str, msgspec.Raw]]]:
    """Yield (file:line, the line, its fields undecoded) of a JSONL file."""
    for number, line, last, _ in read_lines(path):
        where = f"{name_of(path)}:{number}"
        yield where, line, line_fields(line, where, last)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads(object_pairs_hook=): an object that has a key twice means two things."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in found if names.count(name) > 1)!r}")
    return found


def read_bytes(path: Path) -> bytes:
    """Read a whole file of a model or run folder. Raises CheckpointError naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """Read a small JSON object of a model or run folder. Raises CheckpointError naming it."""
    try:
        return msgspec.json.decode(read_bytes(path), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON object: {error}") from None
