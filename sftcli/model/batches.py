"""Rows -> steps -> padding-free batches. The one place in this project that shifts labels.

rows       4 5 6 | 7 8          ids       7 8 4 5 6      (rows of one length side by side)
labels     - 5 6 | - 8          positions 0 1 0 1 2
                                targets   8 - 5 6 -      (label t is scored at t - 1: the shift)
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sftcli.model.attention import Group, RowAttention
from sftcli.model.mixture import Part, drawn
from sftcli.recipe import Train
from sftcli.rows import IGNORE, Row

WORTH_SHARING = 16  # tokens: a shorter common beginning is computed with each row
SAVED = 20  # a beginning saves at least one of so many tokens: looking back takes a fiftieth of a forward


@dataclass
class Batch:
    """Rows laid end to end: T tokens, of which N are scored."""

    ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    blocks: Tensor | None  # (T,) block positions; None: 0 everywhere
    types: Tensor | None  # (T,) token types; None: 0 everywhere
    attention: RowAttention
    scored: Tensor  # (N,) where in T a prediction is scored
    targets: Tensor  # (N,) the id to predict there
    weights: Tensor  # (N,) float32
    rows: list[Row]  # in the batch's order
    scored_per_row: list[int]
    starts: Tensor  # (pairs,) where in T the rows begin that have a next-sentence label
    pairs: Tensor | None  # (pairs,) those labels; None: no row has one

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; copies do not wait for it."""

        def move(tensor: Tensor) -> Tensor:
            fetched = tensor.pin_memory() if device.type == "cuda" else tensor  # else the copy waits for the GPU
            return fetched.to(device, non_blocking=True)

        for group in self.attention.groups:
            group.order = None if group.order is None else move(group.order)
        self.ids, self.positions, self.scored = move(self.ids), move(self.positions), move(self.scored)
        self.starts = move(self.starts)
        for name in ("blocks", "types", "pairs"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else move(value))
        self.targets, self.weights = move(self.targets), move(self.weights)
        return self


