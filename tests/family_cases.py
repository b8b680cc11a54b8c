"""Tiny configurations of every family, and models with weights that matter built from them by transformers.

A case's first word is its model_type. Every model has at least 4 layers, fewer key heads than heads and a head width
other than width / heads where the family allows, and windows shorter than the ids of the tests.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 96
TOLERANCE = 1e-5  # of logits; the largest difference seen is 4e-6
WINDOW = 6
LENGTH = 24  # of the ids that logits are compared on: longer than windows and original contexts
SHORT = 12  # within the original context of `phi3 longrope`
ORIGINAL = 16

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 12}
OPENAI = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
NEO = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64}

# model_type -> (name of transformers' classes, sizes)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", OPENAI),
    "gpt_neo": ("GPTNeo", NEO | {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW}),
    "gpt_neox": ("GPTNeoX", SHAPE),
    "llama": ("Llama", WIDE),
    "mistral": ("Mistral", WIDE | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", WIDE),
    "minimind": ("Qwen3", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}),
    "glm": ("Glm", WIDE),
    "glm4": ("Glm4", WIDE),
    "smollm3": ("SmolLM3", GROUPED),
    "olmo": ("Olmo", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "olmo3": ("Olmo3", GROUPED | {"sliding_window": WINDOW}),
    "gemma": ("Gemma", WIDE | {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2", WIDE | {"sliding_window": WINDOW, "query_pre_attn_scalar": 20}),
    "gemma3_text": (
        "Gemma3",
        WIDE | {"num_hidden_layers": 7, "sliding_window": WINDOW, "query_pre_attn_scalar": 20},
    ),
    "phi3": ("Phi3", GROUPED),
    "phi": ("Phi", GROUPED),
    "gptj": ("GPTJ", OPENAI | {"rotary_dim": 4}),
    "starcoder2": ("Starcoder2", GROUPED),
    "stablelm": ("StableLm", GROUPED | {"partial_rotary_factor": 0.5}),
    "granite": (
        "Granite",
        GROUPED
        | {"embedding_multiplier": 4.0, "residual_multiplier": 0.6, "attention_multiplier": 0.6, "logits_scaling": 1.5},
    ),
}

# with theta 10 the ramp has values between 0 and 1 for heads this narrow
YARN = {
    "rope_theta": 10.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "beta_fast": 2.0,
}
# factors a half of the rotary width each, so different that no two frequencies may be mixed up
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.5, 2.0, 3.0, 4.0]}


def rope(rope_theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": rope_theta} | parameters}


def nested(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 narrow": {"n_inner": 40, "layer_norm_epsilon": 1e-3},
    "gpt2 untied": {"tie_word_embeddings": False},
    "gpt_neo": {},
    "gpt_neo global": {"attention_types": [[["global"], 4]]},
    "gpt_neo local": {"attention_types": [[["local"], 1], [["global", "local", "local"], 1]]},
    "gpt_neox": {},
    "gpt_neox sequential": {"use_parallel_residual": False},
    "gpt_neox rotary": rope(500.0, partial_rotary_factor=1.0),
    "gpt_neox unbiased": {"attention_bias": False} | rope(partial_rotary_factor=0.5),
    "gpt_neox tied": {"tie_word_embeddings": True},
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama attention bias": {"attention_bias": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "llama all heads": {"num_key_value_heads": None, "head_dim": None},
    "llama theta": rope(500000.0),
    "llama linear": rope(rope_type="linear", factor=4.0),
    "llama dynamic": rope(rope_type="dynamic", factor=2.0) | {"max_position_embeddings": ORIGINAL},
    "llama llama3": rope(
        100.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "llama yarn": rope(**YARN),
    "llama yarn factor": rope(**YARN, attention_factor=0.7),
    "llama yarn mscale": rope(**YARN, mscale=0.7, mscale_all_dim=1.3, beta_slow=0.5),
    "llama yarn exact": rope(**YARN, truncate=False),
    "mistral": {},
    "mistral no window": {"sliding_window": None},
    "mistral narrow": {"head_dim": None, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen2 window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen2 tied": {"tie_word_embeddings": True} | rope(1000000.0),
    "qwen2 yarn": rope(**YARN),
    "qwen2 wide": {"head_dim": 12},
    "qwen3": rope(1000000.0),
    "qwen3 bias": {"attention_bias": True},
    "qwen3 tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "qwen3 window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "minimind": rope(1000000.0),
    "glm": {},
    "glm unbiased": {"attention_bias": False, "partial_rotary_factor": 1.0},
    "glm4": {},
    "glm4 unbiased": {"attention_bias": False, "tie_word_embeddings": True},
    "smollm3": {},
    "smollm3 window": {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": WINDOW},
    "smollm3 biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "smollm3 wide": {"head_dim": 12},
    "olmo": {},
    "olmo clip": {"clip_qkv": 0.8},
    "olmo bias": {"attention_bias": True},
    "olmo2": {},
    "olmo2 bias": {"attention_bias": True, "rms_norm_eps": 1e-3} | rope(500000.0),
    "olmo2 wide": {"head_dim": 12},
    "olmo3": {},
    "olmo3 yarn": nested(
        {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
         "attention_factor": 1.2, "beta_fast": 4.0},
        {"rope_type": "default", "rope_theta": 500000.0},
    ),
    "olmo3 layers": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "attention_bias": True,
    },
    "gemma": {},
    "gemma untied": {"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 2},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma2 caps": {},
    "gemma2 uncapped": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3_text": {},
    "gemma3_text linear": nested(
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        {"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gemma3_text layers": {"sliding_window_pattern": 2, "attention_bias": True},
    "phi3": {},
    "phi3 window": {"sliding_window": WINDOW, "tie_word_embeddings": True},
    "phi3 longrope": rope(**LONGROPE) | {"original_max_position_embeddings": ORIGINAL},
    "phi3 partial": rope(partial_rotary_factor=0.5),
    "phi3 wide": {"head_dim": 12},
    "phi": {},
    "phi rotary": {"partial_rotary_factor": 1.0, "num_key_value_heads": None} | {"tie_word_embeddings": True},
    "phi wide": {"head_dim": 12},
    "gptj": {},
    "gptj rotary": {"rotary_dim": 8, "n_inner": 40},
    "starcoder2": {},
    "starcoder2 unbiased": {"use_bias": False, "tie_word_embeddings": False},
    "starcoder2 window": {"sliding_window": WINDOW},
    "starcoder2 wide": {"head_dim": 12},
    "stablelm": {},
    "stablelm qkv bias": {"use_qkv_bias": True, "partial_rotary_factor": 0.25},
    "stablelm parallel": {"use_parallel_residual": True, "tie_word_embeddings": True},
    "granite": {},
    "granite biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "granite wide": {"head_dim": 12},
}  # fmt: skip

OLMO3_LAYERS = ["sliding_attention"] * 3 + ["full_attention"]  # where layer_types is absent


def family_of_case(name: str) -> str:
    return name.split()[0]


def ids_of(length: int = LENGTH, seed: int = 7, vocabulary: int = VOCABULARY) -> list[int]:
    """Ids of no control token."""
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def config_of(name: str, **sizes: Any) -> Any:
    """transformers' configuration of a case."""
    import transformers

    classes, shape = FAMILIES[family_of_case(name)]
    kind = getattr(transformers, classes + ("TextConfig" if classes == "Gemma3" else "Config"))
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return kind(
        **json.loads(json.dumps(common | shape | CASES[name] | sizes))
    )  # a copy: the classes edit what they get


