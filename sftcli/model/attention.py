"""The visibility rule and its kernels.

Every token has a row, an order and an index. Query i sees key j iff they share the row and order_j <= order_i (and,
where a layer has a window W, index_i - index_j < W). Pads are a row of their own (PAD) and see each other, so that no
query is left without a key.

    causal          masked LM       blank infilling    left-padded
    order 0 1 2 3   order 0 0 0 0   order 0 0 1 2      row  P 0 0 0
          1 0 0 0         1 1 1 1         1 1 0 0           1 0 0 0
          1 1 0 0         1 1 1 1         1 1 0 0           0 1 0 0
          1 1 1 0         1 1 1 1         1 1 1 0           0 1 1 0
          1 1 1 1         1 1 1 1         1 1 1 1           0 1 1 1

The keys of a prefix belong to every row and come before every order: every query sees them. They are not rotated (their
row's tokens stand behind them: position 0 is the prefix's) and no window counts them.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sftcli.model import flash, varlen

PAD = -1  # the row of pads


@dataclass
class Tokens:
    """Who may see whom: integers of one shape (..., n)."""

    row: Tensor
    order: Tensor
    index: Tensor


def visible(query: Tokens, key: Tokens, window: int | None = None) -> Tensor:
    """True where a query sees a key: (..., Q, K)."""
    together = query.row[..., :, None] == key.row[..., None, :]
    revealed = key.order[..., None, :] <= query.order[..., :, None]
    seen = together & revealed
    if window is not None:
        seen &= query.index[..., :, None] - key.index[..., None, :] < window
    return seen


@dataclass(frozen=True)
class Sight:
    """How one layer looks: its number, the scale of its scores, its window (None: all), a soft cap on scores."""

    layer: int
    scale: float
    window: int | None = None
    cap: float | None = None
    prefix: tuple[Tensor, Tensor] | None = None  # keys and values (G, P, D) that every query sees


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, sight: Sight, full: bool = False) -> Tensor:
    """Softmax attention. q (B, H, Q, D); k, v (B, G, K, D), G key heads shared by H/G query heads each.

    `seen` (B, 1, Q, K) or broadcastable; None means plain causal over Q = K or, if `full`, that all see all.
    """
    if full and seen is None and (sight.prefix is not None or sight.cap is not None):
        seen = torch.ones(1, 1, q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    if sight.prefix is not None:
        k, v, seen = _with_prefix(sight.prefix, q, k, v, seen)
    if sight.cap is None:
        causal, grouped = seen is None and not full, q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=causal, scale=sight.scale, enable_gqa=grouped
        )
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    if seen is None:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = sight.cap * torch.tanh((q @ k.transpose(-1, -2)).float() * (sight.scale / sight.cap))  # no fast kernel
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v


def attend_few(q: Tensor, k: Tensor, v: Tensor, added: Tensor, scale: float) -> Tensor:
    """The same for one query of each of several rows, q (B, G, H/G, D), by products: on a CPU 0.8 of the kernel's time
    with 4 to 32 rows. `added` to the scores (B, G, 1, K): 0 or -inf."""
    keys, values = k.flatten(0, 1), v.flatten(0, 1)  # (B * G, K, D)
    scores = torch.baddbmm(added.flatten(0, 1), q.flatten(0, 1), keys.transpose(1, 2), alpha=scale)  # (B * G, H/G, K)
    return torch.bmm(scores.softmax(-1), values).view(q.shape)


def _with_prefix(
    prefix: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v (B, G, P + K, D) and `seen` (..., Q, P + K) with a prefix before the keys."""
    keys, values = (own.to(t.dtype).expand(len(t), -1, -1, -1) for own, t in zip(prefix, (k, v), strict=True))
    if seen is None:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    seen = F.pad(seen, (keys.shape[-2], 0), value=True)
    return torch.cat([keys, k], -2), torch.cat([values, v], -2), seen


