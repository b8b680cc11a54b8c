"""Llama (1-3.x, SmolLM2, TinyLlama, Yi): RMSNorm, RoPE, SwiGLU, grouped-query attention. Many families vary it."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import activation, positive, sizes, switch
from sftcli.model.families.ropes import read_rope, turning
from sftcli.model.gpt import GPTConfig

Modules = dict[str, str | tuple[str, ...]]
OUTSIDE = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}
ATTENTION: Modules = {f"self_attn.{name}_proj": f"attention.{name}" for name in ("q", "k", "v", "o")}
MLP: Modules = {f"mlp.{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")}
NORMS: Modules = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
QK_NORMS: Modules = {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}
FUSED_MLP: Modules = {"mlp.gate_up_proj": ("mlp.gate", "mlp.up"), "mlp.down_proj": "mlp.down"}
# norms around attention and around the MLP, as Gemma 2 names them
SANDWICH: Modules = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def switches(
    config: dict[str, Any],
    found: dict[str, Any],
    eps: float = 1e-6,
    tied: bool = False,
    fraction: float | None = None,
) -> dict[str, Any]:
    """What Llama-like families have in common: sizes, RMSNorm, SwiGLU, one rope for all layers (see `read_rope`)."""
    rope = read_rope(config, found["head_dim"], fraction)
    return {
        **turning(found, rope),
        "norm": "rms",
        "norm_eps": positive(config, "rms_norm_eps", eps),
        "activation": activation(config, "hidden_act", "silu"),
        "tied": switch(config, "tie_word_embeddings", tied),
    }


def read_config(config: dict[str, Any]) -> GPTConfig:
    biased = switch(config, "attention_bias", False)
    return GPTConfig(
        **switches(config, sizes(config)),
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=switch(config, "mlp_bias", False),
    )


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | MLP)
