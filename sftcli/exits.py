"""How a command ends: the one error class as a line and an exit code."""

import os
import sys
from typing import Any

import typer.core

from sftcli import console
from sftcli.errors import Exit, SftError, is_out_of_memory
from sftcli.signals import Terminated, terminating


class Commands(typer.core.TyperGroup):
    """Turns the one error class into a line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with terminating():
            if "--traceback" in sys.argv or os.environ.get("SFT_TRACEBACK"):
                return super().main(*args, **kwargs)
            return self._told(*args, **kwargs)

    def _told(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
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
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)
