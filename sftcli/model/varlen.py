"""Rows laid end to end in one kernel call: FlashAttention over rows of any lengths (arXiv 2307.08691), on GPUs.

Whether it is there and right depends on the processor, torch's version, the dtype and the heads: it is used only after
a small example, forward and backward, has come out as plain attention has it.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Window = tuple[int, int]  # how many tokens before itself and after itself a query sees; -1: all

DEVICES, DTYPES = ("cuda",), (torch.bfloat16, torch.float16)
EXAMPLE = (3, 1, 6)  # lengths of rows
WINDOWS: tuple[Window, ...] = ((-1, 0), (1, 0), (-1, -1), (1, -1))
NEAR = 0.03  # of the largest number: what rounding to 8 bits makes of an example


def ends_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where rows of these lengths begin, and where the last one ends: (rows + 1,) int32."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, pin_memory=device.type == "cuda")
    return ends.to(device, non_blocking=True)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, window: Window, scale: float) -> Tensor:
    """q (T, H, D), k and v (T, G, D) of rows that lie as `ends` tells, the longest of `longest` tokens -> (T, H, D)."""
    from torch.nn.attention.varlen import varlen_attn  # late: old versions lack it, and a CPU never needs it

    grouped = q.shape[1] != k.shape[1]
    found = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=window, enable_gqa=grouped)
    return cast(Tensor, found)  # asked for more, it returns more


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether `attend_rows` can be asked for these queries (T, H, D) and keys (T, G, D)."""
    if q.device.type not in DEVICES or q.dtype not in DTYPES or torch.are_deterministic_algorithms_enabled():
        return False
    return _is_right(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2])


@cache
def _is_right(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> bool:
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), _unnoticed():
        generator = torch.Generator().manual_seed(0)
        shapes = [(sum(EXAMPLE), n, width) for n in (heads, kv_heads, kv_heads, heads)]
        q, k, v, weights = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        ends, inputs = ends_of(EXAMPLE, device), [t.requires_grad_() for t in (q, k, v)]
        try:
            for window in WINDOWS:
                found = attend_rows(q, k, v, ends, max(EXAMPLE), window, width**-0.5)
                ours = [found, *torch.autograd.grad(found, inputs, weights)]
                plain = _plain(q, k, v, window, width**-0.5)
                theirs = [plain, *torch.autograd.grad(plain, inputs, weights.float())]
                if not all(_is_near(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)):
                    return False
        except torch.OutOfMemoryError:
            raise  # which says nothing of the kernel
        except (ImportError, TypeError, ValueError, RuntimeError):  # none here, an older one, or not for this processor
            return False
    return True


def _unnoticed() -> saved_tensors_hooks:
    """So that a layer under gradient checkpointing, in which the example may run, does not count what it keeps."""
    return saved_tensors_hooks(lambda kept: kept.detach(), lambda kept: kept)


def _plain(q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float) -> Tensor:
    """The example by a matrix of who sees whom, in float32."""
    index = torch.arange(len(q), device=q.device)
    row = torch.repeat_interleave(torch.arange(len(EXAMPLE)), torch.tensor(EXAMPLE)).to(q.device)
    before, after = index[:, None] - index[None], index[None] - index[:, None]
    seen = row[:, None] == row[None]
    for distance, most in zip((before, after), window, strict=True):
        seen &= (distance <= most) | (most < 0)
    q, k, v = (t.float().transpose(0, 1) for t in (q, k, v))  # (heads, T, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).transpose(0, 1)


def _is_near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= NEAR * b.abs().max())  # a nan is not near
