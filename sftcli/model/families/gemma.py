"""Gemma: norms scale by 1 + w, embeddings by sqrt(width), the gate is GELU (tanh); in the first one always."""

from typing import Any

from sftcli.errors import CheckpointError
from sftcli.model.families import Family
from sftcli.model.families.config import activation, refuse, sizes, switch
from sftcli.model.families.llama import ATTENTION, MLP, NORMS, OUTSIDE
from sftcli.model.families.llama import switches as llama_switches
from sftcli.model.gpt import GPTConfig

GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # "gelu" in old configs means the tanh form, too


def switches(config: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What all Gemmas have in common."""
    refuse(config, use_bidirectional_attention=(None, False))
    biased = switch(config, "attention_bias", False)
    return llama_switches(config | {"hidden_act": None}, found, tied=True) | {
        "norm": "rms_plus_one",
        "activation": activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        "embedding_scale": found["width"] ** 0.5,
        "qkv_bias": biased,
        "output_bias": biased,
    }


def read_config(config: dict[str, Any]) -> GPTConfig:
    for key in ("hidden_activation", "hidden_act"):
        if config.get(key) is not None and config[key] not in GELUS:
            raise CheckpointError(f"config.json: {key} = {config[key]!r} is not supported")
    found = sizes(config, context=8192, kv_heads=16, head_dim=256)
    return GPTConfig(**switches(config | {"hidden_activation": None}, found))


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | MLP)
