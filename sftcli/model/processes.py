"""The processes of one run: what each of them computes, and what they agree on.

Every process runs the same program over the same rows. It knows all rows of a step and computes the gradients of its
share; torch (DDP or FSDP2) adds gradients up; a step divides by the weight of all its rows, which each process knows by
itself. Only process 0 talks, and writes all but the shards of a checkpoint that others hold.
"""

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sftcli import console
from sftcli.errors import SftError, UsageError
from sftcli.model.batches import micro_batches
from sftcli.rows import Row
from sftcli.signals import STOPPED, Interrupted, Terminated

SETTLED = 0.1  # in which gloo's threads free their last tensors: later, Python being torn down, they would abort it
ROLL_CALL = 3.0  # seconds that a process has to say that it is there
LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")  # in the words of backends
TYPED = "SFT_COMMAND"  # in the environment of what --nproc starts
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's: seconds from a signal to SIGKILL, 30 where it does not say
PATIENCE = math.inf  # seconds: for what only process 0 does; if it dies, the store or the launcher tells


class World:
    """The processes of a run as one of them sees it. Alone, it changes nothing."""

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None, timeout: float = 120):
        self.rank, self.size, self.store, self.timeout = rank, size, store, timeout
        self._asked: Callable[[], None] = lambda: None  # raises Interrupted where this process is asked to stop
        self._stop = 0  # the exit code that they agreed to stop with
        self._told = self._met = 0
        self._replica: nn.Module | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    # ---- a model in several processes

    def device(self, name: str) -> str:
        """What `auto` and `cuda` mean here: the GPU with the number that this process has on its machine."""
        if self.size == 1 or name not in ("auto", "cuda"):
            return name
        count, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if name == "auto" and not count:
            return "cpu"
        if count < (needed := int(os.environ["LOCAL_WORLD_SIZE"])):
            raise UsageError(
                f"{needed} processes need a GPU each, there are {count}", hint="fewer, or --set device=cpu"
            )
        torch.cuda.set_device(local)
        return f"cuda:{local}"

    def spreads(self, parallel: str) -> bool:
        """Whether a model is shared out, so that no process needs all of it."""
        return self.size > 1 and parallel == "fsdp"

    def place(
        self, model: nn.Module, device: torch.device, parallel: str, fill: Callable[[], None] | None = None
    ) -> None:
        """Bring a model to the device: all of it (ddp: the same in each process), or this process's shards (fsdp).

        `fill` gives parameters of a spread model values where they are on the device `meta`."""
        if self.spreads(parallel):
            _shard(model, device, fill)
            return
        model.to(device)
        if self.size > 1:
            self._replica = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def forward(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """What to call for a forward whose gradients are exchanged."""
        return model if self._replica is None else self._replica

    @property
    def gain(self) -> int:
        """What a loss is multiplied by for gradients that are sums: DDP divides them by the number of processes."""
        return 1 if self._replica is None else self.size

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: DDP exchanges gradients once, in the last one of a step (FSDP2 in each, for memory)."""
        return nullcontext() if last or self._replica is None else self._replica.no_sync()  # type: ignore[operator]

    # ---- a step in several processes

    def micro_batches(self, rows: Sequence[Row], limit: int, shared: int = 0) -> list[list[Row]]:
        """This process's forwards for the rows of a step: as many in each process, if need be of no row."""
        shares = [list(micro_batches(share, limit, shared)) for share in dealt(rows, self.size)]
        most = max(map(len, shares))
        return shares[self.rank] + [[]] * (most - len(shares[self.rank]))

    def seed(self, seed: int) -> int:
        """Of what is drawn by micro-batch: different in every process."""
        return (seed + self.rank * 0x9E3779B97F4A7C15) % (1 << 64)  # odd and large: ranks do not meet other steps

    def summed(self, values: Tensor) -> Tensor:
        """Sums over all processes of float64 numbers; on the way they agree whether to stop."""
        if self.size == 1:
            return values
        own = 0
        try:
            self._asked()
        except Interrupted as stop:
            own = stop.code
        votes = torch.tensor([own == code for code in STOPPED], dtype=torch.float64)
        both = torch.cat([values, votes])
        dist.all_reduce(both)
        found, votes = both.split([len(values), len(STOPPED)])
        self._stop = next((code for code, count in zip(STOPPED, votes.tolist(), strict=True) if count), 0)
        return found

    def agreed(self, poll: Callable[[], None]) -> Callable[[], None]:
        """`poll`; in several processes one that raises in all of them at once: at the first call after they agreed."""
        if self.size == 1:
            return poll
        self._asked = poll

        def poll_together() -> None:
            if self._stop:
                raise Interrupted(self._stop)

        return poll_together

    def least(self, value: int) -> int:
        """The smallest of the processes' numbers."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    # ---- what process 0 does for all, and what each tells all

    def path(self, path: Path) -> Path:
        """Where to write what process 0 writes to `path`."""
        return path if self.first else Path(os.devnull)

    def from_first(self, compute: Callable[[], Any]) -> Any:
        """What process 0 computes (plain JSON), in every process; they wait for it as long as it takes.

        Where it fails, all raise its error."""
        (found,) = self._told_by([0], compute, PATIENCE)
        return found

    def from_each(self, compute: Callable[[], Any]) -> list[Any]:
        """What each process computes (plain JSON), by rank, in every process; where one fails, all raise its error.

        Shares take alike: once it has its own, process 0 gives the others `timeout`, and all wait for process 0."""
        return self._told_by(range(self.size), compute, self.timeout if self.first else PATIENCE)

    def _told_by(self, ranks: Sequence[int], compute: Callable[[], Any], patience: float) -> list[Any]:
        if self.store is None:
            return [compute()]
        self._told += 1
        keys = [f"told/{self._told}/{rank}" for rank in ranks]
        own = None
        if self.rank in ranks:
            answer, own = _answer(compute)
            self.store.set(keys[self.rank], answer)
        if self._without(keys, patience):  # the store's own waiting hears no signals, and complains on stderr
            raise dist.DistError("a process does not come")
        told = [msgspec.json.decode(self.store.get(key)) for key in keys]
        self.meet()  # process 0 may hold the store: it stays until all have read it
        for rank, (_, error) in zip(ranks, told, strict=True):
            if error:
                raise own if own and rank == self.rank else SftError(*error)
        return [found for found, _ in told]

    def meet(self) -> None:
        """Wait until every process is here. (dist.barrier would ask GPUs, before each process has its own.)"""
        if self.store is None:
            return
        self._met += 1
        keys = [f"met/{self._met}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], "")
        if self._without(keys, self.timeout):
            raise dist.DistError("a process does not come")

    # ---- how it ends

    def leave(self) -> None:
        """Go when all are ready to go, process 0 last, as it may hold the store."""
        self._replica = None  # it holds the group
        gc.collect()
        self.meet()
        time.sleep(SETTLED)
        if self.first:
            self._without([f"left/{rank}" for rank in range(1, self.size)], ROLL_CALL)
        elif self.store:
            self.store.set(f"left/{self.rank}", "")

    def is_said(self, error: str) -> bool:
        """Whether process 0 ends with the same error, and says so. If all of them do, they leave together."""
        assert self.store
        keys = [f"error/{rank}/{error}" for rank in range(self.size)]
        try:
            self.store.set(keys[self.rank], "")
            missing = self._without(keys, 1.0)
            if not missing:
                self.leave()
        except RuntimeError:  # process 0 held the store and is gone already
            return not self.first
        return not self.first and keys[0] not in missing

    def absent(self) -> list[int]:
        """The processes that do not answer a roll call."""
        assert self.store
        self.store.set(f"here/{self.rank}", "")
        return [int(key.partition("/")[2]) for key in self._without([f"here/{r}" for r in range(self.size)], ROLL_CALL)]

    def _without(self, keys: list[str], seconds: float) -> list[str]:
        """Those of the keys that nobody sets in time."""
        if not self.store:
            return []
        deadline, pause = time.monotonic() + seconds, 0.001
        while (missing := [key for key in keys if not self.store.check([key])]) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return missing


def _answer(compute: Callable[[], Any]) -> tuple[str, SftError | None]:
    """(found, error) of a computation as JSON; the error as itself, too."""
    found, error = None, None
    try:
        found = compute()
    except SftError as raised:
        error = raised
    said = (str(error), int(error.code), error.hint) if error else None
    return msgspec.json.encode((found, said)).decode(), error


def is_worker() -> bool:
    """Whether this process is one of several already."""
    return "WORLD_SIZE" in os.environ


def grace() -> int | None:
    """Seconds from a signal to SIGKILL, where a launcher started this process."""
    return int(os.environ.get(SHUTDOWN, "30")) if is_worker() else None


def typed() -> list[str]:
    """The command as the user gave it."""
    told = os.environ.get(TYPED)
    return msgspec.json.decode(told, type=list[str]) if told else sys.argv


@contextmanager
def joined(timeout: int) -> Iterator[World]:
    """The processes that torchrun started together with this one, if it did.

    A process that is lost, or hangs for `timeout` seconds, ends all of them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    store, rank, size = next(dist.rendezvous("env://"))
    console.RANK = rank
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    seconds = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=seconds)
    world = World(rank, size, store, timeout)
    try:
        yield world
        world.leave()
    except Terminated as ended:
        if world.first:
            raise
        raise SystemExit(ended.code) from None  # one of them says so
    except SftError as error:
        if world.is_said(str(error)):
            raise SystemExit(int(error.code)) from None
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(word in str(error).lower() for word in LOST)):
            raise
        raise _lost(world, error) from None
    finally:
        dist.destroy_process_group()


