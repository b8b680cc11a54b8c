"""The CPU's flash kernel over rows laid end to end, and a beginning that all of them have, computed once.

rows   1 2 3 4 5 | 1 2 3 6       tokens   1 2 3 | 4 5 | 6       (beginning of 3)

Every group of rows is one call of the kernel; what it returns is kept once, end to end, for the kernel's backward and
for the product behind it. Attention behind a beginning is over two parts, the beginning and the token's own row. Each
is a call, which also returns lse, the log of what its weights were divided by; the whole is their mean by exp(lse) (as
in ring attention, arXiv 2310.01889). Backward of each part with the lse and the result of the whole gives its part of
the gradients; those of the beginning are the sum over all rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Rows(NamedTuple):
    """Consecutive rows of one length that look at themselves, each token at all or (causal) at those before it."""

    rows: int
    length: int
    causal: bool


def attend_rows(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Rows], scale: float, shared: int = 0) -> Tensor:
    """q (T, H, D), k and v (T, G, D) -> (T, H, D). `shared`: the length of the first group, if all others see it."""
    attended: Tensor = _Attended.apply(q.to(v.dtype), k.to(v.dtype), v, groups, scale, shared)
    return attended


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Rows], scale: float, shared: int) -> Tensor:
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))  # (T, H)
        for group, *parts, mixed, log_sum in _in_rows(groups, q, k, v, out, lse):
            found = flash(*parts, 0.0, group.causal, scale=scale)
            mixed.copy_(found[0])
            log_sum.copy_(found[1])
        if shared:
            back, back_lse = flash(_one_row(q[shared:]), *(_one_row(t[:shared]) for t in (k, v)), 0.0, scale=scale)
            rest, back_lse = lse[shared:], _end_to_end(back_lse)
            both = torch.logaddexp(rest, back_lse)
            of_back = torch.exp(back_lse - both)  # its share of the weights
            out[shared:].lerp_(_end_to_end(back), of_back[..., None].to(out.dtype))
            rest.copy_(both)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.groups, ctx.scale, ctx.shared = groups, scale, shared
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        shared, scale = ctx.shared, ctx.scale
        gradients = [t.new_empty(t.shape) for t in (q, k, v)]
        for group, *parts, dq, dk, dv in _in_rows(ctx.groups, grad, q, k, v, out, lse, *gradients):
            found = flash_backward(*parts, 0.0, group.causal, scale=scale)
            for into, part in zip((dq, dk, dv), found, strict=True):
                into.copy_(part)
        if shared:
            g, q, out, lse = (_one_row(t[shared:]) for t in (grad, q, out, lse))  # of the rests
            found = flash_backward(g, q, *(_one_row(t[:shared]) for t in (k, v)), out, lse, 0.0, False, scale=scale)
            for into, more, part in zip(gradients, found, (slice(shared, None), *[slice(shared)] * 2), strict=True):
                into[part] += _end_to_end(more)
        return *gradients, None, None, None


def _in_rows(groups: Sequence[Rows], *tensors: Tensor) -> Iterator[Any]:
    """Each group with its part of every tensor (T, heads, ...), as (rows, heads, length, ...)."""
    start = 0
    for group in groups:
        end = start + group.rows * group.length
        yield group, *(t[start:end].unflatten(0, (group.rows, group.length)).transpose(1, 2) for t in tensors)
        start = end


def _one_row(t: Tensor) -> Tensor:
    """(T, heads, ...) -> (1, heads, T, ...)."""
    return t[None].transpose(1, 2)


def _end_to_end(t: Tensor) -> Tensor:
    """(1, heads, T, ...) -> (T, heads, ...)."""
    return t.transpose(1, 2)[0]
