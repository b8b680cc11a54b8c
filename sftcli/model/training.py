"""The loop: a generator of reports. Everything around it - logs, evaluation, checkpoints - is a `for` in the stage."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from sftcli.artifacts import fingerprint
from sftcli.errors import UsageError
from sftcli.model.batches import (
    Batch,
    common_beginning,
    epoch_order,
    make_batch,
    steps_in_run,
    steps_of,
    weights_by_loss,
)
from sftcli.model.breakdown import Part as Breakdown
from sftcli.model.breakdown import means_by_part, sums_by_part
from sftcli.model.flops import work_of
from sftcli.model.gpt import GPT
from sftcli.model.loss import PLAIN, LossSum
from sftcli.model.memory import forward_tokens, told_if_out_of_memory
from sftcli.model.mixture import Part
from sftcli.model.noise import neftune
from sftcli.model.optim import lr_share, set_lr, step
from sftcli.model.processes import World, filler, whole
from sftcli.recipe import Loss, Train
from sftcli.rows import Row


@dataclass(frozen=True)
class Report:
    """One optimizer step. `loss` is per unit of weight (nan: it has none and was skipped); `tokens` are no padding.

    Not `finite`: the loss or the norm of the gradients was no number, and the weights were left alone.
    `loss` is what was minimised, `losses` its parts where it has several; by role, source and turn it is the plain nll
    (breakdown.py).
    """

    step: int  # from 1
    rows: str  # names the rows of the step, in order: two runs that saw the same have the same here
    epoch: float  # share of the data seen, in epochs
    loss: float
    tokens: int
    trained: int
    lr: float
    grad_norm: float
    seconds: float  # on a GPU the optimizer's part may count in the next step
    accuracy: float
    entropy: float
    loss_by_role: dict[str, float]
    loss_by_source: dict[str, float]
    loss_by_turn: dict[str, float]
    finite: bool = True
    losses: dict[str, float] = field(default_factory=dict)
    flop: int = 0  # of the model's products (flops.py)


class Plan:
    """Which rows make which step: a pure function of the rows' lengths, their parts, the options and the seed."""

    def __init__(self, lengths: Sequence[int], options: Train, parts: Sequence[Part] = ()):
        self.lengths, self.options, self.parts = lengths, options, parts
        self._epoch = lru_cache(maxsize=2)(self._steps_of_epoch)
        self.steps = steps_in_run(lengths, options, parts)

    def _steps_of_epoch(self, epoch: int) -> list[list[int]]:
        order = epoch_order(len(self.lengths), self.options, epoch, self.parts)
        return list(steps_of(order, self.lengths, self.options))

    def from_step(self, step: int) -> Iterator[tuple[list[int], float, bool]]:
        """(rows, epochs seen after it, whether it ends an epoch) of every step after the first `step`."""
        done = epoch = 0
        while done < self.steps:
            steps = self._epoch(epoch)
            for i, rows in enumerate(steps[: self.steps - done]):
                if done + i >= step:
                    yield rows, epoch + (i + 1) / len(steps), i + 1 == len(steps)
            done += len(steps)
            epoch += 1


