"""Work in a copy of this process: as killable as any process, and torch is loaded already."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


class Forked:
    """A running copy; `wait` gives its exit code (negative: a signal's number) and what it said on stderr."""

    def __init__(self, work: Callable[[], Any]):
        said, say = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(said)
            _become(work, say)
        os.close(say)
        self.said = said

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        with open(self.said, "rb") as file:
            text = file.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), text


def _become(work: Callable[[], Any], say: int) -> None:
    code = 99
    try:
        os.dup2(say, 1)
        os.dup2(say, 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        code = int(work() or 0)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
