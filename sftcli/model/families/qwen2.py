"""Qwen 2 and 2.5: Llama with biases on q, k, v; later layers may slide."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import layer_types, size, sizes, switch, windows
from sftcli.model.families.llama import ATTENTION, MLP, NORMS, OUTSIDE, switches
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config, context=32768)
    return GPTConfig(**switches(config, found), qkv_bias=True, windows=later_windows(config, found["layers"]))


def later_windows(config: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    """Windows only where use_sliding_window says so, from layer max_window_layers on."""
    if not switch(config, "use_sliding_window", False):
        return ()
    first = size(config, "max_window_layers", 28) if config.get("max_window_layers") != 0 else 0
    later = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    return windows(config, layer_types(config, layers, later), default=4096)


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | MLP)
