"""How weights lie in memory while a model decodes: few rows meet every weight, so that reading them is the work.

    stored (out, in)     laid out: layers that share an input side by side, q | k | v and gate | up

One product is faster than two or three, and the parameters become views of its memory: everything that reads them finds
what it found before. The product reads a copy of its own, if there is room for one:

- in float16, times a power of two, where that is exactly the weight, as in checkpoints of 16 bits: half the bytes, and
  FBGEMM is in float32 again before it multiplies (AVX2: 0.3 of the time of the stored weight with 1 row and with 8, 0.5
  with 32, the same with 512);
- else in the order of oneDNN (AVX2: 0.7, 0.6, 0.65, 0.8) or of MKL (AVX-512: 0.6 with 8 rows, 0.75 with 32, for that
  many only).

Without a copy oneDNN reads the stored weight, or the weight itself is transposed, (in, out): with AVX-512 0.8 of the
time with 8 rows, the same with 16.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftcli.errors import UsageError
from sftcli.model.gpt import GPT, MLP, SelfAttention
from sftcli.model.int8 import Int8Linear
from sftcli.model.linear import Linear, onednn_product

FEW = 4  # MKL's order for N rows serves more than N / 4 of them: with fewer the stored weight is as fast
PAYS = 16  # tokens for each prompt from which on decoding gains what ordering the weights takes: 16 to 40 steps
TWICE = 4 << 30  # bytes of weights that a model may have twice
LARGEST = 15  # float16 holds what is below 2 to this power, and all bits of a bfloat16 from 2 to the power of -17 on
FAR = 30  # the largest power of two that a weight is moved by: what meets it may be large or small itself
BLOCK = 1 << 18  # numbers looked at in one piece: they stay in a cache, and the first mostly tells
HALF = "linear_dynamic_fp16"  # FBGEMM's product of float32 with float16

Multiply = Callable[[Tensor], Tensor]  # x (..., in) -> x W' + b (..., out)


class Product:
    """Linear layers with one input as one product for mostly `rows` rows at a time; their parameters are views of its
    memory. `twice`: it may have a copy of the weights."""

    def __init__(self, layers: Sequence[nn.Linear], rows: int, twice: bool):
        weight = torch.cat([layer.weight.data for layer in layers]) if len(layers) > 1 else layers[0].weight.data
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        plain = not _has_layouts(weight)
        self.weight = weight.contiguous() if plain or twice or prefers_onednn() else transposed(weight)
        self.multiply = _stored(self.weight, bias) if plain else _fastest(self.weight, bias, rows, twice)
        for layer, part in zip(layers, self.weight.split([layer.out_features for layer in layers]), strict=True):
            layer.weight.data = part

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out of all layers)"""
        return self.multiply(x)


def transposed(weight: Tensor) -> Tensor:
    """The same weight (out, in), its columns one after the other in memory; as it is where it lies so already."""
    return weight.t().contiguous().t()


# ---- ways to multiply


def _fastest(weight: Tensor, bias: Tensor | None, rows: int, twice: bool) -> Multiply:
    if twice and (found := by_half(weight, bias)):
        return found
    if prefers_onednn():
        return by_onednn(weight, bias, rows if twice else None)
    return by_mkl(weight, bias, rows) if twice and torch.backends.mkl.is_available() else _stored(weight, bias)


def prefers_onednn() -> bool:
    """Whether oneDNN is faster than MKL, on processors that somebody has asked."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.backends.mkldnn.is_available()


def _stored(weight: Tensor, bias: Tensor | None) -> Multiply:
    return lambda x: F.linear(x, weight, bias)


def by_half(weight: Tensor, bias: Tensor | None) -> Multiply | None:
    """With a copy in float16, times a power of two; None where that is not exactly the weight."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm") or not hasattr(torch.ops.quantized, HALF):
        return None
    largest = float(torch.linalg.vector_norm(weight, math.inf))
    scale = 2.0 ** max(-FAR, min(FAR, LARGEST - math.frexp(largest)[1]))
    exact = math.isfinite(largest) and all(_is_half(part * scale) for part in weight.flatten().split(BLOCK))
    if not exact:
        return None
    multiply, undo = getattr(torch.ops.quantized, HALF).default, torch.tensor(1 / scale)
    narrows = len(weight) < weight.shape[1]  # the power of two is taken from the narrower side; it rounds nothing
    packed = torch.ops.quantized.linear_prepack_fp16(
        weight * scale, bias * scale if narrows and bias is not None else bias
    )
    if narrows:
        return lambda x: multiply(x, packed).mul_(undo)
    return lambda x: multiply(x * undo, packed)


