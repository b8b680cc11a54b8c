"""The one model: a GPT.

    x -> [norm] -> attention -> [norm] -> + x -> [norm] -> MLP -> [norm] -> + x

BERT's norms are elsewhere: one on the embedding, and x -> attention -> + x -> norm -> MLP -> + x -> norm.

Shapes: T tokens laid end to end (or B, Q in decoding), C width, H heads, G key heads, D head width, V vocabulary.
How tokens see each other is not decided here: forward takes an `Attention` (attention.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sftcli.model.attention import Attention, Prefix, Prefixed, Sight
from sftcli.model.batches import Batch
from sftcli.model.linear import Linear, of_one_input
from sftcli.model.loss import PLAIN, LossSum, projected_loss, scaled_and_capped
from sftcli.model.pieces import ACTIVATIONS, embed, gated, rms_norm
from sftcli.model.rope import Rope, RotaryTable, rotary_table, rotate_
from sftcli.recipe import Loss

TOKEN_TYPES = 2  # that masked LM adds: the halves of a pair

Joined = Callable[[Tensor], Tensor]  # layers with one input in one product (layout.py): q | k | v, gate | up


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

    norm: Literal["rms", "rms_plus_one", "layer", "layer_bare"]  # plus one: x / rms(x) * (1 + w); bare: no parameters
    norm_eps: float
    # norms before attention and MLP, after them, or both; `sum`: on x + what they add (BERT), none at the end
    placement: Literal["pre", "post", "sandwich", "sum"] = "pre"
    residual: Literal["sequential", "parallel", "parallel_shared"] = "sequential"  # shared: one norm for both branches

    gated: bool = True  # MLP with a gate (SwiGLU) instead of two plain layers
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied: bool = False

    learned_positions: bool = False
    ropes: tuple[Rope | None, ...] = ()  # a layer each; None: no rotation
    windows: tuple[int | None, ...] = ()  # a layer each; None: sees all. Empty: no layer has one
    qk_norm: Literal["head", "width"] | None = None  # of each head, or of all together before they are split
    qkv_clip: float | None = None
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_cap: float | None = None

    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_scale: float = 1.0
    logit_cap: float | None = None

    embedding_norm: bool = False
    head_transform: bool = False  # a dense layer, activation and norm before the head

    # what an objective may add to any family (BERT's has all but the first)
    block_positions: bool = False  # a second table of positions, which rows with block_position_ids need
    token_types: int = 0  # rows of the table that rows with token_type_ids need
    nsp_head: bool = False  # a pooler and two classes: whether the second half of a row follows the first

    @property
    def fills_masks(self) -> bool:
        """Whether the model has learned masked LM: its rows see all of themselves."""
        return self.token_types > 0

    @property
    def turns_by_length(self) -> bool:
        """Whether rotary positions of some layer depend on how long the row is."""
        return any(rope is not None and rope.by_length for rope in self.ropes)

    def rope(self, layer: int) -> Rope | None:
        return self.ropes[layer] if self.ropes else None

    def sight(self, layer: int) -> Sight:
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return Sight(layer, scale, self.windows[layer] if self.windows else None, self.attention_cap)


class Embedding(nn.Embedding):
    """nn.Embedding without values at first."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight)."""

    def __init__(self, width: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight + self.offset if self.offset else self.weight, self.eps)


def norm_of(config: GPTConfig, width: int) -> nn.Module:
    if config.norm in ("rms", "rms_plus_one"):
        return RMSNorm(width, config.norm_eps, offset=float(config.norm == "rms_plus_one"))
    return nn.LayerNorm(width, eps=config.norm_eps, elementwise_affine=config.norm == "layer")


class SelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.sight, self.head_dim = config.sight(layer), config.head_dim
        self.clip, self.norms_heads = config.qkv_clip, config.qk_norm == "head"
        self.plain = not config.qk_norm and config.qkv_clip is None  # nothing between the products and the rotation
        self.counts = [config.heads, config.kv_heads, config.kv_heads]
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.width, queries, bias=config.qkv_bias)
        self.k = Linear(config.width, keys, bias=config.qkv_bias)
        self.v = Linear(config.width, keys, bias=config.qkv_bias)
        self.o = Linear(queries, config.width, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = norm_of(config, config.head_dim if self.norms_heads else queries)
            self.k_norm = norm_of(config, config.head_dim if self.norms_heads else keys)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        self.joined: Joined | None = None

    def forward(
        self, x: Tensor, rotary: RotaryTable | None, attention: Attention, only: Tensor | None = None
    ) -> Tensor:
        if self.joined and self.plain:
            heads = self.joined(x).unflatten(-1, (-1, self.head_dim))  # (..., H + 2 G, D)
            if rotary is not None:  # decoding feels each call: q and k at once
                rotate_(heads[..., : -self.counts[-1], :], rotary)
            q, k, v = heads.split(self.counts, -2)
        else:
            q, k, v = self._projected(x)
            if rotary is not None:
                q, k = rotate_(q, rotary), rotate_(k, rotary)
        mixed = attention(self.sight, q, k, v).flatten(-2)
        return self.o(mixed if only is None else mixed[only])

    def _projected(self, x: Tensor) -> list[Tensor]:
        """q (..., H, D), k and v (..., G, D)."""
        sizes = [count * self.head_dim for count in self.counts]
        parts = self.joined(x).split(sizes, -1) if self.joined else of_one_input(x, (self.q, self.k, self.v))
        if self.clip is not None:
            parts = [t.clamp(-self.clip, self.clip) for t in parts]
        q, k, v = parts
        if not self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        return [q, k, v]


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = Linear(config.width, config.mlp_width, bias=config.mlp_bias) if config.gated else None
        self.up = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = Linear(config.mlp_width, config.width, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]
        self.joined: Joined | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        gate, up = self.joined(x).chunk(2, -1) if self.joined else of_one_input(x, (self.gate, self.up))
        return of_one_input(gated(gate, up, self.activation), (self.down,))[0]


class Block(nn.Module):
    """Attention and MLP, one after the other or side by side, each adding to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()

        def norm(used: bool) -> nn.Module:
            return norm_of(config, config.width) if used else nn.Identity()

        before, after = config.placement in ("pre", "sandwich"), config.placement != "pre"
        self.norms_sum = config.placement == "sum"
        self.parallel, self.shared = config.residual != "sequential", config.residual == "parallel_shared"
        self.scale = config.residual_scale
        self.attention_norm, self.attention = norm(before), SelfAttention(config, layer)
        self.attention_post_norm = norm(after)
        self.mlp_norm, self.mlp = norm(before and not self.shared), MLP(config)
        self.mlp_post_norm = norm(after)
        self.dropout = nn.Dropout(0.0)

    def forward(
        self, x: Tensor, rotary: RotaryTable | None, attention: Attention, only: Tensor | None = None
    ) -> Tensor:
        """`only` (N,): which tokens of x (T, C) the result (N, C) is wanted of; all still are attended to."""
        seen = x if self.norms_sum else self.attention_norm(x)
        attended = self.attention(seen, rotary, attention, only)
        if only is not None:
            x, seen = x[only], seen[only] if self.shared else seen
        if self.norms_sum:
            x = self.attention_post_norm(x + self._dropped(attended))
            return self.mlp_post_norm(x + self._dropped(self.mlp(x)))
        attended = self.attention_post_norm(attended)
        sum_ = self._plus(x, attended)
        if not self.parallel:
            x = sum_
        thought = self.mlp_post_norm(self.mlp(seen if self.shared else self.mlp_norm(x)))
        return self._plus(sum_, thought)

    def _plus(self, x: Tensor, more: Tensor) -> Tensor:
        """x with what is added to it, in the place of the latter, which nothing else needs."""
        more = self._dropped(more)
        return more.add_(x) if self.scale == 1.0 and more.dtype == x.dtype else torch.add(x, more, alpha=self.scale)

    def _dropped(self, x: Tensor) -> Tensor:
        return self.dropout(x) if self.training else x  # decoding feels each call of a module


class Transform(nn.Module):
    """What BERT puts between the blocks and the head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dense, self.norm = Linear(config.width, config.width), norm_of(config, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))


