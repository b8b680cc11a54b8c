"""Phi 3: Llama with q, k, v fused and gate and up fused; long contexts by LongRoPE."""

from typing import Any

from sftcli.errors import CheckpointError
from sftcli.model.families import Family
from sftcli.model.families.config import sizes, windows
from sftcli.model.families.llama import FUSED_MLP, NORMS, OUTSIDE, Modules, switches
from sftcli.model.gpt import GPTConfig
from sftcli.model.rope import LongRope

ATTENTION: Modules = {
    "self_attn.qkv_proj": ("attention.q", "attention.k", "attention.v"),
    "self_attn.o_proj": "attention.o",
}


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config, context=4096)
    known = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096} | config
    common = switches(known, found, eps=1e-5, fraction=1.0)
    scaling = common["ropes"][0].scaling
    if scaling is not None and not isinstance(scaling, LongRope):
        raise CheckpointError("config.json: Phi 3 scales RoPE by longrope only")
    return GPTConfig(**common, windows=windows(config, ["sliding_attention"] * found["layers"]))


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | FUSED_MLP)
