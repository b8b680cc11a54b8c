"""Gemma 3 (text): Gemma 2 with norms on queries and keys, five sliding layers for each that sees all, two ropes."""

from typing import Any

from sftcli.model.families import Family, gemma
from sftcli.model.families.config import layer_types, limit, positive, refuse, size, sizes, windows
from sftcli.model.families.llama import ATTENTION, MLP, OUTSIDE, QK_NORMS, SANDWICH
from sftcli.model.families.ropes import reach, read_rope_of
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config, context=131072, kv_heads=4, head_dim=256)
    period = size(config, "sliding_window_pattern", size(config, "_sliding_window_pattern", 6))
    full = [(layer + 1) % period == 0 for layer in range(found["layers"])]
    kinds = layer_types(
        config, found["layers"], ["full_attention" if seeing else "sliding_attention" for seeing in full]
    )
    keys = {"full_attention": (1e6, "rope_theta", True), "sliding_attention": (1e4, "rope_local_base_freq", False)}
    ropes = {
        kind: read_rope_of(config, kind, found["head_dim"], theta=theta, theta_key=key, scaled=scaled)
        for kind, (theta, key, scaled) in keys.items()
    }
    refuse(config, attn_logit_softcapping=(None,))  # transformers keeps the key and caps nothing
    one_rope = {"rope_parameters": None, "rope_scaling": None, "rope_theta": None}  # read above
    common = gemma.switches(config | one_rope, found) | {
        "context": reach(ropes["full_attention"], found["context"]),
        "ropes": tuple(ropes[kind] for kind in kinds),
    }
    return GPTConfig(
        **common,
        placement="sandwich",
        qk_norm="head",
        windows=windows(config, kinds, default=4096),
        attention_scale=positive(config, "query_pre_attn_scalar", 256) ** -0.5,
        logit_cap=limit(config, "final_logit_softcapping"),
    )


FAMILY = Family(read_config, OUTSIDE, SANDWICH | ATTENTION | QK_NORMS | MLP)
