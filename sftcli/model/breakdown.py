"""The loss of a step by role, source and number of the turn."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sftcli.model.batches import Batch, turn_of_scored
from sftcli.rows import Row

Means = dict[str, float]
OTHER = "other"  # the role of what lies outside of the turns, in a row that has some


def losses_by_part(scored: Sequence[tuple[Batch, Tensor]]) -> tuple[Means, Means, Means]:
    """Loss by role, by source and by number of the turn: of the nll (N,) of each batch, per unit of weight.

    Rows without turns have neither role nor turn, and those without a source no source; weight 0 is left out.
    """
    roles: dict[str, Tensor] = defaultdict(_zero)  # (2,): sum of weight * nll, sum of weight
    sources: dict[str, Tensor] = defaultdict(_zero)
    turns: dict[int, Tensor] = defaultdict(_zero)
    for batch, nll in scored:
        both = torch.stack([batch.weights * nll, batch.weights]).double().cpu()  # (2, N); one copy a batch
        for row, part in zip(batch.rows, both.split(batch.scored_per_row, 1), strict=True):
            if row.source is not None:
                sources[row.source] += part.sum(1)
            for role, turn, sums in _by_turn(row, part):
                roles[role] += sums
                if turn is not None:
                    turns[turn] += sums
    return _means(roles), _means(sources), _means(turns)


def _zero() -> Tensor:
    return torch.zeros(2, dtype=torch.float64)


def _by_turn(row: Row, values: Tensor) -> Iterator[tuple[str, int | None, Tensor]]:
    """(role, number of the turn, sums of the values (2, N) there) of every turn, then of what lies outside of them."""
    if not row.turns:
        return
    places = torch.tensor(turn_of_scored(row), dtype=torch.long)
    sums = torch.zeros(2, len(row.turns) + 1, dtype=torch.float64).index_add_(1, places, values)
    for place, (_, _, role, number) in enumerate(row.turns, 1):
        yield role, number, sums[:, place]
    yield OTHER, None, sums[:, 0]


def _means(sums: dict[str, Tensor] | dict[int, Tensor]) -> Means:
    """Name -> loss per unit of weight, in order of the names."""
    pairs = [(str(name), both.tolist()) for name, both in sorted(sums.items())]
    return {name: loss / weight for name, (loss, weight) in pairs if weight}
