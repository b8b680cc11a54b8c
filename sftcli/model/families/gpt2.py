"""GPT-2: LayerNorm, learned positions, GELU (tanh), biases everywhere, q, k, v fused and stored [in, out]."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import activation, positive, refuse, size, sizes, switch
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    refuse(
        config,
        scale_attn_by_inverse_layer_idx=(False,),
        scale_attn_weights=(True,),
        add_cross_attention=(False,),
    )
    found = sizes(
        config,
        layers="n_layer",
        heads="n_head",
        width="n_embd",
        inner="n_inner",
        positions="n_positions",
        context=size(config, "n_ctx", 1024),
        takes_head_dim=False,
    )
    return GPTConfig(
        **found,
        norm="layer",
        norm_eps=positive(config, "layer_norm_epsilon", 1e-5),
        learned_positions=True,
        gated=False,
        activation=activation(config, "activation_function", "gelu_new"),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=switch(config, "tie_word_embeddings", True),
    )


OUTSIDE = {
    "transformer.wte": "embedding",
    "transformer.wpe": "position",
    "transformer.ln_f": "norm",
    "lm_head": "head",
}

FAMILY = Family(
    read_config,
    OUTSIDE,
    layer={
        "ln_1": "attention_norm",
        "attn.c_attn": ("attention.q", "attention.k", "attention.v"),
        "attn.c_proj": "attention.o",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    },
    layers="transformer.h.{}.",
    transposed=True,
    buffers=(".attn.bias", ".attn.masked_bias"),  # with the dot: c_attn.bias is a weight
    lacking="transformer.",  # the hub's gpt2
)
