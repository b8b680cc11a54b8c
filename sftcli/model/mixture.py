"""How often an epoch has each row: inputs and sources with weights.

A part of n rows with weight w gives an epoch the next w * n rows of its own endless shuffle, so that over the run every
row of it comes as often as the others: w = 0.3 takes another 30 % each epoch, w = 2 every row twice, w = 1 every row.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sftcli.errors import UsageError
from sftcli.rowfile import RowFile

WEIGHT = re.compile(r"(?P<path>.+?)(?:\*(?P<share>\d*\.?\d+)|#(?P<rows>\d+))")


@dataclass(frozen=True)
class Input:
    """A row file of the command line: `PATH`, `PATH*0.3` (of its rows an epoch) or `PATH#500` (rows an epoch)."""

    path: str
    share: float = 1.0
    rows: int | None = None  # instead of the share

    @property
    def weighted(self) -> bool:
        return self.rows is not None or self.share != 1.0

    def weight(self, count: int) -> float:
        """Times that an epoch has each of the input's `count` rows."""
        return self.share if self.rows is None else self.rows / max(count, 1)


@dataclass(frozen=True)
class Part:
    """Rows with one weight: an epoch has `per_epoch` of them."""

    name: str
    rows: Sequence[int]
    per_epoch: float


def input_of(text: str) -> Input:
    """Read an argument; a file whose name looks like a weight is that file. Raises UsageError."""
    found = None if os.path.exists(text) else WEIGHT.fullmatch(text)
    if not found:
        if not os.path.exists(text) and any(os.path.isfile(text.rpartition(sign)[0]) for sign in "*#"):
            raise UsageError(f"{text}: this is no weight", hint="FILE*0.3 or FILE#500")
        return Input(text)
    number = float(found["share"] or found["rows"])
    if not 0 < number < 1e6:
        raise UsageError(f"{text}: a weight must be more than 0", hint="leave the file out instead")
    return Input(found["path"], rows=int(number)) if found["rows"] else Input(found["path"], share=number)


def parts_of(
    rows: RowFile,
    train_rows: Sequence[int],
    inputs: Sequence[tuple[Input, int]],
    mix: Mapping[str, float],
) -> list[Part]:
    """The parts of the rows to train on, by input (each with its number of rows, one behind the other) and by source.

    Rows are numbered by their place in `train_rows`. Empty where every row counts once. Raises UsageError for a source
    that no row has."""
    if not mix and not any(item.weighted for item, _ in inputs):
        return []
    sources = [rows.source(i) for i in range(len(rows))] if mix else []
    if unknown := sorted(set(mix).difference(source or "" for source in sources)):
        known = ", ".join(sorted({source for source in sources if source})) or "none: no row names its source"
        raise UsageError(f"mix: no row is from {unknown[0]!r}", hint=f"the sources are {known}")
    parts: list[Part] = []
    start = 0
    for item, count in inputs:
        mine = [at for at, row in enumerate(train_rows) if start <= row < start + count]
        start += count
        by_source: dict[str | None, list[int]] = {}
        for at in mine:
            source = sources[train_rows[at]] if mix else None
            by_source.setdefault(source if source in mix else None, []).append(at)
        for source, members in by_source.items():
            weight = item.weight(len(mine)) * (mix[source] if source is not None else 1.0)
            name = item.path if source is None else f"{item.path} ({source})"
            parts.append(Part(name, members, max(1.0, weight * len(members))))  # so that no epoch is empty
    return parts


def drawn(parts: Sequence[Part], seed: int, epoch: int) -> list[int]:
    """The rows of an epoch in ascending order, some of them several times: a pure function of (seed, epoch)."""
    found: list[int] = []
    for number, part in enumerate(parts):
        size = len(part.rows)
        start, end = (math.floor(e * part.per_epoch + 0.5) for e in (epoch, epoch + 1))
        for lap in range(start // size, -(-end // size)):
            order = _lap(size, seed, number, lap)
            found += [part.rows[i] for i in order[max(start - lap * size, 0) : end - lap * size]]
    return sorted(found)


def _lap(size: int, seed: int, part: int, lap: int) -> list[int]:
    """One time through the rows of a part, in an order of its own."""
    digest = hashlib.blake2b(f"{seed} {part} {lap}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randperm(size, generator=generator).tolist()
