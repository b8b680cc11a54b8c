"""GLM-4-0414: glm with norms after attention and MLP, too."""

from typing import Any

from sftcli.model.families import Family, glm
from sftcli.model.families.llama import ATTENTION, FUSED_MLP, OUTSIDE, Modules
from sftcli.model.gpt import GPTConfig

NORMS: Modules = {
    "input_layernorm": "attention_norm",
    "post_self_attn_layernorm": "attention_post_norm",
    "post_attention_layernorm": "mlp_norm",  # before the MLP, unlike Gemma 2's of this name
    "post_mlp_layernorm": "mlp_post_norm",
}


def read_config(config: dict[str, Any]) -> GPTConfig:
    return GPTConfig(**glm.switches(config), placement="sandwich")


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | FUSED_MLP)
