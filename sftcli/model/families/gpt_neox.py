"""GPT-NeoX and Pythia: attention and MLP side by side, q, k, v fused head by head, RoPE on a part of each head."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import activation, positive, sizes, switch
from sftcli.model.families.ropes import read_rope, turning
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config, takes_head_dim=False)
    rope = read_rope(config, found["head_dim"], fraction=0.25, theta_key="rotary_emb_base", fraction_key="rotary_pct")
    biased = switch(config, "attention_bias", True)
    return GPTConfig(
        **turning(found, rope),
        norm="layer",
        norm_eps=positive(config, "layer_norm_eps", 1e-5),
        residual="parallel" if switch(config, "use_parallel_residual", True) else "sequential",
        gated=False,
        activation=activation(config, "hidden_act", "gelu"),
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=True,
        tied=switch(config, "tie_word_embeddings", False),
    )


FAMILY = Family(
    read_config,
    outside={"gpt_neox.embed_in": "embedding", "gpt_neox.final_layer_norm": "norm", "embed_out": "head"},
    layer={
        "input_layernorm": "attention_norm",
        "attention.query_key_value": ("attention.q", "attention.k", "attention.v"),
        "attention.dense": "attention.o",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_h_to_4h": "mlp.up",
        "mlp.dense_4h_to_h": "mlp.down",
    },
    layers="gpt_neox.layers.{}.",
    alternating=True,
    buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    renamed={"lm_head.weight": "embed_out.weight"},
)
