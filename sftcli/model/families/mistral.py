"""Mistral: Llama with a sliding window on every layer; an absent sliding_window means 4096, null means none."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import sizes, windows
from sftcli.model.families.llama import ATTENTION, MLP, NORMS, OUTSIDE, switches
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config, kv_heads=8, context=131072)
    return GPTConfig(
        **switches(config, found), windows=windows(config, ["sliding_attention"] * found["layers"], default=4096)
    )


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | MLP)
