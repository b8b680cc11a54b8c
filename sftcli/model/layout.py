"""How weights lie in memory while a model decodes: few rows meet every weight, so that reading them is the work.

    stored (out, in)     laid out: layers that share an input side by side, q | k | v and gate | up

One product is faster than two or three, and the parameters become views of its memory: everything that reads them finds
what it found before. MKL multiplies few rows with a copy of the weight in its own order: in 0.6 of the time of the
stored one with 8 rows, 0.75 with 32, near the time that reading takes. Where it cannot (another processor, dtype or a
model too large to have twice) the weight itself is transposed, (in, out): 0.8 with 8 rows, as much with 16.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftcli.errors import UsageError
from sftcli.model.gpt import GPT, MLP, Joined, SelfAttention
from sftcli.model.int8 import Int8Linear
from sftcli.model.linear import Linear

FEW = 4  # a product for N rows serves more than N / 4 of them: with fewer the stored weight is as fast
TWICE = 4 << 30  # bytes of weights that a model may have twice


class Product:
    """Linear layers with one input as one product for `rows` rows at a time; their parameters are views of its memory.
    `twice`: it may have a copy of the weights."""

    def __init__(self, layers: Sequence[nn.Linear], rows: int, twice: bool):
        self.sizes = [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.weight.data for layer in layers]) if len(layers) > 1 else layers[0].weight.data
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.rows, self.packed = rows, None
        if _has_layouts(self.weight):
            if twice and torch.backends.mkl.is_available():
                self.weight = self.weight.contiguous()
                self.packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
            else:
                self.weight = transposed(self.weight)
        for layer, part in zip(layers, self.weight.split(self.sizes), strict=True):
            layer.weight.data = part

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out of all layers)"""
        count = x.numel() // x.shape[-1]
        if self.packed is None or not self.rows < FEW * count <= FEW * self.rows:
            return F.linear(x, self.weight, self.bias)
        flat = x.reshape(count, -1)
        if count < self.rows:  # the packed order is for this many
            flat = F.pad(flat, (0, 0, 0, self.rows - count))
        y = torch.ops.mkl._mkl_linear(flat, self.packed, self.weight, self.bias, self.rows)  # (rows, out)
        return y[:count].view(*x.shape[:-1], -1)

    def joined(self, x: Tensor) -> tuple[Tensor, ...]:
        return self(x).split(self.sizes, -1)


@torch.no_grad()
def laid_out(model: GPT, rows: int, quantize: str | None = None) -> None:
    """Lay a model's weights out for decoding `rows` rows, and for nothing else from then on. An adapter that comes or
    goes later wants it again (int8: has its update in the whole numbers, for good)."""
    if quantize and model.device.type != "cpu":
        raise UsageError(f"int8 weights decode on the CPU, not on {model.device.type}", hint="device=cpu")
    twice = sum(parameter.nbytes for parameter in model.parameters()) <= TWICE
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.joined = _joined([module.q, module.k, module.v], rows, twice, quantize)
        elif isinstance(module, MLP) and module.gate:
            module.joined = _joined([module.gate, module.up], rows, twice, quantize)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or _is_joined(model, name):
            continue
        if quantize:
            model.set_submodule(name, Int8Linear([layer]))
        elif type(layer) is Linear:
            layer.product = Product([layer], rows, twice)
        elif _has_layouts(layer.weight):
            layer.weight.data = transposed(layer.weight.data)


def _has_layouts(weight: Tensor) -> bool:
    """Whether some order of a weight in memory is known to be faster."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def transposed(weight: Tensor) -> Tensor:
    """The same weight (out, in), its columns one after the other in memory; as it is where it lies so already."""
    return weight.t().contiguous().t()


def _joined(layers: Sequence[nn.Linear], rows: int, twice: bool, quantize: str | None) -> Joined | None:
    """The layers as one; None where an adapter stands beside one of them."""
    if quantize:
        joined = Int8Linear(layers)
        for layer in layers:  # the model reads them no more
            layer.weight = nn.Parameter(layer.weight[:0], requires_grad=False)
        return joined.joined
    return Product(layers, rows, twice).joined if all(type(layer) is Linear for layer in layers) else None


def _is_joined(model: GPT, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), "joined", None) is not None and leaf in ("q", "k", "v", "gate", "up")