def make_batch(rows: Sequence[Row], reduction: str = "token", shared: int = 0) -> Batch:
    """One padding-free batch. Rows are put in order of length, so that equal lengths share a kernel call.

    `shared`: how many tokens at the beginning of all rows stand there once, before the rests (flash.py); of a row
    alone none are.
    """
    shared = shared if len(rows) > 1 else 0
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    ids: list[int] = ordered[0].input_ids[:shared]
    positions = list(range(shared))
    blocks, types = [0] * shared, [0] * shared
    starts: list[int] = []
    scored: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    counts: list[int] = []
    for row in ordered:
        base = len(ids) - shared
        before = len(scored)
        own: list[float] = []
        for at, target, weight in aligned(row):
            scored.append(base + at)
            targets.append(target)
            own.append(weight)
        weights += reduced(row, own, reduction)
        counts.append(len(scored) - before)
        starts += [base] if row.next_sentence_label is not None else []
        length = len(row.input_ids)
        ids += row.input_ids[shared:]
        positions += (row.position_ids or range(length))[shared:]
        blocks += (row.block_position_ids or [0] * length)[shared:]
        types += (row.token_type_ids or [0] * length)[shared:]
    return Batch(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        blocks=torch.tensor(blocks) if any(blocks) else None,
        types=torch.tensor(types) if any(types) else None,
        attention=RowAttention(groups_of(ordered, shared), shared),
        scored=torch.tensor(scored, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(weights, dtype=torch.float32),
        rows=ordered,
        scored_per_row=counts,
        starts=torch.tensor(starts, dtype=torch.long),
        pairs=torch.tensor([row.next_sentence_label for row in in_pairs(ordered)]) if starts else None,
    )


def in_pairs(rows: Sequence[Row]) -> list[Row]:
    """The rows with a next-sentence label; in a run they are all or none."""
    return [row for row in rows if row.next_sentence_label is not None]


def aligned(row: Row) -> Iterator[tuple[int, int, float]]:
    """(position, id to predict there, weight) of every scored position; `align: next` is shifted here and only here."""
    shift = 1 if row.align == "next" else 0
    weight = row.loss_weight
    for t in range(shift, len(row.labels)):
        if row.labels[t] != IGNORE:
            yield t - shift, row.labels[t], 1.0 if weight is None else weight[t]


def reduced(row: Row, weights: list[float], reduction: str) -> list[float]:
    """The weights of a row's scored positions, divided by their own sum: by `example` once, by `turn` in each turn.

    What lies outside of the row's turns counts as one turn more.
    """
    if reduction == "token":
        return weights
    parts = turn_of_scored(row) if reduction == "turn" else [0] * len(weights)
    sums: dict[int, float] = defaultdict(float)
    for part, weight in zip(parts, weights, strict=True):
        sums[part] += weight
    return [weight and weight / sums[part] for part, weight in zip(parts, weights, strict=True)]


def turn_of_scored(row: Row) -> list[int]:
    """Which of the row's turns (from 1) the label of every scored position lies in; 0: in none."""
    turns = [0] * len(row.labels)
    for place, (start, end, _, _) in enumerate(row.turns or (), 1):
        turns[start:end] = [place] * (end - start)
    shift = 1 if row.align == "next" else 0
    return [turns[at + shift] for at, _, _ in aligned(row)]


def weight_of(rows: Sequence[Row], reduction: str = "token") -> float:
    """The sum of the weights of all scored positions: what a step divides by."""
    return sum(sum(reduced(row, [weight for _, _, weight in aligned(row)], reduction)) for row in rows)


def weights_by_loss(rows: Sequence[Row], reduction: str) -> dict[str, float]:
    """What a step divides each loss of the model by, by its name: known before the first forward."""
    tokens = weight_of(rows, reduction)
    pairs = float(len(in_pairs(rows)))
    return {"mlm": tokens, "nsp": pairs} if pairs else {"nll": tokens}


def groups_of(rows: Sequence[Row], shared: int = 0) -> list[Group]:
    """Rows in order of length, without the first `shared` tokens -> attention groups; a row with an order of its own
    needs the general rule."""
    groups = []
    for length, same in groupby(rows, key=lambda row: len(row.input_ids)):
        members = list(same)
        order = None
        if any(row.order is not None for row in members):
            order = torch.stack([torch.tensor(row.order or range(length)) for row in members])
        groups.append(Group(len(members), length - shared, order))
    return groups


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a pure function of (seed, epoch)."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(count, generator=generator).tolist()


def epoch_order(count: int, options: Train, epoch: int, parts: Sequence[Part] = ()) -> list[int]:
    """The rows of an epoch as they are trained: all of `count` once, or what `parts` draw."""
    rows = drawn(parts, options.seed, epoch) if parts else range(count)
    return [rows[i] for i in shuffled(len(rows), options.seed, epoch)]


def steps_of(order: Sequence[int], lengths: Sequence[int], options: Train) -> Iterator[list[int]]:
    """Cut an epoch's order into optimizer steps: the next rows that fit, at least one."""
    step: list[int] = []
    tokens = 0
    for i in order:
        limit = options.batch_rows
        full = len(step) >= limit if limit else tokens + lengths[i] > options.batch_tokens
        if step and full:
            yield step
            step, tokens = [], 0
        step.append(i)
        tokens += lengths[i]
    if step:
        yield step


def steps_in_run(lengths: Sequence[int], options: Train, parts: Sequence[Part] = ()) -> int:
    """Optimizer steps of a whole run."""
    if options.max_steps:
        return options.max_steps
    whole, part = divmod(options.epochs, 1)
    counts = [
        sum(1 for _ in steps_of(epoch_order(len(lengths), options, epoch, parts), lengths, options))
        for epoch in range(math.ceil(options.epochs))
    ]
    return sum(counts[: int(whole)]) + (math.ceil(part * counts[-1]) if part else 0)


def common_beginning(rows: Sequence[Row]) -> int:
    """How many tokens all rows have at their beginning, before what any of them is scored for; 0: too few to share.

    Only of causal rows: elsewhere a token sees what comes after it.
    """
    if len(rows) < 2 or not all(_is_plain(row) for row in rows):
        return 0
    ids = [row.input_ids for row in rows]
    first_scored = (next((at for at, _, _ in aligned(row)), len(row.labels) - 1) for row in rows)
    shared = min(common_length(min(ids), max(ids)), *first_scored)  # all others lie between the two
    saves = shared * (len(rows) - 1) * SAVED >= sum(map(len, ids))
    return shared if saves and shared >= WORTH_SHARING else 0


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two rows begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((t for t, (a, b) in pairs if a != b), min(len(one), len(other)))


def _is_plain(row: Row) -> bool:
    own = (row.order, row.position_ids, row.block_position_ids, row.token_type_ids, row.next_sentence_label)
    return row.align == "next" and all(column is None for column in own)


def micro_batches(rows: Sequence[Row], limit: int, shared: int = 0) -> Iterator[list[Row]]:
    """The rows of one step in forwards of at most `limit` tokens (a longer row alone); similar lengths together."""
    for part in forwards([len(row.input_ids) for row in rows], limit, shared):
        yield [rows[i] for i in part]


def forwards(lengths: Sequence[int], limit: int, shared: int = 0) -> Iterator[list[int]]:
    """Which rows of a step, by their lengths, go through the model together; what is `shared` once for all."""
    part: list[int] = []
    tokens = shared
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and tokens + lengths[i] - shared > limit:
            yield part
            part, tokens = [], shared
        part.append(i)
        tokens += lengths[i] - shared
    if part:
        yield part
