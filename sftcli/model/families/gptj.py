"""GPT-J: attention and MLP side by side behind one LayerNorm, interleaved RoPE on the first numbers of a head."""

from typing import Any

from sftcli.errors import CheckpointError
from sftcli.model.families import Family
from sftcli.model.families.config import activation, positive, size, sizes, switch
from sftcli.model.gpt import GPTConfig
from sftcli.model.rope import Rope


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(
        config,
        layers="n_layer",
        heads="n_head",
        width="n_embd",
        inner="n_inner",
        positions="n_positions",
        takes_head_dim=False,
    )
    dim = size(config, "rotary_dim", 64)
    if dim % 2 or dim > found["head_dim"]:
        raise CheckpointError(f"config.json: rotary_dim {dim} does not fit heads of {found['head_dim']}")
    return GPTConfig(
        **found,
        norm="layer",
        norm_eps=positive(config, "layer_norm_epsilon", 1e-5),
        residual="parallel_shared",
        ropes=(Rope(dim, 10000.0, interleaved=True),) * found["layers"],
        gated=False,
        activation=activation(config, "activation_function", "gelu_new"),
        mlp_bias=True,
        head_bias=True,
        tied=switch(config, "tie_word_embeddings", False),
    )


FAMILY = Family(
    read_config,
    outside={"transformer.wte": "embedding", "transformer.ln_f": "norm", "lm_head": "head"},
    layer={
        "ln_1": "attention_norm",
        **{f"attn.{name}_proj": f"attention.{name}" for name in ("q", "k", "v")},
        "attn.out_proj": "attention.o",
        "mlp.fc_in": "mlp.up",
        "mlp.fc_out": "mlp.down",
    },
    layers="transformer.h.{}.",
    buffers=(".attn.bias", ".attn.masked_bias", ".attn.embed_positions"),
)
