"""GPT-2: LayerNorm, learned positions, GELU (tanh), biases everywhere, fused q/k/v stored [in, out]."""

from typing import Any

from sftcli.errors import CheckpointError
from sftcli.model.families import Stored, refuse, required
from sftcli.model.gpt import GPTConfig

BUFFERS = (".attn.bias", ".attn.masked_bias")  # with the dot: c_attn.bias is a weight


def read_config(config: dict[str, Any]) -> GPTConfig:
    refuse(
        config,
        activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        scale_attn_by_inverse_layer_idx=(False,),
        scale_attn_weights=(True,),
        add_cross_attention=(False,),
    )
    heads, width = required(config, "n_head"), required(config, "n_embd")
    if width % heads:
        raise CheckpointError(f"config.json: n_embd {width} is no multiple of n_head {heads}")
    return GPTConfig(
        vocab_size=required(config, "vocab_size"),
        context=config.get("n_positions") or config.get("n_ctx") or 1024,
        layers=required(config, "n_layer"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=config.get("n_inner") or 4 * width,
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        rope_theta=0.0,
        gated=False,
        activation="gelu_tanh",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def tensors(config: GPTConfig) -> list[Stored]:
    found = [
        Stored("transformer.wte.weight", ("embedding.weight",)),
        Stored("transformer.wpe.weight", ("position.weight",)),
    ]
    if not config.tied:
        found.append(Stored("lm_head.weight", ("head.weight",)))
    norms = {"transformer.ln_f": "norm"}
    linears: dict[str, tuple[str, ...]] = {}
    for n in range(config.layers):
        theirs, ours = f"transformer.h.{n}.", f"blocks.{n}."
        norms |= {theirs + "ln_1": ours + "attention_norm", theirs + "ln_2": ours + "mlp_norm"}
        linears[theirs + "attn.c_attn"] = tuple(ours + f"attention.{name}" for name in "qkv")  # blocks [q; k; v]
        linears[theirs + "attn.c_proj"] = (ours + "attention.o",)
        linears[theirs + "mlp.c_fc"] = (ours + "mlp.up",)
        linears[theirs + "mlp.c_proj"] = (ours + "mlp.down",)
    for name, our in norms.items():
        found += [Stored(f"{name}.{kind}", (f"{our}.{kind}",)) for kind in ("weight", "bias")]
    for name, many in linears.items():
        found.append(Stored(f"{name}.weight", tuple(f"{our}.weight" for our in many), transposed=True))
        found.append(Stored(f"{name}.bias", tuple(f"{our}.bias" for our in many)))
    return found


def upstream_name(name: str) -> str:
    """The files of the hub's `gpt2` lack the prefix."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
