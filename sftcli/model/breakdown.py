"""The loss of a step by role, source and number of the turn."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sftcli.model.batches import Batch, turn_of_scored
from sftcli.rows import Row

Part = tuple[str, str | int]  # (ROLE, SOURCE or TURN, which one)
Means = dict[str, float]
ROLE, SOURCE, TURN = "role", "source", "turn"
OTHER = "other"  # the role of what lies outside of the turns, in a row that has some


def sums_by_part(scored: Sequence[tuple[Batch, Tensor]], rows: Sequence[Row]) -> dict[Part, Tensor]:
    """(sum of weight * nll, sum of weight) of every part that `rows` have, from the nll (N,) of each batch.

    `rows` are those of the whole step: its processes have the same parts, in one order.
    """
    parts = dict.fromkeys(part for row in rows for part in _parts_of(row))
    sums: dict[Part, Tensor] = {part: torch.zeros(2, dtype=torch.float64) for part in parts}
    for batch, nll in scored:
        both = torch.stack([batch.weights * nll, batch.weights]).double().cpu()  # (2, N); one copy a batch
        for row, values in zip(batch.rows, both.split(batch.scored_per_row, 1), strict=True):
            if row.source is not None:
                sums[SOURCE, row.source] += values.sum(1)
            for part, found in _by_turn(row, values):
                sums[part] += found
    return sums


def _parts_of(row: Row) -> Iterator[Part]:
    """Rows without turns have neither role nor turn, and those without a source no source."""
    if row.source is not None:
        yield SOURCE, row.source
    for _, _, role, number in row.turns or ():
        yield ROLE, role
        if number is not None:
            yield TURN, number
    if row.turns:
        yield ROLE, OTHER


def _by_turn(row: Row, values: Tensor) -> Iterator[tuple[Part, Tensor]]:
    """(part, sums of the values (2, N) there) of every turn, then of what lies outside of them."""
    if not row.turns:
        return
    places = torch.tensor(turn_of_scored(row), dtype=torch.long)
    sums = torch.zeros(2, len(row.turns) + 1, dtype=torch.float64).index_add_(1, places, values)
    for place, (_, _, role, number) in enumerate(row.turns, 1):
        yield (ROLE, role), sums[:, place]
        if number is not None:
            yield (TURN, number), sums[:, place]
    yield (ROLE, OTHER), sums[:, 0]


def means_by_part(sums: Mapping[Part, Tensor]) -> tuple[Means, Means, Means]:
    """Loss per unit of weight by role, by source and by number of the turn; weight 0 is left out."""
    roles, sources, turns = ({n: s for (k, n), s in sums.items() if k == kind} for kind in (ROLE, SOURCE, TURN))
    return _means(roles), _means(sources), _means(turns)


def _means(sums: Mapping[str | int, Tensor]) -> Means:
    """Name -> loss per unit of weight, in order of the names."""
    pairs = [(str(name), both.tolist()) for name, both in sorted(sums.items())]
    return {name: loss / weight for name, (loss, weight) in pairs if weight}
