"""Weights as whole numbers for decoding: a quarter of the memory and of the time that reading them takes.

A weight is -127..127 times a scale for each of its outputs. What it meets is written in two digits,
x = step * (128 * high + low), so to 15 bits of the largest number of its row: products of whole numbers are exact,
however many rows there are. FBGEMM multiplies them where torch has it and the processor adds exactly, else oneDNN.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from sftcli.errors import UsageError
from sftcli.model.adapters.lora import LoraLinear

BASE = 128  # of the two digits: high is one of -127..127, low of 0..127
LARGEST = 127  # of a digit, and of a weight
ZERO = 128  # FBGEMM's numbers are unsigned on one side
MANY = 256  # rows of one product: bounds the memory of the digits
LEAST = 1e-30  # of a step or scale: a row of zeros stays one
FBGEMM = "linear_with_input_q_dq_qweight_dq_output_fp32"

Products = Callable[[Tensor], Tensor]  # whole numbers in float32 (N, in) -> (N, out), each output times its scale


class Int8Linear(nn.Module):
    """Linear layers with one input, from whole numbers: y = scale * (W x), W (out, in) int8, scale (out,)."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        parts = [quantized(weight_of(layer)) for layer in layers]
        make = exact_products()
        self.products = make(torch.cat([whole for whole, _ in parts]), torch.cat([scale for _, scale in parts]))
        biases = [layer.bias.data.float() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.float().reshape(-1, x.shape[-1])  # (T, in)
        y = self._product(flat) if len(flat) <= MANY else torch.cat([self._product(part) for part in flat.split(MANY)])
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], y.shape[-1])

    def _product(self, x: Tensor) -> Tensor:
        """scale * W x (T, out) of x (T, in), digit by digit."""
        step = x.abs().amax(-1, keepdim=True).clamp_(min=LEAST).div_(BASE * LARGEST)
        whole = torch.div(x, step).round_()
        digits = x.new_empty(2 * len(x), x.shape[-1])  # high above low
        high, low = digits[: len(x)], digits[len(x) :]
        torch.mul(whole, 1 / BASE, out=high).floor_()
        torch.sub(whole, high, alpha=BASE, out=low)
        y = self.products(digits)  # (2T, out)
        return torch.add(y[len(x) :], y[: len(x)], alpha=BASE).mul_(step)

    def joined(self, x: Tensor) -> tuple[Tensor, ...]:
        return self(x).split(self.sizes, -1)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (out, in) in int8, and the scale (out,) that makes them the weight again, nearly."""
    scale = weight.abs().amax(1).clamp(min=LEAST) / LARGEST
    return (weight / scale[:, None]).round().to(torch.int8), scale


def weight_of(layer: nn.Linear) -> Tensor:
    """In float32, with the update of an adapter in it."""
    return layer.merged() if isinstance(layer, LoraLinear) else layer.weight.data.float()


def by_fbgemm(weight: Tensor, scale: Tensor) -> Products:
    """With a copy of the weight (out, in) in FBGEMM's order, the only one that is kept."""
    multiply, engine = getattr(torch.ops.quantized, FBGEMM), torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop its quantized tensors; then there is the other way
        whole = torch._make_per_channel_quantized_tensor(weight, scale, torch.zeros(len(scale), dtype=torch.long), 0)
    try:
        torch.backends.quantized.engine = "fbgemm"
        packed = torch.ops.quantized.linear_prepack(whole, None)
    finally:
        torch.backends.quantized.engine = engine
    return lambda digits: multiply(digits, 1.0, ZERO, packed)


def by_onednn(weight: Tensor, scale: Tensor) -> Products:
    """With the weight (out, in) as it is."""
    return lambda digits: torch._int_mm(digits.to(torch.int8), weight.t()).float().mul_(scale)


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
        bool((make(weight, torch.ones(64))(most.float()) == 64 * LARGEST * int(weight[0, 0])).all())
        for weight in (most, -most)
    )