class Attention(Protocol):
    """How the tokens of one forward see each other: called once a layer."""

    @property
    def lengths(self) -> Tensor:
        """The length (...) of each token's row, which some rotary positions depend on."""
        ...

    def __call__(self, sight: Sight, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (..., H, D), k and v (..., G, D) -> (..., H, D)."""
        ...


class Prefix(Protocol):
    """What stands before every row and takes its first `length` positions."""

    length: int

    def __call__(self, model: Any) -> Tensor:
        """Keys and values (L, 2, G, P, D) for a GPT."""
        ...


class Prefixed:
    """An attention in which every row begins with the keys and values (L, 2, G, P, D) of a prefix."""

    def __init__(self, attention: Attention, prefix: Tensor):
        self.attention, self.prefix = attention, prefix

    @property
    def lengths(self) -> Tensor:
        return self.attention.lengths + self.prefix.shape[-2]

    def __call__(self, sight: Sight, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.prefix[sight.layer]  # (G, P, D) each
        return self.attention(replace(sight, prefix=(keys, values)), q, k, v)


class Group:
    """Consecutive rows of one length; `order` (rows, length) where they are not plain causal.

    `full`: no token comes before another, as in masked LM, so all see all where no window hides one.
    """

    def __init__(self, rows: int, length: int, order: Tensor | None = None):
        self.rows, self.length, self.order = rows, length, order
        self.full = order is not None and bool((order == order[:, :1]).all())
        self._seen: dict[int | None, Tensor] = {}

    def seen(self, window: int | None, device: torch.device) -> Tensor | None:
        """Who sees whom (rows or 1, 1, length, length); None: plain causal or, in a `full` group, all see all."""
        if window is not None and window >= self.length:
            window = None
        if window is None and (self.order is None or self.full):
            return None
        if window not in self._seen:
            index = torch.arange(self.length, device=device)[None]  # (1, length)
            order = index if self.order is None else self.order
            tokens = Tokens(torch.zeros_like(index), order, index)
            self._seen[window] = visible(tokens, tokens, window)[:, None]
        return self._seen[window]


class RowAttention:
    """Rows laid end to end without padding: all of them in one call where varlen.py serves, else those of one length.

    rows 4 5 | 6 7 | 1 2 3   ->   group (2 rows of 2), group (1 row of 3)

    `shared`: how many tokens the rows begin with alike; they stand once, before the rests (flash.py, causal rows only).
    """

    def __init__(self, groups: list[Group], shared: int = 0):
        self.groups = [Group(1, shared), *groups] if shared else groups
        self.shared = shared
        self.sizes = [group.rows * group.length for group in self.groups]
        self._rows = [flash.Rows(group.rows, group.length, not group.full) for group in self.groups]
        causal, full = all(group.order is None for group in groups), all(group.full for group in groups)
        self._after = 0 if causal else -1 if full else None  # tokens after itself that a query sees, if all rows agree
        self._ends: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        return torch.repeat_interleave(torch.tensor([g.length for g in self.groups]), torch.tensor(self.sizes))

    def __call__(self, sight: Sight, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plain = sight.cap is None and sight.prefix is None
        if plain and self._after is not None and varlen.serves(q, k):
            return self._at_once(sight, q, k, v, self._after)
        if plain and q.device.type == "cpu" and all(g.seen(sight.window, q.device) is None for g in self.groups):
            return flash.attend_rows(q, k, v, self._rows, sight.scale, self.shared)
        assert not self.shared, "only the flash kernel looks back at a beginning"
        pieces = zip(self.groups, q.split(self.sizes), k.split(self.sizes), v.split(self.sizes), strict=True)
        return torch.cat([self._group(sight, *piece) for piece in pieces])

    def _at_once(self, sight: Sight, q: Tensor, k: Tensor, v: Tensor, after: int) -> Tensor:
        if self._ends is None:
            self._ends = varlen.ends_of([group.length for group in self.groups for _ in range(group.rows)], q.device)
        longest = max(group.length for group in self.groups)
        before = -1 if sight.window is None or sight.window >= longest else sight.window - 1
        return varlen.attend_rows(q, k, v, self._ends, longest, (before, after), sight.scale)

    def _group(self, sight: Sight, group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (group.rows, group.length)
        q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in (q, k, v))  # (rows, heads, length, D)
        seen = group.seen(sight.window, q.device)
        return attend(q, k, v, seen, sight, group.full).transpose(1, 2).flatten(0, 1)  # (tokens, H, D)


class KeepingAttention(RowAttention):
    """Attention over rows laid end to end that keeps their keys and values (T, G, D), a list over layers."""

    def __init__(self, groups: list[Group]):
        super().__init__(groups)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, sight: Sight, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        return super().__call__(sight, q, k, v)
