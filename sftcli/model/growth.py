"""How a row grows while it is decoded: at its end, or by filling its blanks from left to right.

prompt  x1 M  x2 M      fed    S  a  b    S  c
pos     0  1  2  3             1  1  1    3  3      of a filled token: its blank's
block   0  0  0  0             1  2  3    1  2
order   0  0  0  0             1  2  3    4  5      the prompt sees all of itself
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sftcli.rows import Row


@dataclass(frozen=True)
class Blanks:
    """Where the mask tokens of a prompt stand, from left to right, and the id that opens a filling."""

    places: tuple[int, ...]
    sop: int


@dataclass
class Prompt:
    """A row to complete. `key` names its random stream: its id, or its line number. No `blanks`: it goes on at its
    end."""

    ids: list[int]
    key: str
    sample: int = 0
    blanks: Blanks | None = None


class Grown:
    """The tokens of a row so far, the newest not yet fed, and the position and block position of each."""

    def __init__(self, ids: Sequence[int], blanks: Blanks | None = None):
        self.ids, self.blanks, self.known = list(ids), blanks, len(ids)
        self.positions, self.blocks = list(range(len(ids))), [0] * len(ids)
        self.filled = 0
        if blanks:
            self.next_blank()

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def order(self, device: torch.device) -> Tensor | None:
        """(1, length); None: plain causal."""
        if self.blanks is None:
            return None
        return (torch.arange(len(self), device=device) + 1 - self.known).clamp(min=0)[None]

    def feed(self, token: int) -> None:
        if self.blanks is None:
            self._append(token, len(self), 0)
        else:
            self._append(token, self.positions[-1], self.blocks[-1] + 1)

    def next_blank(self) -> bool:
        """Open the next blank; False where there is none left."""
        if self.blanks is None or self.filled == len(self.blanks.places):
            return False
        self._append(self.blanks.sop, self.blanks.places[self.filled], 1)
        self.filled += 1
        return True

    def _append(self, token: int, position: int, block: int) -> None:
        self.ids.append(token)
        self.positions.append(position)
        self.blocks.append(block)


def tensors_of(rows: Sequence[Grown], device: torch.device, start: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """ids, positions and, if there are blanks, block positions (T,) of rows laid end to end, each from `start`."""
    flat = [
        [value for row in rows for value in row.ids[start:]],
        [value for row in rows for value in row.positions[start:]],
        [value for row in rows for value in row.blocks[start:]],
    ]
    ids, positions, blocks = torch.tensor(flat, device=device)
    return ids, positions, blocks if any(row.blanks for row in rows) else None


def blanks_of_row(row: Row) -> tuple[Prompt, list[int]]:
    """A trained row as the prompt that it answers, and what fills its blanks from left to right."""
    assert row.order and row.position_ids
    size = row.order.count(0)
    fills: dict[int, list[int]] = {}
    for place, label in zip(row.position_ids[size:], row.labels[size:], strict=True):
        fills.setdefault(place, []).append(label)
    places = tuple(sorted(fills))
    prompt = Prompt(row.input_ids[:size], row.id, blanks=Blanks(places, row.input_ids[size]))
    return prompt, [token for place in places for token in fills[place]]
