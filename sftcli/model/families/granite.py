"""Granite: Llama with multipliers on embeddings, residuals, scores and logits."""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import number, positive, sizes, switch
from sftcli.model.families.llama import ATTENTION, MLP, NORMS, OUTSIDE, switches
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    biased = switch(config, "attention_bias", False)
    return GPTConfig(
        **switches(config, sizes(config)),
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=switch(config, "mlp_bias", False),
        embedding_scale=number(config, "embedding_multiplier", 1.0),
        residual_scale=number(config, "residual_multiplier", 1.0),
        attention_scale=positive(config, "attention_multiplier", 1.0),
        logit_scale=1.0 / positive(config, "logits_scaling", 1.0),
    )


FAMILY = Family(read_config, OUTSIDE, NORMS | ATTENTION | MLP)