def their_model(config: Any, seed: int = 5) -> Any:
    """transformers' model with eager attention and random weights, norms and biases."""
    import transformers

    kind = type(config).__name__.removesuffix("Config").removesuffix("Text")
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager").float().eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: Any, seed: int) -> None:
    """Weights so large that attention matters; norms far from 1, biases far from 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(0.16 * noise)
            elif name == "weight" and "Norm" in type(module).__name__:
                about = 0.0 if type(module).__name__.startswith("Gemma") else 1.0  # Gemma's norms hold w - 1
                parameter.copy_(about + 0.4 * noise)
            else:
                parameter.copy_(0.3 * noise)


def build(name: str, path: Path, **sizes: Any) -> Any:
    """Save a case's model into a folder as transformers does; returns the model itself."""
    model = their_model(config_of(name, **sizes))
    model.save_pretrained(path)
    if family_of_case(name) == "minimind":
        change_config(path, model_type="minimind", architectures=["MiniMindForCausalLM"])
    return model


@dataclass
class Built:
    """A case's folder as transformers saved it, transformers' model, and its logits of ids_of()."""

    name: str
    path: Path
    theirs: Any
    logits: torch.Tensor


_FOLDERS = tempfile.TemporaryDirectory(prefix="families-")  # goes away with the process


@cache
def built(name: str) -> Built:
    """A case, made once; its folder must not be changed."""
    path = Path(_FOLDERS.name, name.replace(" ", "-"))
    theirs = build(name, path)
    return Built(name, path, theirs, their_logits(theirs, ids_of()))


def their_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """transformers' logits (T, V) of one row."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0]


def read_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def write_config(path: Path, config: dict[str, Any]) -> None:
    (path / "config.json").write_text(json.dumps(config, indent=2))


def change_config(path: Path, **keys: Any) -> None:
    write_config(path, read_config(path) | keys)


def older(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 and the hub have it: RoPE's values at the top level, no lists of layers."""
    family = config["model_type"]
    config = {key: value for key, value in config.items() if key not in ("dtype", "rope_parameters")} | {
        "torch_dtype": config.get("dtype"),
        **_older_rope(family, config.get("rope_parameters")),
    }
    layer_types = config.pop("layer_types", None)
    if family == "gemma3_text":
        config["sliding_window_pattern"] = layer_types.index("full_attention") + 1
    elif family == "olmo3" and layer_types != OLMO3_LAYERS:
        config["layer_types"] = layer_types
    elif family in ("qwen2", "qwen3", "minimind") and not config["use_sliding_window"]:
        config |= {"sliding_window": WINDOW, "max_window_layers": 0}  # told, and not used
    elif family == "gemma":
        config["hidden_act"] = "gelu"  # which means tanh
    return config


def _older_rope(family: str, rope: dict[str, Any] | None) -> dict[str, Any]:
    if not rope:
        return {}
    if "full_attention" in rope:
        full, sliding = dict(rope["full_attention"]), rope["sliding_attention"]
        found = {"rope_theta": full.pop("rope_theta")}
        if family == "gemma3_text":
            found["rope_local_base_freq"] = sliding["rope_theta"]
        return found | {"rope_scaling": None if full["rope_type"] == "default" else full}
    rest = dict(rope)
    names = ("rotary_emb_base", "rotary_pct") if family == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    found = {names[0]: rest.pop("rope_theta")}
    if "partial_rotary_factor" in rest:
        found[names[1]] = rest.pop("partial_rotary_factor")
    if family == "phi3":
        rest.pop("original_max_position_embeddings", None)  # at the top level
    if rest["rope_type"] != "llama3":
        rest["type"] = rest.pop("rope_type")
    return found | {"rope_scaling": None if "default" in rest.values() else rest}
