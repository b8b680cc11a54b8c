"""What a step has to multiply, in FLOP: the blocks all tokens, the head those with a label, nothing padding.

What stands before rows (a prefix, a prompt) and the head for pairs are left out. However a step is computed, this is
its work: what is computed again (gradient checkpointing) does not count, so that FLOP a second compares runs; its
share of what a GPU can do is what others call MFU (arXiv 2204.02311).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sftcli.model.adapters.lora import LoraLinear
from sftcli.model.gpt import GPT

# FLOP/s of dense products in bfloat16, of the maker's data sheets; the first name that is among the device's words
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090 Ti": 80e12,
    "RTX 3090": 71e12,
}
LESS = re.compile(r"\b(MIG|Laptop|D)\b")  # in the name of a part of a device, or of a smaller one


@dataclass(frozen=True)
class Work:
    """FLOP of a model's step, forward and backward."""

    token: int  # products with the weights of the blocks
    label: int  # and of what comes after them
    sight: tuple[tuple[int, int | None], ...]  # of each layer: of a token and one that it sees; its window

    def of(self, lengths: Sequence[int], labels: int) -> int:
        """Of a step over rows of these lengths, with so many labels."""
        seen = sum(flop * seen_by_all(n, window) for flop, window in self.sight for n in lengths)
        return self.token * sum(lengths) + self.label * labels + seen


def work_of(model: GPT) -> Work:
    """2 FLOP forward for each token and weight, 2 for the gradient of the input unless nothing before it learns, and 2
    where the weight learns. Attention: two products forward, four backward."""
    tables = (model.embedding, model.position, model.block_position, model.token_type, model.embedding_norm)
    learned = model.prefix is not None or any(_learns(table) for table in tables if table is not None)
    token, sight = 0, []
    for number, block in enumerate(model.blocks):
        # a block's own weights: those that come first in it would need no gradient of the input, which is left alone
        learned = learned or _learns(block)
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
        token += sum(_flop(layer, learned) for layer in layers) + _flop_of_adapters(layers)
        width, window = model.config.heads * model.config.head_dim, model.config.sight(number).window
        sight.append((4 * width * (3 if learned else 1), window))
    after = [model.head, *(m for m in model.transform.modules() if isinstance(m, nn.Linear))]
    return Work(token, sum(_flop(layer, learned) for layer in after), tuple(sight))


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _flop(layer: nn.Linear, learned: bool) -> int:
    """Of one token."""
    return layer.weight.numel() * (2 + 2 * learned + 2 * layer.weight.requires_grad)


def _flop_of_adapters(layers: Sequence[nn.Linear]) -> int:
    """Of one token; layers may share an A."""
    updates = [layer for layer in layers if isinstance(layer, LoraLinear)]
    shared = {id(layer.lora_A): layer.lora_A.numel() for layer in updates}
    return 6 * (sum(shared.values()) + sum(layer.lora_B.numel() for layer in updates))


def seen_by_all(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included, in a causal row (others, as masked LM's, have more)."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + window * (length - window)


def peak_of(device: torch.device) -> float | None:
    """FLOP/s of bfloat16 that a device can do; None where we do not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = (peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name))
    return None if LESS.search(name) else next(known, None)
