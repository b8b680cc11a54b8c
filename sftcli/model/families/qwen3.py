"""Qwen 3: Llama with RMS norms on each head's queries and keys."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import sizes, switch
from sftcli.model.families.llama import ATTENTION, MLP, NORMS, OUTSIDE, QK_NORMS, switches
from sftcli.model.families.qwen2 import later_windows
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config, context=32768, head_dim=128)
    biased = switch(config, "attention_bias", False)
    return GPTConfig(
        **switches(config, found),
        qk_norm="head",
        qkv_bias=biased,
        output_bias=biased,
        windows=later_windows(config, found["layers"]),
    )


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | QK_NORMS | MLP)
