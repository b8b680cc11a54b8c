"""The one model: a decoder-only GPT.

    x -> norm -> attention -> + x -> norm -> MLP -> + x

Shapes: T tokens laid end to end (or B, Q in decoding), C width, H heads, G key heads, D head width, V vocabulary.
How tokens see each other is not decided here: forward takes an `Attention` (attention.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sftcli.model.attention import Attention
from sftcli.model.batches import Batch
from sftcli.model.loss import LossSum, projected_loss

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class GPTConfig:
    """The switches that families set. Sizes in numbers of units; `context` is the most tokens of one row."""

    vocab_size: int
    context: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    positions: Literal["rope", "learned"]
    rope_theta: float
    gated: bool  # MLP with a gate (SwiGLU) instead of two plain layers
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def norm_of(config: GPTConfig) -> nn.Module:
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.width, eps=config.norm_eps)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (..., 1, D) in float32 of each position, for the half-split pairs (i, i + D/2)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None, None].float() * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x (..., heads, D) by the angles of a rotary table."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class SelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.width, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(config.heads * config.head_dim, config.width, bias=config.output_bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attention: Attention) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))  # (..., H or G, D)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.o(attention(self.layer, q, k, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias) if config.gated else None
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention_norm, self.attention = norm_of(config), SelfAttention(config, layer)
        self.mlp_norm, self.mlp = norm_of(config), MLP(config)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attention: Attention) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, attention))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """Embedding, blocks, norm, head. Built without values: load a checkpoint or call `initialise`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.dropout = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = norm_of(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.gradient_checkpointing = False

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def hidden(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Final hidden states (..., C) of ids (...) at positions (...)."""
        x = self.embedding(ids)
        if self.position is not None:
            x = x + self.position(positions)
        rotary = None
        if self.config.positions == "rope":
            rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        x = self.dropout(x)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rotary, attention, use_reentrant=False)
            else:
                x = block(x, rotary, attention)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) in float32."""
        return self.head(hidden).float()

    def forward(self, batch: Batch) -> dict[str, LossSum]:
        """The losses of a batch by name, each a sum and a weight; only labelled positions are projected."""
        x = self.hidden(batch.ids, batch.positions, batch.attention)
        found = projected_loss(x[batch.scored], self.head.weight, self.head.bias, batch.targets, batch.weights)
        return {"nll": found}

    def set_dropout(self, p: float) -> None:
        """Dropout on the embedding and on what each block adds (not on attention weights)."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p

    def initialise(self, seed: int) -> None:
        """Draw weights: N(0, 0.02), the layers that write into the residual stream 1/sqrt(2 L) of it (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = residual if name.endswith(("attention.o.weight", "mlp.down.weight")) else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
            else:
                nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)
