"""Files in and out: JSONL lines, atomic writes, fingerprints, and the names in a run folder."""

import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import IO, Any, BinaryIO

import msgspec

from sftcli.errors import CheckpointError, DataError, Exit, SftError, UsageError
from sftcli.hub import local
from sftcli.lines import MAX_DEPTH, MAX_LINE_BYTES, deeper_than, name_of, read_lines

ERROR_FIELD = "sft_error"  # a stage that fails ends its stdout with this line; the next stage refuses it
CHUNK = 1 << 20
PIPE_BYTES = 1 << 20  # the most that Linux gives to everybody
BYTE = re.compile(r" \(byte (\d+)\)$")  # how msgspec says where, from 0
TABLES = (  # how a table's first line begins, how its name ends, and what pandas reads it with
    (b"PAR1", "", "read_parquet({!r})"),
    (b"", ".csv", "read_csv({!r})"),
    (b"", ".tsv", "read_csv({!r}, sep='\\t')"),
)
CUT_OFF = "not JSON: Input data was truncated"
LEFTOVERS = (".tmp-", ".old-")  # how names begin that a killed process leaves half-written and half-deleted

TOKENS, ROWS, RECIPE, RUN = "tokens.jsonl", "rows.safetensors", "recipe.yaml", "run.json"
BASE, MODEL, ADAPTER, CHECKPOINTS = "base", "model", "adapter", "checkpoints"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
METRICS, SAMPLES, COMPLETIONS, EVALUATION = "metrics.jsonl", "samples.jsonl", "completions.jsonl", "evaluation.json"


# ---- reading


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
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"line longer than {MAX_LINE_BYTES} bytes", where)
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


