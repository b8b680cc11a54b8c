"""GPT-Neo: GPT-2 with plain linear layers, no scale on scores, and every other layer local."""

from typing import Any

from sftcli.errors import CheckpointError
from sftcli.model.families import Family
from sftcli.model.families.config import activation, positive, size, sizes, switch
from sftcli.model.families.gpt2 import OUTSIDE
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config, layers="num_layers", heads="num_heads", takes_head_dim=False)
    return GPTConfig(
        **found,
        norm="layer",
        norm_eps=positive(config, "layer_norm_epsilon", 1e-5),
        learned_positions=True,
        windows=_windows(config, found["layers"]),
        attention_scale=1.0,
        gated=False,
        activation=activation(config, "activation_function", "gelu_new"),
        output_bias=True,
        mlp_bias=True,
        tied=switch(config, "tie_word_embeddings", True),
    )


def _windows(config: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    """attention_types: [[["global", "local"], 12]] means 12 times global, local."""
    kinds: list[str] = []
    try:
        for names, times in config.get("attention_types") or [[["global", "local"], layers // 2]]:
            kinds += list(names) * min(times, layers)
    except (TypeError, ValueError):
        raise CheckpointError("config.json: attention_types is not a list of [names, times]") from None
    if len(kinds) != layers or not set(kinds) <= {"global", "local"}:
        raise CheckpointError(f"config.json: attention_types does not say global or local of the {layers} layers")
    window = size(config, "window_size", 256)
    return tuple(window if kind == "local" else None for kind in kinds)


FAMILY = Family(
    read_config,
    OUTSIDE,
    layer={
        "ln_1": "attention_norm",
        **{f"attn.attention.{name}_proj": f"attention.{name}" for name in ("q", "k", "v")},
        "attn.attention.out_proj": "attention.o",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    },
    layers="transformer.h.{}.",
    buffers=(".attn.attention.bias", ".attn.attention.masked_bias"),
)
