"""StableLM: Llama with LayerNorms and RoPE on a part of each head; the branches may stand side by side."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import activation, positive, refuse, sizes, switch
from sftcli.model.families.llama import ATTENTION, MLP, NORMS, OUTSIDE
from sftcli.model.families.ropes import read_rope, turning
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    refuse(config, qk_layernorm=(False,))
    found = sizes(config, context=4096, kv_heads=32, takes_head_dim=False)
    rope = read_rope(config, found["head_dim"], fraction=0.25)
    return GPTConfig(
        **turning(found, rope),
        norm="layer",
        norm_eps=positive(config, "layer_norm_eps", 1e-5),
        residual="parallel_shared" if switch(config, "use_parallel_residual", False) else "sequential",
        activation=activation(config, "hidden_act", "silu"),
        qkv_bias=switch(config, "use_qkv_bias", False),
        tied=switch(config, "tie_word_embeddings", False),
    )


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | MLP)
