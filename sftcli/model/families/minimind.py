"""MiniMind: a Qwen 3 of its own name, tied, whose heads share the width evenly. Its MoE variant is refused."""

from typing import Any

from sftcli.model.families import Family, qwen3
from sftcli.model.families.config import refuse, required
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    refuse(config, use_moe=(False,), inference_rope_scaling=(False,))
    width, heads = required(config, "hidden_size"), required(config, "num_attention_heads")
    defaults = {
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 4,
        "head_dim": width // heads if type(width) is type(heads) is int and heads > 0 else None,
    }
    return qwen3.read_config(defaults | config)


FAMILY = Family(read_config, qwen3.FAMILY.outside, qwen3.FAMILY.layer)
