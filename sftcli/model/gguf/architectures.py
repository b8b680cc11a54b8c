"""llama.cpp's architectures: which family each is, and its fields over the keys of config.json."""

from dataclasses import dataclass, field
from typing import Any

from sftcli.errors import CheckpointError

RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
GPT2_SIZES = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
}
BIASES = {"attention_bias": "attn_output", "mlp_bias": "ffn_down"}
WINDOW = {"attention.sliding_window": "sliding_window"}


@dataclass(frozen=True)
class Architecture:
    """`keys`: fields (without the architecture's prefix) over keys of config.json; `optional` may be absent.
    `fixed`: what an import writes and an export demands, as llama.cpp knows no other."""

    name: str
    model_type: str
    causal_class: str
    keys: dict[str, str]
    optional: dict[str, str] = field(default_factory=dict)
    written: tuple[str, ...] = ()  # fields that llama.cpp asks for and config.json has no key for
    biases: dict[str, str] = field(default_factory=dict)  # a switch of config.json: the tensor whose bias tells it
    fixed: dict[str, Any] = field(default_factory=dict)
    tied: bool = False  # config.json's default
    head_dim: bool = False  # config.json may say it; otherwise it is width / heads
    rotary: str | None = None  # the key of the fraction of a head that turns, where it is not all of it
    rope: bool = True
    permuted: bool = False  # q and k rows lie in the order of interleaved RoPE
    offset_norms: bool = False  # norms are stored as 1 + w