def _is_half(weight: Tensor) -> bool:
    return torch.equal(weight.half().float(), weight)


def by_onednn(weight: Tensor, bias: Tensor | None, rows: int | None) -> Multiply:
    """With a copy in oneDNN's order for so many rows; None: with the weight as it is."""
    read = weight if rows is None else torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: onednn_product(x, read, bias)


def by_mkl(weight: Tensor, bias: Tensor | None, rows: int) -> Multiply:
    """With a copy in MKL's order; with the stored weight where it is not for that many rows."""
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)

    def multiply(x: Tensor) -> Tensor:
        count = x.numel() // x.shape[-1]
        if not rows < FEW * count <= FEW * rows:
            return F.linear(x, weight, bias)
        flat = x.reshape(count, -1)
        if count < rows:  # the packed order is for this many
            flat = F.pad(flat, (0, 0, 0, rows - count))
        y = torch.ops.mkl._mkl_linear(flat, packed, weight, bias, rows)  # (rows, out)
        return y[:count].view(*x.shape[:-1], -1)

    return multiply


# ---- a model


@torch.no_grad()
def laid_out(model: GPT, rows: int, quantize: str | None = None) -> None:
    """Lay a model's weights out for decoding `rows` rows, and for nothing else from then on. An adapter that comes or
    goes later wants it again (int8: has its update in the whole numbers, for good)."""
    if quantize and model.device.type != "cpu":
        raise UsageError(f"int8 weights decode on the CPU, not on {model.device.type}", hint="device=cpu")
    joined: list[tuple[SelfAttention | MLP, list[Linear]]] = []
    for module in model.modules():
        if isinstance(module, SelfAttention):
            joined.append((module, [module.q, module.k, module.v]))
        elif isinstance(module, MLP) and module.gate:
            joined.append((module, [module.gate, module.up]))
    for module, _ in joined:
        module.joined = None
    if not quantize:  # no product has an adapter beside it
        joined = [(module, layers) for module, layers in joined if all(type(layer) is Linear for layer in layers)]
    among = {layer for _, layers in joined for layer in layers}
    alone = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer not in among
    }
    if quantize:
        _quantize(model, joined, alone)
    else:
        _lay_out(joined, list(alone.values()), rows, sum(p.nbytes for p in model.parameters()) <= TWICE)


def _lay_out(
    joined: Sequence[tuple[SelfAttention | MLP, list[Linear]]], alone: Sequence[nn.Linear], rows: int, twice: bool
) -> None:
    groups = [layers for _, layers in joined] + [[layer] for layer in alone if type(layer) is Linear]
    groups.sort(key=lambda layers: -sum(layer.weight.numel() for layer in layers))  # no thread ends with the head
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # to order one weight is the work of one thread
        made = pool.map(lambda layers: Product(layers, rows, twice), groups)
    products = {layers[0]: product for layers, product in zip(groups, made, strict=True)}
    for module, layers in joined:
        module.joined = products[layers[0]]
    for layer in alone:
        if isinstance(layer, Linear) and layer in products:
            layer.product = products[layer]
        elif _has_layouts(layer.weight):
            layer.weight.data = transposed(layer.weight.data)


def _quantize(
    model: GPT, joined: Sequence[tuple[SelfAttention | MLP, list[Linear]]], alone: dict[str, nn.Linear]
) -> None:
    for module, layers in joined:
        module.joined = Int8Linear(layers)
        for one in layers:  # the model reads them no more
            one.weight = nn.Parameter(one.weight[:0], requires_grad=False)
    for name, layer in alone.items():
        model.set_submodule(name, Int8Linear([layer]))


def _has_layouts(weight: Tensor) -> bool:
    """Whether some order of a weight in memory is known to be faster."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32
