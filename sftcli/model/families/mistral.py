"""Mistral: Llama with a sliding window on every layer, or (Ministral) on those that layer_types names; an absent
sliding_window means 4096, null means none."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import layer_types, sizes, windows
from sftcli.model.families.llama import ATTENTION, MLP, NORMS, OUTSIDE, switches
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config, kv_heads=8, context=131072)
    kinds = layer_types(config, found["layers"], ["sliding_attention"] * found["layers"])
    return GPTConfig(**switches(config, found), windows=windows(config, kinds, default=4096))


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | MLP)
