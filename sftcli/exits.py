"""How a command ends: the one error class as a line and an exit code."""

import os
import re
import sys
from typing import Any

import typer.core

from sftcli import console
from sftcli.errors import Exit, SftError

OUT_OF_MEMORY = re.compile("out of memory|not enough memory|allocate memory", re.IGNORECASE)


class Commands(typer.core.TyperGroup):
    """Turns the one error class into a line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if "--traceback" in sys.argv or os.environ.get("SFT_TRACEBACK"):
            return super().main(*args, **kwargs)
        try:
            return super().main(*args, **kwargs)
        except SftError as error:
            console.fail(str(error), error.hint)
            code = int(error.code)
        except KeyboardInterrupt:
            code = 130
        except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
            if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
                raise
            console.fail("out of memory", "fewer --set train.micro_batch_tokens, or a smaller --batch-size")
            code = Exit.MEMORY
        except BrokenPipeError:
            code = 141
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)
