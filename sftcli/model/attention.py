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
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

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


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax attention. q (B, H, Q, D); k, v (B, G, K, D), G key heads shared by H/G query heads each.

    `seen` (B, 1, Q, K) or broadcastable; None means plain causal over Q = K.
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=q.shape[1] != k.shape[1]
    )


class Attention(Protocol):
    """How the tokens of one forward see each other: called once a layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (..., H, D), k and v (..., G, D) -> (..., H, D)."""
        ...


@dataclass
class Group:
    """Consecutive rows of one length; `seen` (rows, 1, length, length) where they are not plain causal."""

    rows: int
    length: int
    seen: Tensor | None = None


class RowAttention:
    """Rows laid end to end without padding, the rows of one length in one kernel call.

    rows 4 5 | 6 7 | 1 2 3   ->   group (2 rows of 2), group (1 row of 3)
    """

    def __init__(self, groups: list[Group]):
        self.groups = groups
        self.sizes = [group.rows * group.length for group in groups]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(self.groups, q.split(self.sizes), k.split(self.sizes), v.split(self.sizes), strict=True)
        return torch.cat([self._group(*piece) for piece in pieces])

    def _group(self, group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (group.rows, group.length)
        q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in (q, k, v))  # (rows, heads, length, D)
        return attend(q, k, v, group.seen).transpose(1, 2).flatten(0, 1)  # (tokens, H, D)
