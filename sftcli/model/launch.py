"""Several processes of `sft` on this machine, by torch's elastic launcher: what `torchrun --standalone` does."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sftcli.errors import Exit, SftError
from sftcli.signals import STOPPED, TERMINATING, exit_code


def launch(count: int, arguments: Sequence[str], patience: int) -> None:
    """`sft ARGUMENTS` in `count` processes; where they fail or are stopped, this one ends as they do.

    `patience`: seconds that they have to end after a signal."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    ended_by = (signal.SIGINT, *TERMINATING, signal.SIGHUP, signal.SIGQUIT)  # or the workers would be left behind
    handlers = {number: signal.getsignal(number) for number in ended_by}
    heard = [signal.Signals(number).name for number, handler in handlers.items() if handler is not signal.SIG_IGN]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="sft",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=patience,  # for a step and a checkpoint after a signal
        signals_to_handle=",".join(heard) or "SIGUSR2",  # which nobody sends
    )
    logging.disable(logging.ERROR)  # the process that fails has said why
    try:
        elastic_launch(config, sys.executable)("-m", "sftcli", *arguments)
    except SignalException as stopped:
        raise SystemExit(exit_code(stopped.sigval)) from None
    except ChildFailedError as failed:
        raise _ended(failed) from None
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _ended(failed: ChildFailedError) -> SftError | SystemExit:
    """A process that was killed is named, since it cannot say so; any other has said why it ends.

    Of the others, some exit 1, as they lost it, and the launcher ends some by SIGTERM.
    """
    codes = {rank: failure.exitcode for rank, failure in sorted(failed.failures.items())}
    if own := [code for code in codes.values() if code > Exit.FAILURE and code not in STOPPED]:
        return SystemExit(own[0])
    for rank, code in codes.items():
        if code < 0 and -code != signal.SIGTERM:
            told = f"rank {rank} was killed ({signal.Signals(-code).name}); the others were stopped"
            return SftError(told, hint="--resume goes on from the last checkpoint")
    return SystemExit(max(codes.values()))
