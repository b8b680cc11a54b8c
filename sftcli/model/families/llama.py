"""Llama (1-3.x, SmolLM2, TinyLlama, Yi): RMSNorm, RoPE, SwiGLU, grouped-query attention."""

from typing import Any

from sftcli.errors import CheckpointError
from sftcli.model.families import Stored, refuse, required
from sftcli.model.gpt import GPTConfig

BUFFERS = ("rotary_emb.inv_freq",)


def read_config(config: dict[str, Any]) -> GPTConfig:
    refuse(config, hidden_act=("silu", "swish"), pretraining_tp=(1,))
    heads = required(config, "num_attention_heads")
    width = required(config, "hidden_size")
    attention_bias = bool(config.get("attention_bias", False))
    return GPTConfig(
        vocab_size=required(config, "vocab_size"),
        context=config.get("max_position_embeddings", 2048),
        layers=required(config, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        mlp_width=required(config, "intermediate_size"),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        positions="rope",
        rope_theta=rope_theta(config),
        gated=True,
        activation="silu",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def rope_theta(config: dict[str, Any]) -> float:
    """From rope_parameters (transformers >= 5) or the older top-level keys; scaled kinds are refused."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise CheckpointError(f"config.json: RoPE scaling {kind!r} is not supported")
    return float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)


def tensors(config: GPTConfig) -> list[Stored]:
    found = [Stored("model.embed_tokens.weight", ("embedding.weight",)), Stored("model.norm.weight", ("norm.weight",))]
    if not config.tied:
        found.append(Stored("lm_head.weight", ("head.weight",)))
    for n in range(config.layers):
        theirs, ours = f"model.layers.{n}.", f"blocks.{n}."
        found.append(Stored(theirs + "input_layernorm.weight", (ours + "attention_norm.weight",)))
        found.append(Stored(theirs + "post_attention_layernorm.weight", (ours + "mlp_norm.weight",)))
        for name in ("q", "k", "v", "o"):
            kinds = ("weight", "bias") if config.qkv_bias else ("weight",)
            found += [Stored(f"{theirs}self_attn.{name}_proj.{k}", (f"{ours}attention.{name}.{k}",)) for k in kinds]
        for name in ("gate", "up", "down"):
            kinds = ("weight", "bias") if config.mlp_bias else ("weight",)
            found += [Stored(f"{theirs}mlp.{name}_proj.{k}", (f"{ours}mlp.{name}.{k}",)) for k in kinds]
    return found


def upstream_name(name: str) -> str:
    return name
