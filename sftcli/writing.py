"""Files and folders out: whole and on disk under their names, or not there at all."""

import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import msgspec

from sftcli.errors import Exit, SftError, UsageError
from sftcli.reading import ERROR_FIELD, read_json

INTERRUPTED = 130  # 128 + SIGINT, as shells say it
PIPE_BYTES = 1 << 20  # the most that Linux gives to everybody
LEFTOVERS = (".tmp-", ".old-")  # how names begin that a killed process leaves half-written and half-deleted


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete and on disk; devices and pipes are written to."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        try:
            with open(path, "wb") as file:
                yield file
        except BrokenPipeError:
            raise
        except OSError as error:
            raise cannot_write(path, error) from None
        return
    path = Path(os.path.realpath(path))
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


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises UsageError where another process is inside of this. The system ends the lock with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another process is training in {folder}", hint="wait for it, or another -o") from None
    except OSError:  # not on this disk
        return


def cannot_write(path: str | Path, error: OSError) -> SftError:
    return SftError(f"cannot write {path}: {error.strerror or error}", Exit.WRITE)


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
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, OSError) and error.filename is None:  # no file's: the output's
            raise cannot_write("standard output", error) from None
        if not out.isatty():  # a person reads the error itself
            with suppress(OSError):
                out.write(json_line({ERROR_FIELD: {"code": _code_of(error), "message": _told(error)}}))
                out.flush()
        raise


def _code_of(error: BaseException) -> int:
    """The exit code that the process will have."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    code = error.code if isinstance(error, SftError | SystemExit) else None
    return code if isinstance(code, int) else Exit.FAILURE


def _told(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__


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