ARCHITECTURES = [
    Architecture(
        "llama", "llama", "LlamaForCausalLM", SIZES | {RMS: "rms_norm_eps"},
        biases=BIASES, fixed={"hidden_act": "silu"}, head_dim=True, permuted=True,
    ),
    Architecture(
        "llama", "mistral", "MistralForCausalLM", SIZES | {RMS: "rms_norm_eps"}, WINDOW,
        fixed={"hidden_act": "silu"}, head_dim=True, permuted=True,
    ),
    Architecture(
        "gpt2", "gpt2", "GPT2LMHeadModel", GPT2_SIZES | {LAYER: "layer_norm_epsilon"},
        fixed={"activation_function": "gelu_new"}, tied=True, rope=False,
    ),
    Architecture(
        "gptneox", "gpt_neox", "GPTNeoXForCausalLM",
        {k: v for k, v in SIZES.items() if v != "num_key_value_heads"} | {LAYER: "layer_norm_eps"},
        {"use_parallel_residual": "use_parallel_residual"},
        biases={"attention_bias": "attn_qkv"}, fixed={"hidden_act": "gelu"}, rotary="rotary_pct",
    ),
    Architecture(
        "qwen2", "qwen2", "Qwen2ForCausalLM", SIZES | {RMS: "rms_norm_eps"},
        fixed={"hidden_act": "silu", "use_sliding_window": False},
    ),
    Architecture(
        "qwen3", "qwen3", "Qwen3ForCausalLM", SIZES | {RMS: "rms_norm_eps"},
        fixed={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}, head_dim=True,
    ),
    Architecture(
        "qwen3", "minimind", "MiniMindForCausalLM", SIZES | {RMS: "rms_norm_eps"},
        fixed={"hidden_act": "silu"}, tied=True, head_dim=True,
    ),
    Architecture(
        "gemma", "gemma", "GemmaForCausalLM", SIZES | {RMS: "rms_norm_eps"},
        fixed={"hidden_act": "gelu_pytorch_tanh"}, tied=True, head_dim=True, offset_norms=True,
    ),
    Architecture(
        "gemma2", "gemma2", "Gemma2ForCausalLM", SIZES | {RMS: "rms_norm_eps"} | WINDOW,
        {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
        fixed={"hidden_activation": "gelu_pytorch_tanh"}, tied=True, head_dim=True, offset_norms=True,
    ),
    Architecture(
        "gemma3", "gemma3_text", "Gemma3ForCausalLM", SIZES | {RMS: "rms_norm_eps"} | WINDOW,
        {"final_logit_softcapping": "final_logit_softcapping"},
        fixed={"hidden_activation": "gelu_pytorch_tanh"}, tied=True, head_dim=True, offset_norms=True,
    ),
    Architecture(
        "phi3", "phi3", "Phi3ForCausalLM", SIZES | {RMS: "rms_norm_eps"}, WINDOW,
        fixed={"hidden_act": "silu"}, rotary="partial_rotary_factor",
    ),
    Architecture(
        "phi2", "phi", "PhiForCausalLM", SIZES | {LAYER: "layer_norm_eps"},
        fixed={"hidden_act": "gelu_new", "qk_layernorm": False}, rotary="partial_rotary_factor",
    ),
    Architecture(
        "starcoder2", "starcoder2", "Starcoder2ForCausalLM", SIZES | {LAYER: "norm_epsilon"}, WINDOW,
        biases={"use_bias": "ffn_up"}, fixed={"hidden_act": "gelu_pytorch_tanh"}, tied=True,
    ),
    Architecture(
        "stablelm", "stablelm", "StableLmForCausalLM", SIZES | {LAYER: "layer_norm_eps"},
        {"use_parallel_residual": "use_parallel_residual"},
        biases={"use_qkv_bias": "attn_q"}, fixed={"hidden_act": "silu", "qk_layernorm": False},
        rotary="partial_rotary_factor",
    ),
    Architecture(
        "olmo", "olmo", "OlmoForCausalLM", SIZES, {"attention.clamp_kqv": "clip_qkv"}, written=(LAYER,),
        fixed={"hidden_act": "silu", "attention_bias": False}, permuted=True,
    ),
    Architecture(
        "olmo2", "olmo2", "Olmo2ForCausalLM", SIZES | {RMS: "rms_norm_eps"},
        fixed={"hidden_act": "silu", "attention_bias": False},
    ),
    Architecture(
        "chatglm", "glm", "GlmForCausalLM", SIZES | {RMS: "rms_norm_eps"},
        biases={"attention_bias": "attn_q"}, fixed={"hidden_act": "silu"},
        head_dim=True, rotary="partial_rotary_factor",
    ),
    Architecture(
        "glm4", "glm4", "Glm4ForCausalLM", SIZES | {RMS: "rms_norm_eps"},
        biases={"attention_bias": "attn_q"}, fixed={"hidden_act": "silu"},
        head_dim=True, rotary="partial_rotary_factor",
    ),
    Architecture(
        "smollm3", "smollm3", "SmolLM3ForCausalLM", SIZES | {RMS: "rms_norm_eps"},
        biases=BIASES, fixed={"hidden_act": "silu", "use_sliding_window": False}, tied=True, permuted=True,
    ),
    Architecture(
        "granite", "granite", "GraniteForCausalLM", SIZES | {RMS: "rms_norm_eps"},
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        biases=BIASES, fixed={"hidden_act": "silu"}, permuted=True,
    ),
]  # fmt: skip


def architecture_of_file(fields: dict[str, Any]) -> Architecture:
    """The architecture that a file names. Raises CheckpointError."""
    name = fields.get("general.architecture")
    found = [one for one in ARCHITECTURES if one.name == name]
    if not found:
        known = ", ".join(dict.fromkeys(one.name for one in ARCHITECTURES))
        raise CheckpointError(f"architecture {name!r} is not supported", hint=f"supported: {known}")
    if name == "llama" and f"{name}.attention.sliding_window" in fields:
        return architecture_of_config({"model_type": "mistral"})
    return found[0]


def architecture_of_config(config: dict[str, Any]) -> Architecture:
    """The architecture that a model folder becomes. Raises CheckpointError."""
    for one in ARCHITECTURES:
        if one.model_type == config.get("model_type"):
            return one
    known = ", ".join(one.model_type for one in ARCHITECTURES)
    raise CheckpointError(f"model_type {config.get('model_type')!r} has no export to GGUF", hint=f"these have: {known}")
