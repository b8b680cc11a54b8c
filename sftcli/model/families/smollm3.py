"""SmolLM 3: Llama where every fourth layer has no rotary positions (and may have a window instead)."""

from typing import Any

from sftcli.errors import CheckpointError
from sftcli.model.families import Family
from sftcli.model.families.config import layer_types, size, sizes, switch, windows
from sftcli.model.families.llama import ATTENTION, MLP, NORMS, OUTSIDE, switches
from sftcli.model.families.ropes import reach, read_rope
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config, context=32768, kv_heads=4)
    layers = found["layers"]
    rotates = _rotates(config, layers)
    rope = read_rope(config, found["head_dim"], theta=2e6)
    kinds = ["full_attention"] * layers
    if switch(config, "use_sliding_window", False):
        kinds = ["full_attention" if rotating else "sliding_attention" for rotating in rotates]
    biased = switch(config, "attention_bias", False)
    common = switches(config, found, tied=True) | {
        "context": reach(rope, found["context"]),
        "ropes": tuple(rope if rotating else None for rotating in rotates),
    }
    return GPTConfig(
        **common,
        windows=windows(config, layer_types(config, layers, kinds)),
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=switch(config, "mlp_bias", False),
    )


def _rotates(config: dict[str, Any], layers: int) -> list[bool]:
    """Whether each layer has RoPE: in no_rope_layers 1 means that it has."""
    listed = config.get("no_rope_layers")
    if listed is None:
        every = size(config, "no_rope_layer_interval", 4)
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers:
        raise CheckpointError(f"config.json: no_rope_layers does not tell of the {layers} layers")
    return [bool(value) for value in listed]


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | MLP)
