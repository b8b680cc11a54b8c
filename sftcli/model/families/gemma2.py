"""Gemma 2: Gemma with norms before and after, soft caps, a scale of its own, every other layer sliding."""

from typing import Any

from sftcli.model.families import Family, gemma
from sftcli.model.families.config import layer_types, limit, positive, sizes, windows
from sftcli.model.families.llama import ATTENTION, MLP, OUTSIDE, SANDWICH
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config, context=8192, kv_heads=4, head_dim=256)
    default = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(found["layers"])]
    return GPTConfig(
        **gemma.switches(config, found),
        placement="sandwich",
        windows=windows(config, layer_types(config, found["layers"], default), default=4096),
        attention_scale=positive(config, "query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=limit(config, "attn_logit_softcapping", 50.0),
        logit_cap=limit(config, "final_logit_softcapping", 30.0),
    )


FAMILY = Family(read_config, OUTSIDE, SANDWICH | ATTENTION | MLP)
