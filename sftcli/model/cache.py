"""The key/value cache of a decoding batch: a table of columns, and prompts that enter it.

    left    . . 7 8 | 5      right    7 8 . . | 5      mask    0 0 1 1 | 1
            1 3 6 2 | 9               1 3 6 2 | 9              1 1 1 1 | 1

Every step appends one column for all rows. Positions come from the mask (cumsum - 1), so where pads lie changes
nothing but the table; pad columns stay masked for ever. The keys of a prefix stand before the first column.

Memory is taken ahead of its use and nothing is moved without need: a step writes one column in place, rows from the end
move into the places of those that left, and columns that are empty for all are no longer looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sftcli.model.attention import Group, KeepingAttention, Sight, Tokens, attend, attend_few, visible
from sftcli.model.batches import WORTH_SHARING, common_length
from sftcli.model.gpt import GPT
from sftcli.model.growth import Grown, tensors_of

SPARE_COLUMNS = 64  # columns that the cache grows by, at least
SEVERAL = 4  # rows of one query each, from which on products are faster than the attention kernel


def positions_of(mask: Tensor) -> Tensor:
    """Positions (B, K) of a 0/1 mask: max(cumsum - 1, 0). Right pads repeat the last real position."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def padded(rows: Sequence[Sequence[int]], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """ids and 0/1 mask (B, K) of rows padded on one side to the longest."""
    width = max(map(len, rows))
    left = [(width - len(row) if side == "left" else 0) for row in rows]
    ids = [
        [pad] * before + list(row) + [pad] * (width - before - len(row)) for before, row in zip(left, rows, strict=True)
    ]
    mask = [
        [0] * before + [1] * len(row) + [0] * (width - before - len(row))
        for before, row in zip(left, rows, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


@dataclass
class Held:
    """What a row was fed, and its keys and values (T, G, D) a layer: a prompt that begins alike need not encode it."""

    ids: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def take(self, table: "Table", ids: list[int]) -> None:
        """Hold the only row of a table; its last token may not have been fed."""
        self.ids = ids[: table.width]
        self.keys, self.values = (
            [t[0, :, : table.width].transpose(0, 1) for t in side] for side in (table.keys, table.values)
        )

    def common(self, ids: Sequence[int]) -> int:
        """How many ids at the start are held, the last one never: its logits are asked for."""
        return min(common_length(self.ids, ids), len(ids) - 1)


class Table:
    """The columns of a decoding batch: which are real (mask) and the keys and values of each layer.

    mask (B, capacity); keys, values: a list over layers of (N, G, capacity, D), of whose N >= B rows the first B are in
    use. Columns 0..width-1 are in use.
    """

    def __init__(self, model: GPT, side: str):
        self.model, self.side = model, side
        self.width = 0
        config = model.config
        # (L, 2, G, P, D); they are behind every row's mask, its positions and its windows
        self._prefix = model.prefix(model) if model.prefix else None
        self._before = 0 if self._prefix is None else self._prefix.shape[-2]
        shape = (0, config.kv_heads, self._before, config.head_dim)
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=model.device)
        # of each layer: keys, values (N, G, P + capacity, D)
        self._kept = [[torch.zeros(shape, device=model.device) for _ in range(2)] for _ in range(config.layers)]
        self._seen: dict[int | None, Tensor] = {}  # by window, of the newest column

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def keys(self) -> list[Tensor]:
        return [keys[:, :, self._before :] for keys, _ in self._kept]

    @property
    def values(self) -> list[Tensor]:
        return [values[:, :, self._before :] for _, values in self._kept]

    def keep(self, slots: Sequence[int]) -> None:
        """Let the other rows leave; columns that are then empty for all go with them."""
        moves = [(to, slot) for to, slot in enumerate(slots) if to != slot]
        at = torch.tensor(slots, dtype=torch.long, device=self.mask.device)
        mask = self.mask[at]
        used = mask.any(0).nonzero()[:, 0]
        first = int(used[0]) if len(used) else self.width
        holes = len(used) < self.width - first  # on the right, between the prompts and what was generated later
        before = torch.arange(self._before, device=used.device)
        there = slice(self._before + first, self._before + self.width)
        for layer, pair in enumerate(self._kept):
            for i, kept in enumerate(pair):
                for to, slot in moves:  # a row's place is taken after it has left
                    kept[to, :, there] = kept[slot, :, there]
                pair[i] = kept[:, :, torch.cat([before, self._before + used])] if holes else kept[:, :, first:]
                if self._prefix is not None and first:
                    pair[i][: len(slots), :, : self._before] = self._prefix[layer, i]
        self.mask = mask[:, used] if holes else mask[:, first:]
        self.width = len(used)

    def add(
        self,
        lengths: Sequence[int],
        keys: list[Tensor],
        values: list[Tensor],
        held: Held | None = None,
        common: int = 0,
    ) -> None:
        """Rows enter: keys and values of their prompts (T, G, D) a layer, laid end to end in the order of `lengths`,
        without the `common` first tokens, which are `held`.

        They end at the last column in use (left), or begin at the first (right); the table widens if it must.
        """
        width = max(self.width, *lengths)
        old, new = len(self), len(lengths)
        shift = width - self.width if self.side == "left" else 0  # present rows keep their last column
        if shift or width > self.mask.shape[1] or old + new > len(self._kept[0][0]):
            self._make_room(old + new, width, shift, keys[0].dtype)
        starts = [width - length if self.side == "left" else 0 for length in lengths]
        mask = self.mask.new_zeros(old + new, self.mask.shape[1])
        mask[:old] = self.mask
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            mask[old + i, start : start + length] = True
        for layer, pair in enumerate(self._kept):
            shared = (held.keys[layer], held.values[layer]) if held and common else (None, None)
            for side, (kept, flat, begun) in enumerate(zip(pair, (keys[layer], values[layer]), shared, strict=True)):
                if self._prefix is not None:
                    kept[old : old + new, :, : self._before] = self._prefix[layer, side]
                pieces = flat.split([length - common for length in lengths])  # (length - common, G, D)
                for row, start, piece in zip(kept[old:], starts, pieces, strict=False):
                    start += self._before
                    if begun is not None:
                        row[:, start : start + common] = begun[:common].transpose(0, 1)
                    row[:, start + common : start + common + len(piece)] = piece.transpose(0, 1)
        self.mask, self.width = mask, width

    def _make_room(self, rows: int, width: int, shift: int, dtype: torch.dtype) -> None:
        """Take memory for so many rows and columns, and some more; what is there moves `shift` columns to the right."""
        old, capacity = len(self), width + max(SPARE_COLUMNS, width // 2)
        there = slice(self._before, self._before + self.width)
        moved = slice(there.start + shift, there.stop + shift)
        for pair in self._kept:  # a layer after the other: never all of it twice
            for i, kept in enumerate(pair):
                heads, size = kept.shape[1], kept.shape[3]
                # zeros: also what is masked must be finite
                wider = kept.new_zeros(max(rows, len(kept)), heads, self._before + capacity, size, dtype=dtype)
                wider[:old, :, : self._before] = kept[:old, :, : self._before]
                wider[:old, :, moved] = kept[:old, :, there]
                pair[i] = wider
        mask = self.mask.new_zeros(old, capacity)
        mask[:, shift : shift + self.width] = self.mask[:, : self.width]
        self.mask = mask

    def open_column(self) -> Tensor:
        """Append a column that is real for every row; returns the position (B,) of its tokens."""
        if self.width == self.mask.shape[1]:
            self._make_room(len(self), self.width, 0, self._kept[0][0].dtype)
        self.mask[:, self.width] = True
        self.width += 1
        self._seen.clear()
        return self.lengths - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens (B,) of each row so far, the newest included."""
        return self.mask[:, : self.width].sum(1)

    def seen(self, window: int | None, cap: float | None) -> Tensor:
        """What the newest column sees: (B, 1, 1, P + K). A prefix, and every real column of its row within the window;
        no pads. Once for all layers; except where a cap comes between, as what is added to the scores of each of G key
        heads, 0 or -inf: (B, G, 1, P + K)."""
        if window not in self._seen:
            mask = self.mask[:, : self.width]
            if window is not None:
                index = positions_of(mask)  # of every column in its row
                mask = mask & (index[:, -1:] - index < window)
            seen = F.pad(mask, (self._before, 0), value=True)[:, None, None]
            if not cap:
                kept = self._kept[0][0]
                seen = kept.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf).repeat(1, kept.shape[1], 1, 1)
            self._seen[window] = seen
        return self._seen[window]

    def __call__(self, sight: Sight, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the newest column: q (B, H, D), k and v (B, G, D) -> (B, H, D)."""
        rows, end = len(self), self._before + self.width
        keys, values = self._kept[sight.layer]
        keys[:rows, :, end - 1] = k
        values[:rows, :, end - 1] = v
        keys, values = keys[:rows, :, :end], values[:rows, :, :end]
        q = q.unflatten(1, (k.shape[1], -1))  # (B, G, H/G, D): the heads that share a key head are its queries
        seen = self.seen(sight.window, sight.cap)
        plain = sight.cap is None and q.device.type == "cpu" and q.dtype == torch.float32
        if plain and rows >= SEVERAL:
            return attend_few(q, keys, values, seen, sight.scale).flatten(1, 2)
        sight = sight if sight.prefix is None else replace(sight, prefix=None)  # it is among the columns
        return attend(q, keys, values, seen, sight).flatten(1, 2)


# ---- prompts that enter


class Continuing:
    """Attention of rows laid end to end whose first `common` tokens are held; keeps keys and values of the rest."""

    def __init__(self, held: Held, common: int, lengths: Sequence[int], device: torch.device):
        self.held, self.common = held, common
        self.sizes = [length - common for length in lengths]
        index = torch.arange(max(lengths), device=device)
        self.row = Tokens(torch.zeros_like(index), index, index)
        self.lengths = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(self.sizes))
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._seen: dict[int | None, Tensor] = {}

    def seen(self, window: int | None) -> Tensor:
        """(longest - common, longest)"""
        if window not in self._seen:
            rest = Tokens(*(t[self.common :] for t in (self.row.row, self.row.order, self.row.index)))
            self._seen[window] = visible(rest, self.row, window)
        return self._seen[window]

    def __call__(self, sight: Sight, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        before = [t[sight.layer][: self.common] for t in (self.held.keys, self.held.values)]
        found = []
        for size, *rest in zip(self.sizes, *(t.split(self.sizes) for t in (q, k, v)), strict=True):
            whole = (torch.cat([old, new]) for old, new in zip(before, rest[1:], strict=True))  # (length, G, D)
            mine, keys, values = (t.transpose(0, 1)[None] for t in (rest[0], *whole))  # (1, heads, size or length, D)
            seen = self.seen(sight.window)[:size, : self.common + size]
            found.append(attend(mine, keys, values, seen, sight)[0].transpose(0, 1))
        return torch.cat(found)


def prefill(model: GPT, table: Table, prompts: Sequence[Sequence[int] | Grown], held: Held | None = None) -> Tensor:
    """Encode prompts (or rows under way) without padding, each in one call, and let them enter the table; returns the
    logits (B, V) of their last tokens. What all of them begin with need not be encoded where it is `held`."""
    rows = [prompt if isinstance(prompt, Grown) else Grown(prompt) for prompt in prompts]
    lengths = [len(row) for row in rows]
    common = min(held.common(row.ids) for row in rows) if held and can_continue(model, rows) else 0
    attention: Continuing | KeepingAttention
    if held and common:
        attention = Continuing(held, common, lengths, model.device)
    else:
        attention = KeepingAttention([Group(1, len(row), row.order(model.device)) for row in rows])
    ids, positions, blocks = tensors_of(rows, model.device, common)
    hidden = model.hidden(ids, positions, attention, blocks)
    table.add(lengths, attention.keys, attention.values, held, common)
    ends = torch.tensor(lengths, device=model.device).sub(common).cumsum(0) - 1
    return model.logits(hidden[ends])


def can_continue(model: GPT, rows: Sequence[Grown]) -> bool:
    """Whether the start of a row never depends on its rest: no blanks, no rotation by its length."""
    return not model.config.turns_by_length and not any(row.blanks for row in rows)


def hold_beginning(model: GPT, rows: Sequence[Grown], held: Held) -> None:
    """Encode what several rows begin with once for all of them, unless that much is held already."""
    first = Held(rows[0].ids)
    common = min(first.common(row.ids) for row in rows)
    if common < WORTH_SHARING or common <= held.common(rows[0].ids) or not can_continue(model, rows):
        return
    attention = KeepingAttention([Group(1, common)])
    ids = torch.tensor(rows[0].ids[:common], device=model.device)
    model.hidden(ids, torch.arange(common, device=model.device), attention)
    held.ids, held.keys, held.values = rows[0].ids[:common], attention.keys, attention.values