class GPT(nn.Module):
    """Embedding, blocks, norm, head. Built without values: load a checkpoint or call `initialise`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.position = Embedding(config.context, config.width) if config.learned_positions else None
        self.dropout = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.Identity() if config.placement == "sum" else norm_of(config, config.width)
        self.embedding_norm = norm_of(config, config.width) if config.embedding_norm else nn.Identity()
        self.transform = Transform(config) if config.head_transform else nn.Identity()
        self.head = Linear(config.width, config.vocab_size, bias=config.head_bias)
        if config.tied:
            self.head.weight = self.embedding.weight
        # last, so that a seed draws the other weights as it does without it
        self.block_position = Embedding(config.context, config.width) if config.block_positions else None
        self.token_type = Embedding(config.token_types, config.width) if config.token_types else None
        self.pooler = Linear(config.width, config.width) if config.nsp_head else None
        self.nsp = Linear(config.width, 2) if config.nsp_head else None
        self.prefix: Prefix | None = None  # an adapter puts it here
        self.gradient_checkpointing = False

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def can_share(self) -> bool:
        """Whether a beginning is the same in every row that has it, but for dropout and noise (flash.py)."""
        alike = self.prefix is None and not self.config.turns_by_length
        served = self.device.type == "cpu" and not any(self.config.windows) and self.config.attention_cap is None
        return alike and served

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        attention: Attention,
        blocks: Tensor | None = None,
        noise: Tensor | None = None,
        types: Tensor | None = None,
        only: Tensor | None = None,
        head: list[Tensor] | None = None,
    ) -> Tensor:
        """Final hidden states (..., C) of ids (...) at positions (...), counted from the end of a prefix.

        `blocks`, `types` (...): block positions and token types, None: all 0. `noise` is added to the embedding's rows.
        `only` (N,): the tokens of ids (T,) whose hidden states (N, C) are wanted. `head`: see `embed`.
        """
        if self.prefix is not None:
            attention, positions = Prefixed(attention, self.prefix(self)), positions + self.prefix.length
        embedded = self.embedding(ids) if head is None else embed(ids, self.embedding.weight, head)
        x = embedded.float()  # the residual stream stays float32 whatever the weights are kept in
        if noise is not None:
            x = x + noise
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        return self.through(x, positions, attention, blocks, types, only)

    def through(
        self,
        x: Tensor,
        positions: Tensor,
        attention: Attention,
        blocks: Tensor | None = None,
        types: Tensor | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states of tokens that are embedded already (..., C)."""
        if self.position is not None:
            x = x + self.position(positions)
        if self.block_position is not None:
            x = x + self.block_position(torch.zeros_like(positions) if blocks is None else blocks)
        elif blocks is not None:
            raise ValueError("this model has no table of block positions")
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(positions) if types is None else types)
        elif types is not None:
            raise ValueError("this model has no table of token types")
        tables = self._rotary_tables(positions, attention)
        x = self.dropout(self.embedding_norm(x))
        for layer, block in enumerate(self.blocks):
            rope = self.config.rope(layer)
            rotary = None if rope is None else tables[rope]
            wanted = only if layer == len(self.blocks) - 1 else None
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rotary, attention, wanted, use_reentrant=False)
            else:
                x = block(x, rotary, attention, wanted)
        return self.norm(x)

    def _rotary_tables(self, positions: Tensor, attention: Attention) -> dict[Rope, RotaryTable]:
        """One table for each kind of rope that the layers have."""
        kinds = {rope for rope in self.config.ropes if rope is not None}
        lengths = attention.lengths.to(positions.device) if self.config.turns_by_length else None
        return {rope: rotary_table(rope, positions, lengths) for rope in kinds}

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) in float32."""
        logits = self.head(self.transform(hidden)).float()
        scaled_and_capped(logits, self.config.logit_scale, self.config.logit_cap)
        return logits

    def forward(self, batch: Batch, loss: Loss = PLAIN, noise: Tensor | None = None) -> dict[str, LossSum]:
        """The losses of a batch by name, each a sum and a weight; only labelled positions are projected."""
        count, only = len(batch.scored), torch.cat([batch.scored, batch.starts])
        head: list[Tensor] | None = [] if self._adds_to_head() else None
        hidden = self.hidden(batch.ids, batch.positions, batch.attention, batch.blocks, noise, batch.types, only, head)
        x = self.transform(hidden[:count])
        scale, cap = self.config.logit_scale, self.config.logit_cap
        found = projected_loss(
            x, self.head.weight, self.head.bias, batch.targets, batch.weights, scale, cap, loss, head
        )
        if batch.pairs is None:
            return {"nll": found}
        if self.pooler is None or self.nsp is None:
            raise ValueError("this model has no head for next sentences")
        pooled = torch.tanh(self.pooler(hidden[count:]))  # (rows, C)
        labelled = torch.ones(len(pooled), device=pooled.device)
        return {"mlm": found, "nsp": projected_loss(pooled, self.nsp.weight, self.nsp.bias, batch.pairs, labelled)}

    def _adds_to_head(self) -> bool:
        """Whether the embedding can add its gradient to that of the head: one table that learns, on a CPU (others add
        rows in any order)."""
        weight = self.embedding.weight
        one = weight is self.head.weight and weight.requires_grad and torch.is_grad_enabled()
        return one and weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")

    def set_dropout(self, p: float) -> None:
        """Dropout on the embedding and on what each block adds (not on attention weights)."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p

    def initialise(self, seed: int) -> None:
        """Draw weights: N(0, 0.02), the layers that write into the residual stream 1/sqrt(2 L) of it (GPT-2).

        Where each sum is normed nothing grows with the layers, and 0.02 are for BERT's width of 768."""
        generator = torch.Generator().manual_seed(seed)
        normed = self.config.placement == "sum"
        plain = 0.02 * math.sqrt(768 / self.config.width) if normed else 0.02
        residual = plain if normed else plain / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = residual if name.endswith(("attention.o.weight", "mlp.down.weight")) else plain
                nn.init.normal_(parameter, std=std, generator=generator)
            else:
                one = 0.0 if self.config.norm == "rms_plus_one" else 1.0
                nn.init.constant_(parameter, one if name.endswith("norm.weight") else 0.0)
