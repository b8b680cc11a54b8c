"""OLMo: Llama with LayerNorms that have no parameters; q, k, v may be clipped."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import limit, sizes, switch
from sftcli.model.families.llama import ATTENTION, MLP, NORMS, OUTSIDE, switches
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config)
    biased = switch(config, "attention_bias", False)
    return GPTConfig(
        **switches(config, found) | {"norm": "layer_bare", "norm_eps": 1e-5},
        qkv_clip=limit(config, "clip_qkv"),
        qkv_bias=biased,
        output_bias=biased,
    )


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | MLP)
