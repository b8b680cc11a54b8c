"""StarCoder 2: LayerNorm and biases, a plain MLP with GELU (tanh), RoPE, a window on every layer where one is set."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import activation, positive, sizes, switch, windows
from sftcli.model.families.llama import ATTENTION, NORMS, OUTSIDE
from sftcli.model.families.ropes import read_rope, turning
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config, context=4096, kv_heads=2)
    rope = read_rope(config, found["head_dim"])
    biased = switch(config, "use_bias", True)
    return GPTConfig(
        **turning(found, rope),
        norm="layer",
        norm_eps=positive(config, "norm_epsilon", 1e-5),
        windows=windows(config, ["sliding_attention"] * found["layers"]),
        gated=False,
        activation=activation(config, "hidden_act", "gelu_pytorch_tanh"),
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=biased,
        tied=switch(config, "tie_word_embeddings", True),
    )


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | {"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"})
