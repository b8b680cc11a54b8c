"""Element-wise pieces of a block with backward passes of their own.

Composed of torch's functions each of them goes over memory several times as often and keeps several times as much for
the backward pass; on a CPU that cost more than the products of matrices between them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / rms(x), rounded as everybody else rounds it; keeps x and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        r = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, weight)
        return (x32 * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dx = r w g - x r^3 <w g, x> / C;  dw = sum of g x r."""
        x, r, weight = ctx.saved_tensors
        x32, g, width = x.float(), grad.float(), x.shape[-1]
        product = (g * x32).view(-1, width)
        d_weight = torch.mv(product.t(), r.view(-1)) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        along = torch.mv(product, weight).view_as(r) * r.pow(3).div_(-width)
        dx = torch.mul(g, weight, out=product.view_as(g)).mul_(r).addcmul_(x32, along)
        return dx.to(x.dtype), d_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (arXiv 1910.07467)."""
    return _RMSNorm.apply(x, weight.float(), eps)


class _Gated(torch.autograd.Function):
    """activation(gate) * up; keeps gate and up, not the activation."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        (d_gate,) = torch.autograd.grad(activated, gate, grad * up)
        return d_gate, activated.detach().mul_(grad), None


def gated(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up (arXiv 2002.05202); `activation` acts on each number and returns a new tensor."""
    return _Gated.apply(gate, up, activation)


class _Turned(torch.autograd.Function):
    """Pairs of numbers turned by an angle; the backward pass turns them back. Keeps cos and sin only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, ctx.interleaved, -1.0), None, None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first `dim` numbers of every head of x (..., heads, D) turned; cos, sin (..., 1, dim), as in RotaryTable.

    Pairs (a, b), numbers (2i, 2i + 1) if interleaved, else (i, i + dim / 2), become (a cos - b sin, b cos + a sin);
    `sin` brings the minus with it."""
    return _Turned.apply(x, cos, sin, interleaved)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, direction: float) -> Tensor:
    dim = cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dim < x.shape[-1]:
        out[..., dim:] = x[..., dim:]
    a, b = _pairs(x[..., :dim], interleaved)
    places = zip((a, b), (b, a), *(_pairs(t, interleaved) for t in (out[..., :dim], cos, sin)), strict=True)
    for own, other, place, c, s in places:
        torch.mul(own, c, out=place).add_(other * s, alpha=direction)  # addcmul_ rounds once, others twice
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second number of every pair."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    a, b = x.chunk(2, -1)
    return a, b
