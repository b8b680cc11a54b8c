"""A beginning that all rows of a forward have, as a system prompt is: computed once, and every row looks back at it.

rows   1 2 3 4 5 | 1 2 3 6       tokens   1 2 3 | 4 5 | 6       (beginning of 3)

Attention of a row's token is over two parts, the beginning and its own row. Each is a call of the CPU's flash kernel,
which also returns lse, the log of what its weights were divided by; the whole is their mean by exp(lse) (as in ring
attention, arXiv 2310.01889). Backward of each part with the lse and the result of the whole gives its part of the
gradients; those of the beginning are the sum over all rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sftcli.model.attention import Group, RowAttention, Sight

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SharedAttention(RowAttention):
    """Causal attention of a beginning of `shared` tokens and, behind it, the rests of rows laid end to end."""

    def __init__(self, shared: int, rests: list[Group]):
        super().__init__([Group(1, shared), *rests])
        self.shared = shared

    def __call__(self, sight: Sight, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes = [(group.rows, group.length) for group in self.groups]
        mixed: Tensor = _Shared.apply(q, k, v, self.shared, shapes, sight.scale)
        return mixed


class _Shared(torch.autograd.Function):
    """q (T, H, D), k and v (T, G, D) -> (T, H, D); `shapes`: (rows, length) of the beginning and of each group."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, shared: int, shapes: Sequence[tuple[int, int]], scale: float
    ) -> Tensor:
        parts = [_in_rows(t, shapes) for t in (q, k, v)]
        own = [flash(*part, 0.0, True, scale=scale) for part in zip(*parts, strict=True)]
        out = torch.cat([_end_to_end(mixed) for mixed, _ in own])  # (T, H, D)
        lse = torch.cat([_end_to_end(lse) for _, lse in own])  # (T, H)
        back, back_lse = flash(_one_row(q[shared:]), *(_one_row(t[:shared]) for t in (k, v)), 0.0, False, scale=scale)
        rest = lse[shared:]
        both = torch.logaddexp(rest, _end_to_end(back_lse))
        of_back = 1 - torch.exp(rest - both)  # its share of the weights
        out[shared:].lerp_(_end_to_end(back), of_back[..., None].to(out.dtype))
        rest.copy_(both)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.shared, ctx.shapes, ctx.scale = shared, shapes, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, shared, scale = ctx.saved_tensors, ctx.shared, ctx.scale
        parts = [_in_rows(t, ctx.shapes) for t in (grad, *saved)]
        own = [flash_backward(*part, 0.0, True, scale=scale) for part in zip(*parts, strict=True)]
        dq, dk, dv = (torch.cat([_end_to_end(part) for part in of_parts]) for of_parts in zip(*own, strict=True))
        g, q, out, lse = (_one_row(t[shared:]) for t in (grad, saved[0], *saved[3:]))  # of the rests
        k, v = (_one_row(t[:shared]) for t in saved[1:3])
        back = flash_backward(g, q, k, v, out, lse, 0.0, False, scale=scale)
        for found, more, part in zip((dq, dk, dv), back, (slice(shared, None), *[slice(shared)] * 2), strict=True):
            found[part] += _end_to_end(more)
        return dq, dk, dv, None, None, None


def _in_rows(t: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(T, heads, ...) -> (rows, heads, length, ...) of each group."""
    parts = t.split([rows * length for rows, length in shapes])
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]


def _one_row(t: Tensor) -> Tensor:
    """(T, heads, ...) -> (1, heads, T, ...)."""
    return t[None].transpose(1, 2)


def _end_to_end(t: Tensor) -> Tensor:
    """(rows, heads, length, ...) -> (T, heads, ...)."""
    return t.transpose(1, 2).flatten(0, 1)
