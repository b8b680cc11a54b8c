"""Prefix tuning: trained keys and values before every row, in every layer of a frozen model.

    P_0 .. P_(P-1) x_0 x_1 ...      x_0 stands at position P; the prefix is neither rotated nor normed

While it trains, the prefix may come out of an MLP, P = W2 tanh(W1 E + b1) + b2, of which only the result is kept. It
takes softmax mass from the row even where it is 0: a fresh one changes the model's answers.

Prompt tuning trains the embeddings of P virtual tokens instead. As they see only each other, they are the same before
every row: their keys and values are a prefix, too.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftcli import recipe
from sftcli.errors import UsageError
from sftcli.model.attention import Group, KeepingAttention
from sftcli.model.gpt import GPT, GPTConfig

FRESH = 0.02  # standard deviation of a prefix that was not trained yet


class PrefixTable(nn.Module):
    """A prefix as PEFT stores it: a table (P, 2 L G D)."""

    def __init__(self, config: GPTConfig, table: Tensor, dropout: float = 0.0):
        super().__init__()
        self.length, self.dropout = len(table), dropout
        self.layers, self.heads = config.layers, config.kv_heads
        self.table = nn.Parameter(table)
        self._kept: Tensor | None = None

    def flat(self) -> Tensor:
        """The trained prefix (P, 2 L G D)."""
        return self.table

    def forward(self, model: GPT) -> Tensor:
        """Keys and values (L, 2, G, P, D). Kept while not training."""
        if self._kept is not None and not torch.is_grad_enabled():
            return self._kept
        found = self.computed(model)
        self._kept = None if self.training or torch.is_grad_enabled() else found
        return found

    def computed(self, model: GPT) -> Tensor:
        with torch.autocast(self.table.device.type, enabled=False):  # what is saved later is in float32, too
            flat = F.dropout(self.flat(), self.dropout, self.training)
        return keys_and_values(flat, self.layers, self.heads)

    def train(self, mode: bool = True) -> "PrefixTable":
        self._kept = None
        super().train(mode)
        return self


class PrefixMLP(PrefixTable):
    """A prefix that comes out of an MLP: table (P, C), then a layer of width M and one of width 2 L G D."""

    def __init__(self, config: GPTConfig, options: recipe.Prefix, generator: torch.Generator):
        assert options.mlp
        inner, wide = options.mlp, width_of(config)
        table = torch.randn(options.length, config.width, device="cpu", generator=generator)
        super().__init__(config, table, options.dropout)
        self.inner_weight, self.inner_bias = _drawn(inner, config.width, generator)
        self.outer_weight, self.outer_bias = _drawn(wide, inner, generator)

    def flat(self) -> Tensor:
        inner = torch.tanh(F.linear(self.table, self.inner_weight, self.inner_bias))  # (P, M)
        return F.linear(inner, self.outer_weight, self.outer_bias)


class PromptTable(PrefixTable):
    """Prompt tuning: a table (P, C) of virtual tokens; their keys and values in a model, at positions 0 .. P - 1."""

    def computed(self, model: GPT) -> Tensor:
        attention = KeepingAttention([Group(1, self.length)])
        x = F.dropout(self.table, self.dropout, self.training)
        model.through(x, torch.arange(self.length, device=x.device), attention)
        layers = zip(attention.keys, attention.values, strict=True)
        found = torch.stack([torch.stack([k.float(), v.float()]) for k, v in layers])  # (L, 2, P, G, D)
        return found.transpose(2, 3)


def fresh_prompt(model: GPT, options: recipe.Prompt, generator: torch.Generator) -> PromptTable:
    """Virtual tokens that begin as real ones. Raises UsageError where the model cannot have any."""
    if reason := no_prompt(model.config):
        raise UsageError(f"adapter.kind: no virtual tokens for this model: {reason}", hint="--adapter prefix")
    drawn = torch.randint(model.config.vocab_size, (options.length,), device="cpu", generator=generator)
    table = model.embedding.weight.detach()[drawn.to(model.device)].float() * model.config.embedding_scale
    return PromptTable(model.config, table, options.dropout)


def no_prompt(config: GPTConfig) -> str:
    """Why virtual tokens cannot stand before the rows of a model; empty: they can."""
    if config.turns_by_length:
        return "their rotation would depend on the length of each row"
    if config.embedding_scale != 1.0 and config.norm != "rms_plus_one":  # Gemma's scale is part of its embedding
        return "it multiplies what comes into it"
    return ""


def _drawn(out: int, inside: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a linear layer from U(+-1/sqrt(in))."""
    bound = 1 / math.sqrt(inside)
    weight, bias = (torch.empty(shape, device="cpu") for shape in ((out, inside), (out,)))
    return tuple(nn.Parameter(t.uniform_(-bound, bound, generator=generator)) for t in (weight, bias))  # type: ignore


def width_of(config: GPTConfig) -> int:
    """2 L G D: the numbers of one position of a prefix."""
    return 2 * config.layers * config.kv_heads * config.head_dim


def keys_and_values(flat: Tensor, layers: int, heads: int) -> Tensor:
    """(P, 2 L G D) -> (L, 2, G, P, D): layer l has its keys in slot 2l, its values in slot 2l + 1."""
    return flat.unflatten(1, (layers, 2, heads, -1)).permute(1, 2, 3, 0, 4)


def shortened(config: GPTConfig, options: recipe.Adapter | None) -> GPTConfig:
    """The config of a model with an adapter on it: a prefix takes its positions from the context."""
    if options is None or isinstance(options, recipe.Lora):
        return config
    if options.length >= config.context:
        raise UsageError(f"adapter.length: {options.length}, the model's context is {config.context}")
    return replace(config, context=config.context - options.length)


def attach(model: GPT, prefix: PrefixTable) -> Callable[[], None]:
    """Put a prefix before every row; returns what takes it away again."""
    config = model.config
    model.prefix = prefix if model.device.type == "meta" else prefix.to(model.device)  # on `meta`: both move later
    model.config = replace(config, context=config.context - prefix.length)

    def undo() -> None:
        model.prefix, model.config = None, config

    return undo


def adapt(model: GPT, options: recipe.Prefix | recipe.Prompt, seed: int) -> None:
    """Freeze the model and let only a prefix train."""
    config = model.config
    shortened(config, options)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(options, recipe.Prompt):
        attach(model, fresh_prompt(model, options, generator))
    elif options.mlp:
        attach(model, PrefixMLP(config, options, generator))
    else:
        table = torch.empty(options.length, width_of(config), device="cpu").normal_(std=FRESH, generator=generator)
        attach(model, PrefixTable(config, table, options.dropout))
