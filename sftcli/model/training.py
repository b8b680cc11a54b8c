"""The loop: a generator of reports. Everything around it - logs, evaluation, checkpoints - is a `for` in the stage."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from sftcli.errors import Exit, SftError, UsageError
from sftcli.model.batches import Batch, epoch_order, make_batch, steps_in_run, steps_of, weights_by_loss
from sftcli.model.breakdown import means_by_part, sums_by_part
from sftcli.model.gpt import GPT
from sftcli.model.loss import PLAIN
from sftcli.model.mixture import Part
from sftcli.model.noise import neftune
from sftcli.model.optim import lr_share, set_lr
from sftcli.model.processes import World, whole
from sftcli.recipe import Loss, Train
from sftcli.rows import Row


@dataclass(frozen=True)
class Report:
    """One optimizer step. `loss` is per unit of weight (nan: it has none and was skipped); `tokens` are no padding.

    `loss` is what was minimised; by role, source and turn it is the plain nll (breakdown.py).
    """

    step: int  # from 1
    epoch: float  # share of the data seen, in epochs
    loss: float
    tokens: int
    trained: int
    lr: float
    grad_norm: float
    seconds: float
    accuracy: float
    entropy: float
    loss_by_role: dict[str, float]
    loss_by_source: dict[str, float]
    loss_by_turn: dict[str, float]


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
    size of a micro-batch changes nothing. Raises SftError (exit 4) before a non-finite gradient reaches the weights.
    """
    model.set_dropout(options.dropout)
    for number, (indices, epoch, ends) in enumerate(plan.from_step(start), start):
        begin = time.monotonic()
        rows = [row(i) for i in indices]
        lr = peak_lr * lr_share(number, plan.steps, options.schedule)
        model.train()
        if options.dropout or (options.adapter and options.adapter.dropout):
            # dropout too is a function of (seed, step)
            torch.manual_seed(engine.world.seed((options.seed << 32) + number))
        sums = accumulate(model, rows, options.micro_batch_tokens, engine, options.loss, (options.seed, number))
        norm = clip(model, options.clip_norm)
        if not (math.isfinite(sums.loss) and math.isfinite(norm)):
            raise diverged(number + 1, rows, sums.loss, norm)
        if sums.weight:  # a step of weight 0 trains nothing
            set_lr(optimizers, lr)
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad(set_to_none=True)
        yield sums.report(number + 1, epoch, lr, norm, time.monotonic() - begin), ends


@dataclass
class StepSums:
    """What the micro-batches of a step add up to; `loss` is already divided by the weight."""

    loss: float
    weight: float
    tokens: int
    trained: int
    correct: float
    entropy: float
    by_role: dict[str, float]
    by_source: dict[str, float]
    by_turn: dict[str, float]

    def report(self, step: int, epoch: float, lr: float, norm: float, seconds: float) -> Report:
        scored = max(self.trained, 1)
        return Report(
            step=step,
            epoch=epoch,
            loss=self.loss if self.weight else math.nan,
            tokens=self.tokens,
            trained=self.trained,
            lr=lr,
            grad_norm=norm,
            seconds=seconds,
            accuracy=self.correct / scored,
            entropy=self.entropy / scored,
            loss_by_role=self.by_role,
            loss_by_source=self.by_source,
            loss_by_turn=self.by_turn,
        )


def accumulate(
    model: GPT,
    rows: Sequence[Row],
    micro_batch_tokens: int,
    engine: Engine,
    options: Loss = PLAIN,
    draw: tuple[int, int] = (0, 0),
) -> StepSums:
    """Gradients of the mean loss of `rows` (over their weight), in forwards of at most `micro_batch_tokens`.

    Each loss of the model has a weight of its own; the first is that of the tokens. `draw`: seed and step of the noise.
    """
    weights = weights_by_loss(rows, options.reduction)
    logged = torch.zeros(3, device=engine.device)  # loss, correct, entropy: read once, at the end
    trained = 0
    scored: list[tuple[Batch, Tensor]] = []
    world = engine.world
    parts = world.micro_batches(rows, micro_batch_tokens)
    for number, part in enumerate(parts, 1):
        batch = make_batch(part, options.reduction).to(engine.device)
        noise = neftune(batch.rows, options.neftune, model.config.width, *draw) if options.neftune else None
        with world.exchanging(number == len(parts)):
            with engine.autocast():
                losses = world.forward(model)(batch, options, None if noise is None else noise.to(engine.device))
            loss = torch.stack([found.total / max(weights[name], 1e-30) for name, found in losses.items()]).sum()
            loss.backward()
        of_tokens = next(iter(losses.values()))
        logged += torch.stack([loss.detach(), of_tokens.correct.sum(), of_tokens.entropy.sum()])
        scored.append((batch, of_tokens.nll))
        trained += len(batch.scored)
    by_part = sums_by_part(scored, rows)
    counted = torch.tensor([trained], dtype=torch.float64)
    sums = world.summed(torch.cat([logged.cpu().double(), counted, *by_part.values()]))
    total, right, spread, scores = sums[:4].tolist()
    means = means_by_part(dict(zip(by_part, sums[4:].view(-1, 2), strict=True)))
    tokens = sum(len(row.input_ids) for row in rows)
    return StepSums(total, sum(weights.values()), tokens, int(scores), right, spread, *means)


def clip(model: GPT, limit: float) -> float:
    """The norm of all gradients before they are clipped to `limit` (0: not clipped)."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if limit:
        torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], limit, norm)
    return float(norm)


def diverged(step: int, rows: Sequence[Row], loss: float, norm: float) -> SftError:
    names = ", ".join(row.id for row in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return SftError(
        f"step {step}: loss {loss}, gradient norm {norm}: not finite; the weights were not touched; rows {names}",
        Exit.DIVERGED,
        hint="a lower learning rate, or look at these rows with `sft show`",
    )
