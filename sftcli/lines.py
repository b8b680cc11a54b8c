"""Lines of a file or pipe, compressed or not, in bounded memory; nothing here knows what a line means."""

import gzip
import io
import os
import re
import select
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, NamedTuple, cast

from sftcli.errors import DataError, UsageError

MAX_LINE_BYTES = 8 << 20
MAX_DEPTH = 256
MAX_RATIO, SMALL = 200, 16 << 20  # more than SMALL bytes may not come out of 1/MAX_RATIO of them: a bomb
SOON = 0.05  # seconds: who waits longer for the next line holds those before it back
PIPE_BUFFER = 1 << 18  # bytes: each time it is empty costs a look at the clock and at the pipe
ZSTD_CHUNK = 1 << 10  # of input at a time: up to 32768 times as much comes out of it
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
NOT_BRACKETS, ONE_KIND = bytes(set(range(256)) - set(b"[]{}")), bytes.maketrans(b"{}", b"[]")


class Line(NamedTuple):
    """A line without its end. `last`: no newline came after it. Of one that is too long, as much as shows that.

    `pause`: the next line does not come at once, so that what was made of this one should go out.
    """

    number: int  # from 1
    text: bytes
    last: bool
    pause: bool


def name_of(path: str) -> str:
    return "<stdin>" if path == "-" else path


@contextmanager
def _opened(path: str) -> Iterator[io.BufferedReader]:
    try:
        raw: Any = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    try:
        yield io.BufferedReader(_Pipe(raw), PIPE_BUFFER) if _is_pipe(raw) else raw
    except OSError as error:
        raise UsageError(f"cannot read {name_of(path)}: {error.strerror or error}") from None
    finally:
        if path != "-":
            raw.close()


def refuse_too_long(line: bytes, where: str) -> None:
    """Raises DataError: of such a line `read_lines` gives only as much as shows that."""
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"line longer than {MAX_LINE_BYTES} bytes", where)


def read_lines(path: str) -> Iterator[Line]:
    """Every line that is not blank, of a file or of stdin for `-`; .gz and .zst are known by their content.

    Cut at 0x0A bytes only. Raises DataError for a file that is cut off, shrinks, or is a decompression bomb.
    """
    with _opened(path) as raw:
        number, size = 0, _size_of(raw)
        try:
            for line in _lines(raw):
                number = line.number
                if line.text.strip():
                    yield line
        except (EOFError, gzip.BadGzipFile, zlib.error, _Damaged) as error:
            raise DataError(f"damaged compressed file: {error}", f"{name_of(path)}:{number + 1}") from None
        if size is not None and raw.tell() < size:
            raise DataError(f"the file became shorter while it was read: {size} bytes", f"{name_of(path)}:{number}")


def _lines(raw: io.BufferedReader) -> Iterator[Line]:
    counted = _Counted(raw)
    file = _decompressed(raw, counted)
    pipe = raw.raw if file is raw and isinstance(raw.raw, _Pipe) else None
    number = held = 0
    while text := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        whole, held = text.endswith(b"\n"), held + len(text)
        if number == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")
        pause = whole and pipe is not None and pipe.pauses(raw, held)
        yield Line(number, text if len(text) > MAX_LINE_BYTES else text.rstrip(b"\r\n"), not whole, pause)
        while not whole and (text := file.readline(MAX_LINE_BYTES)):  # the rest of a line that is too long
            whole, held = text.endswith(b"\n"), held + len(text)
            counted.refuse_bomb(held)
        counted.refuse_bomb(held)


def _size_of(raw: IO[bytes]) -> int | None:
    """How large a file is that can only shrink or grow; None for pipes, which have no size."""
    try:
        status = os.fstat(raw.fileno())
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _is_pipe(raw: IO[bytes]) -> bool:
    try:
        mode = os.fstat(raw.fileno()).st_mode
    except OSError:  # bytes in memory
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


class _Pipe(io.RawIOBase):
    """A pipe that knows how much came out of it, and so whether its reader's buffer has another line."""

    def __init__(self, file: IO[bytes]):
        self.file: Any = cast(io.BufferedReader, file).raw
        self.count = self.whole = 0  # bytes: taken from the pipe; up to where the buffer is known to hold whole lines

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self.file.fileno())

    def readinto(self, buffer: Any) -> int | None:
        size: int | None = self.file.readinto(buffer)
        self.count += size or 0
        return size

    def pauses(self, buffer: io.BufferedReader, taken: int) -> bool:
        """Whether no whole line follows soon on the first `taken` bytes. (Of an empty buffer, peek would wait.)"""
        if taken < self.whole:
            return False
        if taken < self.count:
            self.whole = taken + buffer.peek().rfind(b"\n") + 1
        return taken >= self.whole and not select.select([self], [], [], SOON)[0]


def _decompressed(raw: io.BufferedReader, counted: "_Counted") -> BinaryIO:
    magic = raw.peek(4)[:4]
    if magic[:2] == b"\x1f\x8b":
        return cast(BinaryIO, gzip.GzipFile(fileobj=cast(Any, counted)))
    if magic == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(_Zstd(counted))
    return raw


class _Damaged(Exception):
    """A compressed file that cannot be read on."""


class _Counted:
    """Compressed bytes on their way, counted."""

    def __init__(self, raw: IO[bytes]):
        self.raw, self.count = raw, 0

    def read(self, size: int = -1) -> bytes:
        data = self.raw.read(size)
        self.count += len(data)
        return data

    def refuse_bomb(self, held: int) -> None:
        """Raise where too much came out of too little."""
        if self.count and held > SMALL and held > MAX_RATIO * self.count:
            raise _Damaged(f"{held} bytes came out of {self.count}, more than {MAX_RATIO} times as many")


class _Zstd(io.RawIOBase):
    """What zstd frames hold. The library's own reader takes a frame that is cut off for a short one."""

    def __init__(self, counted: _Counted):
        try:
            import zstandard
        except ImportError:
            raise UsageError("reading .zst needs zstandard", hint="pip install 'sftcli[zstd]'") from None
        self.library, self.counted = zstandard, counted
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.waiting = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.waiting:
            data = self.frame.unused_data if self.frame.eof else b""
            data = data or self.counted.read(ZSTD_CHUNK)
            if not data and self.frame.eof:
                return 0
            if not data:
                raise EOFError("it ends in the middle of a frame")
            if self.frame.eof:
                self.frame = self.library.ZstdDecompressor().decompressobj()
            try:
                self.waiting = memoryview(self.frame.decompress(data))
            except self.library.ZstdError as error:
                raise _Damaged(str(error)) from None
        size = min(len(buffer), len(self.waiting))
        buffer[:size], self.waiting = self.waiting[:size], self.waiting[size:]
        return size


def deeper_than(line: bytes, depth: int) -> bool:
    """Whether the objects and lists of a JSON line are nested deeper."""
    if line.count(b"[") + line.count(b"{") <= depth:
        return False
    left = STRING.sub(b"", line).translate(ONE_KIND, NOT_BRACKETS)
    for _ in range(depth):
        left = left.replace(b"[]", b"")
    return bool(left)
