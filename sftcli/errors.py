"""The one error that reaches a user: a line, a hint, an exit code."""

import re
from enum import IntEnum

OUT_OF_MEMORY = re.compile("out of memory|not enough memory|allocate memory", re.IGNORECASE)


class Exit(IntEnum):
    """Exit codes, documented in the README."""

    FAILURE = 1
    USAGE = 2
    DATA = 3
    DIVERGED = 4
    CHECKPOINT = 5
    WRITE = 6
    MEMORY = 7


class SftError(Exception):
    """Anything a user can act on. `str(error)` is one line; `hint` says what to do next."""

    def __init__(self, message: str, code: int = Exit.FAILURE, hint: str | None = None):
        super().__init__(" ".join(message.split()))
        self.code = code
        self.hint = hint


class DataError(SftError):
    """A bad line of input: `where` is file:line, `field` a JSON path, `byte` a place in the line, from 1."""

    def __init__(
        self,
        reason: str,
        where: str | None = None,
        field: str | None = None,
        hint: str | None = None,
        byte: int | None = None,
    ):
        place = f"{where}:{byte}: " if where and byte else f"{where}: " if where else ""
        super().__init__(f"{place}{reason}{f' at {field}' if field else ''}", Exit.DATA, hint)
        self.reason, self.where, self.field, self.byte = reason, where, field, byte

    def located(self, where: str) -> "DataError":
        """The same error, said of a file and line (kept if it already has one)."""
        return self if self.where else DataError(self.reason, where, self.field, self.hint, self.byte)


class UsageError(SftError):
    """A flag, a recipe or artifacts that do not fit together."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message, Exit.USAGE, hint)


class CheckpointError(SftError):
    """A model folder, a checkpoint or an adapter that cannot or will not be loaded."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message, Exit.CHECKPOINT, hint)


class OutOfMemory(SftError):
    """A step that does not fit."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message, Exit.MEMORY, hint)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, or torch's (a RuntimeError, which on a CPU has no class of its own)."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )
