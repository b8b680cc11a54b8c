"""GLM-4-9B in transformers' form: interleaved RoPE on half of each head, biases on q, k, v, gate and up fused."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import activation, positive, sizes, switch
from sftcli.model.families.llama import ATTENTION, FUSED_MLP, NORMS, OUTSIDE
from sftcli.model.families.ropes import read_rope, turning
from sftcli.model.gpt import GPTConfig


def switches(config: dict[str, Any]) -> dict[str, Any]:
    """What glm and glm4 have in common."""
    found = sizes(config, context=131072, kv_heads=2, head_dim=128)
    rope = read_rope(config, found["head_dim"], fraction=0.5, interleaved=True)
    return turning(found, rope) | {
        "norm": "rms",
        "norm_eps": positive(config, "rms_norm_eps", 1.5625e-7),
        "activation": activation(config, "hidden_act", "silu"),
        "qkv_bias": switch(config, "attention_bias", True),
        "tied": switch(config, "tie_word_embeddings", False),
    }


def read_config(config: dict[str, Any]) -> GPTConfig:
    return GPTConfig(**switches(config))


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | FUSED_MLP)
