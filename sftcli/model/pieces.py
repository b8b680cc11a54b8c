"""Element-wise pieces of a block with backward passes of their own.

Composed of torch's functions each of them goes over memory several times as often and keeps several times as much for
the backward pass; on a CPU that cost more than the products of matrices between them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Source = tuple[Callable[..., Tensor], tuple[Tensor, ...]]  # a cheap function, and what it makes a tensor of


def made_of(x: Tensor) -> Source | None:
    """What a product of x may keep instead of x, if a piece of this file has made it: that is kept anyway."""
    source, version = getattr(x, "made_of", (None, 0))
    return source if x._version == version else None  # changed in place it is something else


def _noted(y: Tensor, make: Callable[..., Tensor], *of: Tensor) -> Tensor:
    y.made_of = (make, of), y._version  # type: ignore[attr-defined]
    return y


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / rms(x), rounded as everybody else rounds it; keeps x and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, r = _normed(x, weight, eps)
        ctx.save_for_backward(x, r, weight)
        ctx.mark_non_differentiable(r)
        return y, r

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
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
    weight = weight.float()
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps)[0]
    y, r = _RMSNorm.apply(x, weight, eps)
    return _noted(y, _scaled, x, r, weight)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and r of x (..., C); y lies where the squares lay."""
    x32 = x.float()
    y = x32.square()
    # decoding feels each call: mean and eps as a number are the same bits in three times the time
    r = y.sum(-1, keepdim=True).div_(number(x.shape[-1])).add_(number(eps)).rsqrt_()
    return _scaled(x32, r, weight, y).type_as(x), r


def _scaled(x: Tensor, r: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mul(x.float(), r, out=out).mul_(weight).type_as(x)


@cache
def number(value: float) -> Tensor:
    """One number as a tensor, which sums and products take on every device: to make it anew for each takes longer."""
    with torch.inference_mode(False):
        return torch.tensor(float(value), device="cpu")


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, head: list[Tensor]) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.head = weight.shape, head
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        of_weight = ctx.head.pop() if ctx.head else grad.new_zeros(ctx.shape)
        return None, of_weight.index_add_(0, ids.flatten(), grad.flatten(0, -2)), None


def embed(ids: Tensor, weight: Tensor, head: list[Tensor]) -> Tensor:
    """Rows (..., C) of a table that is the head's, too: the head's loss leaves its gradient in `head`, and in backward
    the rows' is added to it. A table (V, C) of gradients less."""
    return _Embedded.apply(ids, weight, head)


@dataclass(frozen=True)
class Activation:
    """A function of each number, and its backward pass: of a gradient (...) and what the function was given (...),
    into `grad_input`."""

    function: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


aten = torch.ops.aten
ACTIVATIONS = {
    "silu": Activation(F.silu, aten.silu_backward.grad_input),
    "gelu": Activation(F.gelu, aten.gelu_backward.grad_input),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(aten.gelu_backward.grad_input, approximate="tanh")
    ),
    "relu": Activation(F.relu, partial(aten.threshold_backward.grad_input, threshold=0)),
}


class _Gated(torch.autograd.Function):
    """activation(gate) * up; keeps gate and up, not the activation."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation, left: list[Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.left = activation, left
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        activated = ctx.left.pop() if ctx.left else ctx.activation(gate)
        of_gate = grad * up
        ctx.activation.backward(of_gate, gate, grad_input=of_gate)
        return of_gate, activated.mul_(grad), None, None


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up (arXiv 2002.05202)."""
    if not torch.is_grad_enabled():
        return activation(gate).mul_(up)
    left: list[Tensor] = []  # the activation, by a product behind this that made it again just before

    def make(gate: Tensor, up: Tensor) -> Tensor:
        left[:] = [activation(gate)]
        return left[0] * up

    return _noted(_Gated.apply(gate, up, activation, left), make, gate, up)


class _Turned(torch.autograd.Function):
    """Pairs of numbers turned by an angle, in place; the backward pass turns them back. Keeps cos and sin only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        ctx.mark_dirty(x)
        return _turn_(x, cos, sin, interleaved, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn_(grad.clone(), cos, sin, ctx.interleaved, -1.0), None, None, None


def turned_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first `dim` numbers of every head of x (..., heads, D) turned in place; cos, sin (..., 1, dim), as in
    RotaryTable.

    Pairs (a, b), numbers (2i, 2i + 1) if interleaved, else (i, i + dim / 2), become (a cos - b sin, b cos + a sin);
    `sin` brings the minus with it."""
    if not torch.is_grad_enabled():
        return _turn_(x, cos, sin, interleaved, 1.0)
    return _Turned.apply(x, cos, sin, interleaved)


def _turn_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, direction: float) -> Tensor:
    dim = cos.shape[-1]
    turning = x[..., :dim] if dim < x.shape[-1] else x
    partner = _exchanged(turning, interleaved).mul_(sin)
    turning.mul_(cos).add_(partner, alpha=direction)  # addcmul_ rounds once, others twice
    return x


def _exchanged(x: Tensor, interleaved: bool) -> Tensor:
    """A copy in which the two numbers of every pair have changed places."""
    if interleaved:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x.roll(x.shape[-1] // 2, -1)
