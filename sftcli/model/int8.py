"""Weights as whole numbers for decoding: a quarter of the memory and of the time that reading them takes.

A weight is -127..127 times a scale for each of its outputs. What it meets is written in two digits,
x = step * (128 * high + low), so to 14 bits of the largest number of its row: products of whole numbers are exact,
however many rows there are, also on processors whose sums of two products have 16 bits (AVX2: 128 * 127 * 2 fit).
FBGEMM multiplies them where torch has it, else oneDNN.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from sftcli.errors import UsageError
from sftcli.model.adapters.lora import LoraLinear

BASE, HALF = 128, 64  # of the two digits: high is one of -63..63, low of -64..64
MOST = BASE * (HALF - 1) + HALF - 1  # that two digits can say
LARGEST = 127  # of a weight
MANY = 256  # rows of one product: bounds the memory of the digits
LEAST = 1e-30  # of a step or scale: a row of zeros stays one
FBGEMM = "linear_with_input_q_dq_qweight_dq_output_fp32"

Products = Callable[[Tensor], Tensor]  # of the nearest whole numbers (N, in) -> (N, out), each output times its scale


class Int8Linear(nn.Module):
    """Linear layers of one input side by side, in whole numbers: y = scale * (W x), W (out, in) int8, scale (out,)."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        parts = [quantized(weight_of(layer)) for layer in layers]
        make = exact_products()
        self.products = make(torch.cat([whole for whole, _ in parts]), torch.cat([scale for _, scale in parts]))
        biases = [layer.bias.data.float() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        # of a high digit and of a low one; tensors: to make one of a number takes longer than to multiply with it
        self.least, self.shares = (torch.tensor([BASE * low, low])[:, None, None] for low in (LEAST, 1 / MOST))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.float().reshape(-1, x.shape[-1])  # (T, in)
        few = flat.shape[0] <= MANY
        y = self._product(flat) if few else torch.cat([self._product(part) for part in flat.split(MANY)])
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], y.shape[-1])

    def _product(self, x: Tensor) -> Tensor:
        """scale * W x (T, out) of x (T, in), digit by digit."""
        largest = x.abs().amax(-1, keepdim=True)
        steps = torch.addcmul(self.least, largest, self.shares)  # (2, T, 1), the first exactly BASE times the second
        digits = torch.div(x, steps)  # (2, T, in)
        high, low = digits.unbind()
        low.add_(high.round_(), alpha=-BASE)
        of_high, of_low = self.products(digits.flatten(0, 1)).chunk(2)  # (T, out) each
        return of_low.add_(of_high, alpha=BASE).mul_(steps[1])


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (out, in) in int8, and the scale (out,) that makes them the weight again, nearly."""
    scale = weight.abs().amax(1).clamp(min=LEAST) / LARGEST
    return (weight / scale[:, None]).round().to(torch.int8), scale


def weight_of(layer: nn.Linear) -> Tensor:
    """In float32, with the update of an adapter in it."""
    return layer.merged() if isinstance(layer, LoraLinear) else layer.weight.data.float()


def by_fbgemm(weight: Tensor, scale: Tensor) -> Products:
    """With a copy of the weight (out, in) in FBGEMM's order, the only one that is kept."""
    multiply, engine = getattr(torch.ops.quantized, FBGEMM).default, torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop its quantized tensors; then there is the other way
        whole = torch._make_per_channel_quantized_tensor(weight, scale, torch.zeros(len(scale), dtype=torch.long), 0)
    try:
        torch.backends.quantized.engine = "fbgemm"
        packed = torch.ops.quantized.linear_prepack(whole, None)
    finally:
        torch.backends.quantized.engine = engine
    return lambda digits: multiply(digits, 1.0, HALF, packed)  # unsigned there: it adds HALF


def by_onednn(weight: Tensor, scale: Tensor) -> Products:
    """With the weight (out, in) as it is."""
    return lambda digits: torch._int_mm(digits.round().to(torch.int8), weight.t()).float().mul_(scale)


@cache
def exact_products() -> Callable[[Tensor, Tensor], Products]:
    """The fastest way whose products are exact: old processors let sums of two overflow. Raises UsageError."""
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines and hasattr(torch.ops.quantized, FBGEMM)
    ways = [by_fbgemm, by_onednn] if has_fbgemm else [by_onednn]
    found = next((make for make in ways if _is_exact(make)), None)
    if found is None:
        raise UsageError("this processor does not multiply int8 exactly", hint="decode without --quantize")
    return found


def _is_exact(make: Callable[[Tensor, Tensor], Products]) -> bool:
    most = torch.full((64, 64), LARGEST, dtype=torch.int8)
    return all(
        bool((make(sign * most, torch.ones(64))(torch.full((64, 64), digit)) == sign * 64 * LARGEST * digit).all())
        for sign in (1, -1)
        for digit in (float(HALF), -float(HALF))
    )