@dataclass(frozen=True)
class Engine:
    """What a step runs with."""

    device: torch.device
    dtype: torch.dtype
    world: World = field(default_factory=World)
    poll: Callable[[], None] = lambda: None  # called before every forward; raises to leave a step or an evaluation

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def choose_engine(device: str, dtype: str) -> Engine:
    """The device and dtype that `auto` means here: bfloat16 only where the device computes in it."""
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).partition('.')[0]}") from None
    if dtype == "auto":
        fast = found.type == "cuda" and torch.cuda.is_bf16_supported()
        return Engine(found, torch.bfloat16 if fast else torch.float32)
    return Engine(found, torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def train_steps(
    model: GPT,
    optimizers: list[Optimizer],
    row: Callable[[int], Row],
    plan: Plan,
    options: Train,
    engine: Engine,
    peak_lr: float,
    start: int = 0,
) -> Iterator[tuple[Report, bool]]:
    """Yield (report, epoch ended) after every optimizer step, from step `start` on.

    The loss of a step is the sum over all its micro-batches divided once by the weight of the whole step, so that the
    size of a micro-batch changes nothing. A gradient that is not finite never reaches the weights: see Report.finite.
    """
    model.set_dropout(options.dropout)
    limit, work = forward_tokens(options, engine.device.type), work_of(model)
    for number, (indices, epoch, ends) in enumerate(plan.from_step(start), start):
        begin = time.monotonic()
        rows = [row(i) for i in indices]
        lr = peak_lr * lr_share(number, plan.steps, options.schedule)
        model.train()
        drops = bool(options.dropout or (options.adapter and options.adapter.dropout))
        if drops:
            # dropout too is a function of (seed, step), and of the process
            torch.manual_seed(engine.world.seed((options.seed << 32) + number))
        with told_if_out_of_memory(rows, limit, engine.device):
            sums = accumulate(model, rows, limit, engine, options.loss, (options.seed, number), share=not drops)
            sums = sums.over(engine.world)
        norms = clip(model, options.clip_norm)
        loss, norm = torch.stack([sums.logged[0], norms.to(sums.logged)]).tolist()  # the step's one wait for the device
        finite = math.isfinite(loss) and math.isfinite(norm)
        names = fingerprint(*(row.id for row in rows))
        flop = work.of([len(row.input_ids) for row in rows], sums.trained)
        # told before the optimizer's step is under way: a GPU takes that while the next batch is made
        report = sums.report(number + 1, names, epoch, lr, norm, finite, flop)
        if sums.weight and finite:  # a step of weight 0 trains nothing
            set_lr(optimizers, lr)
            step(optimizers)
        model.zero_grad(set_to_none=True)
        yield replace(report, seconds=time.monotonic() - begin), ends


@dataclass
class StepSums:
    """What the micro-batches of a step add up to; what lies on the device is read when it is asked for."""

    logged: Tensor  # (3,) loss, already divided by the weight; correct; entropy
    weight: float
    tokens: int
    trained: int
    by_part: Callable[[], dict[Breakdown, Tensor]]  # (2,) each: sums of weight * nll and of weight
    parts: dict[str, Tensor]  # of the loss, by name

    @property
    def loss(self) -> float:
        return float(self.logged[0])

    @property
    def losses(self) -> dict[str, float]:
        return {name: float(part) for name, part in self.parts.items()}

    def over(self, world: World) -> "StepSums":
        """Those of all processes, added up at once. Alone, nothing is read here."""
        if world.size == 1:
            return self
        by_part = self.by_part()
        own = [self.logged.cpu().double(), torch.tensor([self.trained]), torch.stack([*self.parts.values()]).cpu()]
        sums = world.summed(torch.cat([*own, *by_part.values()]))
        logged, trained, losses, rest = sums.split([3, 1, len(self.parts), 2 * len(by_part)])
        found = dict(zip(by_part, rest.view(-1, 2), strict=True))
        parts = dict(zip(self.parts, losses, strict=True))
        return replace(self, logged=logged, trained=int(trained), by_part=lambda: found, parts=parts)

    def report(self, step: int, rows: str, epoch: float, lr: float, norm: float, finite: bool, flop: int) -> Report:
        scored = max(self.trained, 1)
        loss, correct, entropy = self.logged.tolist()
        by_role, by_source, by_turn = means_by_part(self.by_part())
        return Report(
            step=step,
            rows=rows,
            epoch=epoch,
            loss=loss if self.weight else math.nan,
            tokens=self.tokens,
            trained=self.trained,
            lr=lr,
            grad_norm=norm,
            seconds=math.nan,  # it is not over
            accuracy=correct / scored if math.isfinite(loss) else math.nan,  # nan has a largest logit, too
            entropy=entropy / scored,
            losses=self.losses if len(self.parts) > 1 else {},
            loss_by_role=by_role,
            loss_by_source=by_source,
            loss_by_turn=by_turn,
            finite=finite,
            flop=flop,
        )


def accumulate(
    model: GPT,
    rows: Sequence[Row],
    micro_batch_tokens: int,
    engine: Engine,
    options: Loss = PLAIN,
    draw: tuple[int, int] = (0, 0),
    share: bool = False,
) -> StepSums:
    """Gradients of the mean loss of `rows` (over their weight), in forwards of at most `micro_batch_tokens`.

    Each loss of the model has a weight of its own; the first is that of the tokens. `draw`: seed and step of the noise.
    `share`: nothing in the model is drawn, so that what rows begin with alike can be computed once (flash.py).
    """
    shared = common_beginning(rows) if share and model.can_share and not options.neftune else 0
    weights = weights_by_loss(rows, options.reduction)
    logged = torch.zeros(3, device=engine.device)  # loss, correct, entropy
    apart = {name: torch.zeros((), device=engine.device) for name in weights}
    trained = 0
    scored: list[tuple[Batch, Tensor]] = []
    world = engine.world
    forwards = world.micro_batches(rows, micro_batch_tokens, shared)
    for number, part in enumerate(forwards, 1):
        engine.poll()
        batch = make_batch(part or filler(rows), options.reduction, shared).to(engine.device)
        noise = neftune(batch.rows, options.neftune, model.config.width, *draw) if options.neftune else None
        with world.exchanging(number == len(forwards)):
            parts, of_tokens = _backward(model, batch, noise, weights, world.gain if part else 0, engine, options)
        if not part:
            continue
        logged += torch.stack([_sum_of(parts), of_tokens.correct.sum(), of_tokens.entropy.sum()])
        for name, part_of_loss in parts.items():
            apart[name] += part_of_loss
        scored.append((batch, of_tokens.nll))
        trained += len(batch.scored)
    tokens = sum(len(row.input_ids) for row in rows)
    return StepSums(logged, sum(weights.values()), tokens, trained, lambda: sums_by_part(scored, rows), apart)


def _backward(
    model: GPT,
    batch: Batch,
    noise: Tensor | None,
    weights: dict[str, float],
    gain: float,
    engine: Engine,
    options: Loss,
) -> tuple[dict[str, Tensor], LossSum]:
    """Add the gradients of one forward. Returns its losses by name, each over its weight, and the first as it came.

    Both without their graph: what is left of one in memory is in the way of the next."""
    with engine.autocast():
        losses = engine.world.forward(model)(batch, options, None if noise is None else noise.to(engine.device))
    parts = {name: found.total / max(weights[name], 1e-30) for name, found in losses.items()}
    (_sum_of(parts) * gain).backward()
    first = next(iter(losses.values()))
    return {name: part.detach() for name, part in parts.items()}, LossSum(*(t.detach() for t in first))


def _sum_of(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


def clip(model: GPT, limit: float) -> Tensor:
    """The norm () of all gradients before they are clipped to `limit` (0: not clipped)."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if limit:
        torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], limit, norm)
    return norm
