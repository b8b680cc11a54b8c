"""BERT: norms after each sum and on the embedding, token types, a transform before the tied head, a next-sentence head.

A BertForPreTraining's files; those of a BertForMaskedLM lack the pooler and the next-sentence head.
"""

from typing import Any

from sftcli.model.families import Family
from sftcli.model.families.config import activation, positive, refuse, size, sizes
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    refuse(
        config,
        position_embedding_type=("absolute", None),
        is_decoder=(False,),
        add_cross_attention=(False,),
        tie_word_embeddings=(True, None),
    )
    return GPTConfig(
        **sizes(config, context=512, takes_head_dim=False),
        norm="layer",
        norm_eps=positive(config, "layer_norm_eps", 1e-12),
        placement="sum",
        gated=False,
        activation=activation(config, "hidden_act", "gelu"),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        tied=True,
        learned_positions=True,
        embedding_norm=True,
        head_transform=True,
        token_types=size(config, "type_vocab_size", 2),
        nsp_head=True,
    )


NSP, POOLER, KINDS = "cls.seq_relationship", "bert.pooler.dense", ("weight", "bias")

FAMILY = Family(
    read_config,
    outside={
        "bert.embeddings.word_embeddings": "embedding",
        "bert.embeddings.position_embeddings": "position",
        "bert.embeddings.token_type_embeddings": "token_type",
        "bert.embeddings.LayerNorm": "embedding_norm",
        POOLER: "pooler",
        "cls.predictions.transform.dense": "transform.dense",
        "cls.predictions.transform.LayerNorm": "transform.norm",
        "cls.predictions": "head",  # of which only the bias is stored
        NSP: "nsp",
    },
    layer={
        **{f"attention.self.{name}": f"attention.{name[0]}" for name in ("query", "key", "value")},
        "attention.output.dense": "attention.o",
        "attention.output.LayerNorm": "attention_post_norm",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
        "output.LayerNorm": "mlp_post_norm",
    },
    layers="bert.encoder.layer.{}.",
    # the pooler's where there is no next-sentence head
    buffers=("bert.embeddings.position_ids", "cls.predictions.decoder.bias", *(f"{POOLER}.{k}" for k in KINDS)),
    renamed={"cls.predictions.decoder.weight": "cls.predictions.weight"},  # a copy of the embedding
    endings={".gamma": ".weight", ".beta": ".bias"},
    optional={f"{NSP}.weight": "nsp_head"},
)
