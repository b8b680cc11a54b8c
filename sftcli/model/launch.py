"""Several processes of `sft` on this machine: what `torchrun --standalone` does, by torch's own means."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import (
    DefaultLogsSpecs,
    RunProcsResult,
    SignalException,
    SubprocessContext,
)

from sftcli.errors import Exit, SftError
from sftcli.model.processes import SHUTDOWN, TYPED
from sftcli.signals import STOPPED, TERMINATING, exit_code, handled

ENDED_BY = (signal.SIGINT, *TERMINATING, signal.SIGHUP, signal.SIGQUIT)  # or the processes would be left behind


def launch(count: int, arguments: Sequence[str], patience: int) -> None:
    """`sft ARGUMENTS` in `count` processes; where they fail or are stopped, this one ends as they do.

    `patience`: seconds that they have to end after a signal. A SIGINT after one kills them.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGUSR2"  # which nobody sends: we handle the others
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environments = {rank: _environment(rank, count, store.port, patience) for rank in range(count)}
    command = dict.fromkeys(range(count), ("-m", "sftcli", *arguments))
    logging.disable(logging.ERROR)  # the process that fails has said why
    try:
        with TemporaryDirectory(prefix="sft-") as logs:
            context = SubprocessContext("sft", sys.executable, command, environments, DefaultLogsSpecs(logs))
            result = _watched(context, patience)
    finally:
        logging.disable(logging.NOTSET)
    if result and result.is_failed():
        raise _ended({rank: failure.exitcode for rank, failure in sorted(result.failures.items())})


def _environment(rank: int, count: int, port: int, patience: int) -> dict[str, str]:
    """What `torchrun --standalone` would tell a process; and what the user typed."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    numbers |= {"TORCHELASTIC_RESTART_COUNT": 0, SHUTDOWN: patience}
    told = {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return told | {TYPED: msgspec.json.encode(sys.argv).decode()} | {name: str(n) for name, n in numbers.items()}


def _watched(context: SubprocessContext, patience: int) -> RunProcsResult | None:
    with _signals_raised(context):
        try:
            context.start()
            return context.wait(period=0.1)
        except SignalException as stopped:
            context.close(stopped.sigval, patience)  # for a step and a checkpoint
            raise SystemExit(exit_code(stopped.sigval)) from None


@contextmanager
def _signals_raised(context: SubprocessContext) -> Iterator[None]:
    """The first signal is raised, for the processes to save a checkpoint; of later ones only a SIGINT counts."""
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            for pid in context.pids().values():
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            raise SystemExit(130)
        received.append(number)
        if len(received) == 1:
            raise SignalException(f"signal {number}", signal.Signals(number))

    with handled(ENDED_BY, handler):
        yield


def _ended(codes: dict[int, int]) -> SftError | SystemExit:
    """A process that was killed is named, since it cannot say so; any other has said why it ends.

    Of the others, some exit 1, as they lost it, and the launcher ends some by SIGTERM.
    """
    if own := [code for code in codes.values() if code > Exit.FAILURE and code not in STOPPED]:
        return SystemExit(own[0])
    for rank, code in codes.items():
        if code < 0 and -code != signal.SIGTERM:
            told = f"rank {rank} was killed ({signal.Signals(-code).name}); the others were stopped"
            return SftError(told, hint="--resume goes on from the last checkpoint")
    return SystemExit(max(codes.values()))
