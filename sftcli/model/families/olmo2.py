"""OLMo 2: norms after attention and MLP only, and over all queries and keys before they are split into heads."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import sizes, switch
from sftcli.model.families.llama import ATTENTION, MLP, OUTSIDE, QK_NORMS, Modules, switches
from sftcli.model.gpt import GPTConfig

NORMS: Modules = {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config)
    return GPTConfig(**switches(config, found, eps=1e-5) | after_norms(config))


def after_norms(config: dict[str, Any]) -> dict[str, Any]:
    """What OLMo 2 and 3 differ from Llama by."""
    biased = switch(config, "attention_bias", False)
    return {"placement": "post", "qk_norm": "width", "qkv_bias": biased, "output_bias": biased}


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | QK_NORMS | MLP)
