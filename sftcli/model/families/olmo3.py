"""OLMo 3: OLMo 2 with three sliding layers for each that sees all; a scaling of RoPE is for the latter only."""

from typing import Any

from sftcli.model.families import Family, olmo2
from sftcli.model.families.config import activation, layer_types, positive, sizes, switch, windows
from sftcli.model.families.ropes import reach, read_rope_of
from sftcli.model.gpt import GPTConfig


def read_config(config: dict[str, Any]) -> GPTConfig:
    found = sizes(config)
    default = ["full_attention" if (layer + 1) % 4 == 0 else "sliding_attention" for layer in range(found["layers"])]
    kinds = layer_types(config, found["layers"], default)
    ropes = {
        kind: read_rope_of(config, kind, found["head_dim"], theta=5e5, theta_key="rope_theta", scaled=scaled)
        for kind, scaled in (("full_attention", True), ("sliding_attention", False))
    }
    common = found | {"context": reach(ropes["full_attention"], found["context"])}
    return GPTConfig(
        **common,
        norm="rms",
        norm_eps=positive(config, "rms_norm_eps", 1e-5),
        activation=activation(config, "hidden_act", "silu"),
        ropes=tuple(ropes[kind] for kind in kinds),
        windows=windows(config, kinds, default=4096),
        tied=switch(config, "tie_word_embeddings", False),
        **olmo2.after_norms(config),
    )


FAMILY = Family(read_config, olmo2.FAMILY.outside, olmo2.FAMILY.layer)
