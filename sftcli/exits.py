"""How a command ends: the one error class as a line and an exit code."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer.core

from sftcli import console
from sftcli.errors import Exit, SftError, is_out_of_memory
from sftcli.signals import Terminated, terminating


class Commands(typer.core.TyperGroup):
    """Turns the one error class into a line and an exit code."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _reader():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _reader():
            return super().invoke(ctx)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _open_closed_streams()
        with terminating():
            if "--traceback" in sys.argv or os.environ.get("SFT_TRACEBACK"):
                return super().main(*args, **kwargs)
            return self._told(*args, **kwargs)

    def _told(self, *args: Any, **kwargs: Any) -> Any:
        try:
            try:
                return super().main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except SftError as error:
            console.fail(str(error), error.hint)
            code = int(error.code)
        except KeyboardInterrupt:
            code = 130
        except Terminated as error:
            console.fail(str(error), None)
            raise
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            console.fail("out of memory", "fewer --set train.micro_batch_tokens, or a smaller --batch-size")
            code = Exit.MEMORY
        except BrokenPipeError:
            code = 141
            _forget_output()
        except OSError as error:  # those of files are told where they are opened
            if error.errno is None or error.filename:
                raise
            console.fail(f"cannot write standard output: {error.strerror or error}", None)
            code = Exit.WRITE
            _forget_output()
        sys.exit(code)


@contextmanager
def _reader() -> Iterator[None]:
    """A reader that went away is 141; typer would make it 1."""
    try:
        yield
    except BrokenPipeError:
        sys.exit(141)


def _open_closed_streams() -> None:
    """A stream that was closed (`<&-`, `>&-`) fails when it is used; its number must not become some file's."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            access = os.O_RDONLY if name == "stdout" else os.O_WRONLY
            opened = os.open(os.devnull, access)
            assert opened == number
            setattr(sys, name, os.fdopen(opened, mode, closefd=False))


def _forget_output() -> None:
    """What is left in the buffer cannot be written: Python would try it again, and complain, when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