# ---- writing


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete and on disk; devices and pipes are written to."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as file:
            yield file
        return
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        to_disk(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A folder to fill that appears under its name only when all of it is on disk; an older one of that name goes."""
    temporary = output.with_name(f".tmp-{output.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            to_disk(path)
        old = _renamed_old(output)
        os.rename(temporary, output)
        to_disk(output.parent)
        _delete(old)
    except OSError as error:
        raise cannot_write(output, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a file or folder, which is gone at once or not at all. Raises SftError."""
    try:
        _delete(_renamed_old(path))
    except OSError as error:
        raise SftError(f"cannot remove {path}: {error.strerror}", Exit.WRITE) from None


def _renamed_old(path: Path) -> Path:
    """Take a name away; what is killed before it is deleted is a leftover."""
    old = path.with_name(f".old-{path.name}-{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        os.rename(path, old)
    return old


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process has left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(LEFTOVERS):
            _delete(path)


def cannot_write(path: str | Path, error: OSError) -> SftError:
    return SftError(f"cannot write {path}: {error.strerror}", Exit.WRITE)


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def update_json(path: Path, values: dict[str, Any]) -> None:
    """Lay values over a small JSON object in a file (made if it is not there)."""
    write_json(path, (read_json(path) if path.is_file() else {}) | values)


def append_lines(path: Path, *values: Any) -> None:
    """Add JSON lines to a log of a run. Raises SftError (exit 6) where there is no room."""
    try:
        with open(path, "ab") as file:
            file.writelines(map(json_line, values))
    except OSError as error:
        raise cannot_write(path, error) from None


def refuse_to_replace(inputs: Iterable[str], output: str) -> None:
    """Raises UsageError for an output that would take the place of an input."""
    for given in inputs:
        with suppress(OSError):  # one of them is not there
            if os.path.isfile(output) and os.path.samefile(given, output):
                raise UsageError(f"{output} is an input, which this output would replace", hint="write to another file")


@contextmanager
def open_output(path: str | None, inputs: Iterable[str] = ()) -> Iterator[IO[bytes]]:
    """stdout for None or `-`, else an atomic file, no input. A failing stage ends stdout with its error line."""
    if path not in (None, "-"):
        refuse_to_replace(inputs, str(path))
        with atomic_file(str(path)) as file:
            yield file
        return
    out = sys.stdout.buffer
    _widen_pipe(out)
    try:
        yield out
        out.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write("standard output", error) from None
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        code = error.code if isinstance(error, SftError) else Exit.FAILURE
        with suppress(OSError):
            out.write(json_line({ERROR_FIELD: {"code": int(code), "message": str(error) or type(error).__name__}}))
            out.flush()
        raise


def _widen_pipe(out: IO[bytes]) -> None:
    """Let a pipe hold what a stage writes at once, so that the next one works on it while this one goes on."""
    if sys.platform == "linux":
        import fcntl

        with suppress(OSError):  # no pipe, or none that may be as wide
            fcntl.fcntl(out.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def json_line(value: Any) -> bytes:
    return msgspec.json.encode(value) + b"\n"


@contextmanager
def output_folder(path: str | Path, belongs: Iterable[str] = ()) -> Iterator[Path]:
    """A folder that is made, or accepted if it is empty or already ours (it holds one of the names `belongs`). Whoever
    fails before anything is in it leaves none behind."""
    folder = Path(path)
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        yield _made_folder(folder, belongs)
    except BaseException:
        for place in made:
            with suppress(OSError):  # it is not empty, or was not made
                place.rmdir()
        raise


def _made_folder(folder: Path, belongs: Iterable[str]) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(LEFTOVERS)}
    except OSError as error:
        raise cannot_write(folder, error) from None
    if names and not names & set(belongs):
        raise UsageError(
            f"{folder} holds something else ({', '.join(sorted(names)[:3])})",
            hint="choose another -o, or empty that folder yourself",
        )
    return folder


# ---- identity


def fingerprint(*parts: bytes | str) -> str:
    """12 hex digits that name a content: sha256 of the parts, each with its length before it."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:12]


def file_fingerprint(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()[:12]


def model_folder(path: str) -> Path:
    """The model folder that `-m` names: itself, a run's model/, or a run's base/ while it has no model yet."""
    base, adapter = model_and_adapter(path)
    if adapter:
        raise UsageError(
            f"{path} is an adapter, which needs its base beside it",
            hint=f"`sft merge {path} -o NEW` makes one model of both",
        )
    return base


def model_and_adapter(path: str) -> tuple[Path, Path | None]:
    """The model folder that `-m` names and the adapter that belongs on it: None but for an adapter run's."""
    path = local(path)
    for folder in (Path(path), Path(path, MODEL)):
        if (folder / "config.json").is_file():
            return folder, None
    if adapter := adapter_folder(path):
        return _base_of(adapter), adapter
    if Path(path, BASE, "config.json").is_file():
        return Path(path, BASE), None
    if path.endswith(".gguf") and Path(path).is_file():
        raise CheckpointError(f"{path} is no model folder yet", hint=f"`sft import {path} -o FOLDER` makes one of it")
    if not Path(path).exists():
        raise CheckpointError(
            f"no model at {path}", hint="a folder, a run, or org/name of the hub; `sft init DATA -o base` makes one"
        )
    raise CheckpointError(f"{path} is neither a model folder (no config.json) nor a run")


def text_folder(path: str) -> Path:
    """Where the tokenizer and template of `-m` lie: in its adapter, if that brings them, else in the model folder."""
    adapter = adapter_folder(path)
    whole = any((folder / "config.json").is_file() for folder in (Path(path), Path(path, MODEL)))
    if adapter and not whole and (adapter / "tokenizer.json").is_file():
        return adapter
    return model_and_adapter(path)[0]


def adapter_folder(path: str) -> Path | None:
    """The PEFT folder that a path names: itself, or a run's adapter/."""
    path = local(path)
    return next((f for f in (Path(path), Path(path, ADAPTER)) if (f / ADAPTER_CONFIG).is_file()), None)


def _base_of(adapter: Path) -> Path:
    """The model folder that an adapter was trained on: where its run says it was, else where its own file says."""
    run = adapter.parent / RUN
    recorded = read_json(run).get("base") if run.is_file() else None
    named = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    for place in (recorded, named):
        if isinstance(place, str) and place and "\0" not in place:
            place = local(place)
            for folder in (Path(place), Path(place, MODEL), Path(place, BASE)):
                if (folder / "config.json").is_file():
                    return folder
    raise CheckpointError(
        f"{adapter}: its base model {named or recorded} is not here", hint=f"-m BASE --adapter {adapter}"
    )
