"""Phi 1 and 2: attention and MLP side by side behind one LayerNorm, RoPE on a part of each head, biases everywhere."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import activation, positive, refuse, sizes, switch
from sftcli.model.families.ropes import read_rope, turning
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    refuse(config, qk_layernorm=(False,))
    found = sizes(config)
    rope = read_rope(config, found["head_dim"], fraction=0.5)
    return GPTConfig(
        **turning(found, rope),
        norm="layer",
        norm_eps=positive(config, "layer_norm_eps", 1e-5),
        residual="parallel_shared",
        gated=False,
        activation=activation(config, "hidden_act", "gelu_new"),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        tied=switch(config, "tie_word_embeddings", False),
    )


FAMILY = Family(
    read_config,
    outside={"model.embed_tokens": "embedding", "model.final_layernorm": "norm", "lm_head": "head"},
    layer={
        "input_layernorm": "attention_norm",
        **{f"self_attn.{name}_proj": f"attention.{name}" for name in ("q", "k", "v")},
        "self_attn.dense": "attention.o",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    },
)