def _lost(world: World, error: RuntimeError) -> SftError:
    try:
        missing = ", ".join(map(str, world.absent()))
    except RuntimeError:
        missing = "0"  # which holds the store
    told = f"rank {missing} is gone or hangs" if missing else f"the processes lost each other: {error}"
    return SftError(told, hint="--resume goes on from the last checkpoint")


def dealt(rows: Sequence[Row], hands: int) -> list[list[Row]]:
    """Rows shared out by their tokens: the longest first, each to whom has the fewest tokens."""
    shares: list[list[Row]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for row in sorted(rows, key=lambda row: len(row.input_ids), reverse=True):
        hand = tokens.index(min(tokens))
        shares[hand].append(row)
        tokens[hand] += len(row.input_ids)
    return shares


def filler(rows: Sequence[Row]) -> list[Row]:
    """For a process that has no rows left while the others have: a row that the forward takes, and that counts 0."""
    return [min(rows, key=lambda row: len(row.input_ids))]


def _shard(model: nn.Module, device: torch.device, fill: Callable[[], None] | None) -> None:
    """FSDP2 over all processes: each block by itself, then what is left; gradients are sums, too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parts = [fully_shard(part, mesh=mesh) for part in (*model.get_submodule("blocks").children(), model)]
    for part in parts:
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    if fill:
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
        fill()
    parts[-1]._get_fsdp_state()._lazy_init()  # what runs first takes itself for the root: a block, where it decodes
    # Makes the tensors that are kept for whole weights: made in inference mode, no step could use them. Ties again
    # what `_apply` has parted.
    for part in parts:
        part.unshard()
        part.reshard()


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """For calls of a sharded model without backward: what lies outside of its blocks is whole there, sharded after."""
    sharded = hasattr(model, "unshard")
    if sharded:
        model.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        if sharded:
            model.reshard()  # type: ignore[operator]


# ---- tensors that may be shards


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this process may hold only a shard; all processes must ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def collect(model: nn.Module, world: World) -> None:
    """Give process 0 whole weights in main memory, one by one, and let the others' shards go: training is over."""
    found: dict[int, nn.Parameter] = {}  # by the identity of a shard: layers may share it
    for module in model.modules():
        for name, shard in module.named_parameters(recurse=False):
            if not hasattr(shard, "full_tensor"):
                continue
            if id(shard) not in found:
                value = whole(shard.detach())
                value = value.cpu() if world.first else value.new_empty(0)
                found[id(shard)] = nn.Parameter(value, requires_grad=shard.requires_grad)
            setattr(module, name, found[id(shard)])
