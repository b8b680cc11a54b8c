"""Linear layers, and several of them with one input."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftcli.model.pieces import Source, made_of

Matrix = tuple[Tensor, Tensor | None]  # weight (out, in), bias (out,)
NARROW = 32  # outputs: products of fewer waste most of their time
MANY, WIDE = 64, 2  # rows, and outputs for each input, from which on oneDNN is faster than MKL


class Linear(nn.Linear):
    """nn.Linear without values at first: drawing them on the meta device alone would load torch's compiler (2 s)."""

    product: Callable[[Tensor], Tensor] | None = None  # how it is computed while a model decodes (layout.py)

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if self.product:
            return self.product(x)
        return super().forward(x) if self.weight.dtype == x.dtype else products(x, self.matrices())[0]

    def matrices(self) -> list[Matrix]:
        """What the input is multiplied with; none where that is not the input alone."""
        return [(self.weight, self.bias)]

    def finish(self, y: Tensor) -> Tensor:
        """The layer's output, from those products."""
        return y


def of_one_input(x: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    """What layers with one input (..., in) make of it."""
    own: list[list[Matrix]] = [layer.matrices() if hasattr(layer, "matrices") else [] for layer in layers]
    if not torch.is_grad_enabled() or not all(own):
        return [layer(x) for layer in layers]
    made = iter(products(x, [matrix for matrices in own for matrix in matrices]))
    return [layer.finish(*(next(made) for _ in matrices)) for layer, matrices in zip(layers, own, strict=True)]


def products(x: Tensor, matrices: Sequence[Matrix]) -> Sequence[Tensor]:
    """x W' + b (..., out) for each (W, b). In backward the gradients for x add up while they are multiplied: a pass
    over memory less for each, and better products where a matrix is narrow.

    A frozen W of 16 bits is multiplied in the dtype of x: it is that only for its product, a fiftieth of the time."""
    if torch.is_autocast_enabled(x.device.type):
        return [F.linear(x, weight, bias) for weight, bias in matrices]
    if not torch.is_grad_enabled():
        return [F.linear(x, weight.to(x.dtype), bias) for weight, bias in matrices]
    made: tuple[Tensor, ...] = _Products.apply(x, made_of(x), *(tensor for matrix in matrices for tensor in matrix))
    return made


def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b (..., out), outside of autograd: many rows of float32 on a CPU by oneDNN where the output is much wider.

    MKL takes 1.1 times as long for a gate of 576 inputs and 1,536 outputs, 1.5 for a head of 49,152.
    """
    out, inner = weight.shape
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    wide = out >= WIDE * inner and x.numel() >= MANY * inner
    if not (plain and wide and torch.backends.mkldnn.is_available()):
        return F.linear(x, weight, bias)
    return onednn_product(x, weight, bias)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b (..., out) by oneDNN; the weight may be in an order of its own."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return made


class _Products(torch.autograd.Function):
    """x W' + b for several W and b; narrow W are one product. Keeps what x is made of, if a W learns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Source | None, *given: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = cast(Sequence[Tensor], given[::2]), given[1::2]
        ctx.groups = _groups(weights, biases)
        joined = [_join([weights[i] for i in group], 0) for group in ctx.groups]
        ctx.make, of = source or (_itself, (x,))
        ctx.save_for_backward(*joined, *(of if any(ctx.needs_input_grad[2:]) else ()))
        ctx.shape, ctx.sizes = x.shape, [len(weight) for weight in weights]
        found: dict[int, Tensor] = {}
        for group, weight in zip(ctx.groups, joined, strict=True):
            y = wide_product(x, weight.to(x.dtype), biases[group[0]])
            parts = y.split([ctx.sizes[i] for i in group], -1) if len(group) > 1 else (y,)  # no view: may be added to
            found |= zip(group, parts, strict=True)
        return tuple(found[i] for i in range(len(weights)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        joined, of = kept[: len(ctx.groups)], kept[len(ctx.groups) :]
        x = ctx.make(*of).reshape(-1, ctx.shape[-1]) if of else None  # (T, in)
        gs = [_join([grads[i].reshape(-1, ctx.sizes[i]) for i in group], 1) for group in ctx.groups]  # (T, out) each
        found: dict[int, Tensor] = {}  # by place in what forward was given
        for group, g in zip(ctx.groups, gs, strict=True):
            if x is not None and ctx.needs_input_grad[2 + 2 * group[0]]:
                parts = (g.t() @ x).split([ctx.sizes[i] for i in group])
                found |= {2 * i: part for i, part in zip(group, parts, strict=True)}
            if ctx.needs_input_grad[3 + 2 * group[0]]:
                found[2 * group[0] + 1] = g.sum(0)
        del x  # its gradient has room where it was
        of_x: Tensor | None = None
        for g, weight in zip(gs, joined, strict=True):
            if ctx.needs_input_grad[0]:
                weight = weight.to(g.dtype)
                of_x = g @ weight if of_x is None else of_x.addmm_(g, weight)
        rest = (found.get(i) for i in range(2 * len(ctx.sizes)))
        return None if of_x is None else of_x.view(ctx.shape), None, *rest


def _itself(x: Tensor) -> Tensor:
    return x


def _groups(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[list[int]]:
    """Which weights are multiplied at once: narrow ones that learn, mostly an adapter's; others by themselves."""
    narrow = [
        i
        for i, (w, b) in enumerate(zip(weights, biases, strict=True))
        if len(w) <= min(NARROW, w.shape[1] // 8) and b is None and w.requires_grad
    ]
    return [[i] for i in range(len(weights)) if i not in narrow] + ([narrow] if narrow else [])


def _join(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
