"""config.json from a GGUF file's fields, and back."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sftcli.errors import CheckpointError
from sftcli.model.gguf.architectures import Architecture
from sftcli.model.gguf.file import GGUF
from sftcli.model.gguf.ropes import LOCAL_THETA, decimal, read_rope, write_rope
from sftcli.model.gpt import GPTConfig

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ATTRIBUTES = {  # of GPTConfig, by fields; config.json may leave some out
    "context_length": "context",
    "embedding_length": "width",
    "block_count": "layers",
    "feed_forward_length": "mlp_width",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.layer_norm_epsilon": "norm_eps",
}
DEFAULTS: dict[str, Callable[[GPTConfig], Any]] = {  # where config.json leaves a key out llama.cpp does not know it
    "use_parallel_residual": lambda gpt: gpt.residual != "sequential",
    "attention.scale": lambda gpt: gpt.attention_scale,
    "embedding_scale": lambda gpt: gpt.embedding_scale,
    "residual_scale": lambda gpt: gpt.residual_scale,
    "logit_scale": lambda gpt: 1 / gpt.logit_scale,
}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
GEMMA3_PERIOD = 6  # the last of six layers sees all
NOPE_PERIOD = 4  # SmolLM3: the last of four layers has no rotation
# llama.cpp takes these models' attention scale from width / heads, every other Gemma's from the width of a head
WIDE_GEMMAS = {"gemma2": 46, "gemma3": 62}  # by their layers: the 27B ones


def read_config(file: GGUF, one: Architecture) -> dict[str, Any]:
    """config.json of a file. Raises CheckpointError for what is missing or has no place in it."""
    config: dict[str, Any] = {"architectures": [one.causal_class], "model_type": one.model_type, **one.fixed}
    for key, name in one.keys.items():
        config[name] = _value(file, f"{one.name}.{key}")
    for key, name in one.optional.items():
        if f"{one.name}.{key}" in file.fields:
            config[name] = _value(file, f"{one.name}.{key}")
    for name, tensor in one.biases.items():
        config[name] = f"blk.0.{tensor}.bias" in file.tensors
    if EMBEDDING not in file.tensors:
        raise CheckpointError(f"{file.path} has no tensor {EMBEDDING}")
    config["vocab_size"] = file.shape(EMBEDDING)[0]
    config["tie_word_embeddings"] = HEAD not in file.tensors or _same(file, EMBEDDING, HEAD)
    if one.rope:
        config |= _rotation(file, one, config)
    return config | _particular(one, config)


def _value(file: GGUF, key: str) -> Any:
    value = file.field(key)
    if isinstance(value, list | str):
        raise CheckpointError(f"{file.path}: {key} has a value for each layer, which is not supported")
    return decimal(value) if isinstance(value, float) else value


def _same(file: GGUF, first: str, second: str) -> bool:
    """Whether two tensors are one, packed alike (older converters wrote a tied head twice)."""
    one, other = file.tensors[first], file.tensors[second]
    alike = one.tensor_type == other.tensor_type and one.data.shape == other.data.shape
    return alike and bool((one.data == other.data).all())


def _rotation(file: GGUF, one: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """head_dim, the fraction of it that turns, and rope_parameters."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    turning = file.fields.get(f"{one.name}.rope.dimension_count")
    head = file.fields.get(f"{one.name}.attention.key_length")
    head = head or (turning if one.head_dim and not one.rotary else None) or width // max(heads, 1)
    if not one.head_dim and head * heads != width:
        raise CheckpointError(f"{file.path}: heads of {head} do not make up a width of {width}")
    found: dict[str, Any] = {"head_dim": head} if one.head_dim else {}
    turning = turning or head
    parameters = read_rope(file, one.name, turning, config["max_position_embeddings"])
    if not one.rotary and turning != head:
        raise CheckpointError(f"{file.path}: {turning} of the {head} numbers of a head turn, which is not supported")
    if one.rotary:
        found[one.rotary] = parameters["partial_rotary_factor"] = turning / head
    if one.model_type == "phi3" and parameters["rope_type"] == "longrope":
        found["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    if one.model_type == "gemma3_text":
        theta = decimal(file.fields.get("gemma3.rope.freq_base_swa", LOCAL_THETA))
        local = {"rope_type": "default", "rope_theta": theta}
        return found | {"rope_parameters": {"full_attention": parameters, "sliding_attention": local}}
    return found | {"rope_parameters": parameters, "rope_theta": parameters["rope_theta"]}


def _particular(one: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp knows of an architecture without a field."""
    layers = config.get("num_hidden_layers", 0)
    if one.name in WIDE_GEMMAS:
        shape = (layers, config["head_dim"], config["hidden_size"], config["num_attention_heads"])
        found: dict[str, Any] = {"query_pre_attn_scalar": _gemma_scalar(one, *shape)}
        windows = [_has_window(one, layer) for layer in range(layers)]
        return found | {"layer_types": ["sliding_attention" if here else "full_attention" for here in windows]}
    if one.name == "smollm3":
        return {"no_rope_layers": [int(_turns(one, layer)) for layer in range(layers)]}
    return {}


def _gemma_scalar(one: Architecture, layers: int, head_dim: int, width: int, heads: int) -> int:
    return width // heads if WIDE_GEMMAS[one.name] == layers else head_dim


def _has_window(one: Architecture, layer: int) -> bool:
    """Whether a layer of an architecture with a window has it."""
    if one.name == "gemma2":
        return layer % 2 == 0
    return one.name != "gemma3" or (layer + 1) % GEMMA3_PERIOD != 0


def _turns(one: Architecture, layer: int) -> bool:
    return one.name != "smollm3" or (layer + 1) % NOPE_PERIOD != 0


# ---- back


def write_config(one: Architecture, config: dict[str, Any], gpt: GPTConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields, tensors of RoPE factors) of config.json and the switches it means. Raises CheckpointError."""
    _refuse_what_has_no_field(one, config, gpt)
    fields: dict[str, Any] = {"vocab_size": gpt.vocab_size}
    for key, name in one.keys.items():
        fields[key] = config[name] if config.get(name) is not None else getattr(gpt, ATTRIBUTES[key])
    for key, name in one.optional.items():
        value = config.get(name)
        if value is None and key in DEFAULTS:
            value = DEFAULTS[key](gpt)
        if value is not None:
            fields[key] = value
    fields |= {key: getattr(gpt, ATTRIBUTES[key]) for key in one.written}
    if one.head_dim:
        fields |= {"attention.key_length": gpt.head_dim, "attention.value_length": gpt.head_dim}
    fields = {f"{one.name}.{key}": _typed(key, value) for key, value in fields.items()}
    tensors: dict[str, Tensor] = {}
    if one.rope:
        full = [rope for layer, rope in enumerate(gpt.ropes) if rope and not _is_local(one, gpt, layer)]
        ropes, tensors = write_rope(one.name, full[0])
        fields |= ropes
        if one.name == "gemma3" and (local := gpt.ropes[0]):
            fields["gemma3.rope.freq_base_swa"] = float(local.theta)
    return fields, tensors


def _typed(key: str, value: Any) -> Any:
    whole = isinstance(value, bool | int) and not key.endswith(("epsilon", "scale", "softcapping"))
    return value if whole else float(value)


def _is_local(one: Architecture, gpt: GPTConfig, layer: int) -> bool:
    return one.name == "gemma3" and _has_window(one, layer) and bool(gpt.windows)


def _refuse_what_has_no_field(one: Architecture, config: dict[str, Any], gpt: GPTConfig) -> None:
    """Raise CheckpointError for a switch that llama.cpp does not read from a file of this architecture."""
    for key, value in one.fixed.items():
        found = config.get(key, value)
        if key.endswith(("_act", "activation", "activation_function")):
            fits = gpt.activation == ACTIVATIONS[value]
        else:
            fits = found == value or found is None
        _require(fits, one, f"{key} = {found!r}")
    _require(one.head_dim or gpt.head_dim * gpt.heads == gpt.width, one, f"head_dim = {gpt.head_dim}")
    _require_windows(one, gpt)
    if one.rope:
        _require_ropes(one, gpt)
    if one.name in WIDE_GEMMAS:
        scalar = _gemma_scalar(one, gpt.layers, gpt.head_dim, gpt.width, gpt.heads)
        fits = gpt.attention_scale is None or abs(gpt.attention_scale - scalar**-0.5) < 1e-9
        _require(fits, one, f"query_pre_attn_scalar = {config.get('query_pre_attn_scalar')}")
    if one.name == "gemma2":
        _require(gpt.attention_cap is not None and gpt.logit_cap is not None, one, "no soft caps")


def _require(fits: bool, one: Architecture, told: str) -> None:
    if not fits:
        raise CheckpointError(f"config.json: {told} has no place in GGUF's {one.name}")


def _require_windows(one: Architecture, gpt: GPTConfig) -> None:
    """Every layer that llama.cpp gives the window has it, and no other."""
    windows = [window if window and window < gpt.context else None for window in gpt.windows] or [None] * gpt.layers
    sizes = {window for window in windows if window}
    if not sizes:
        return
    has_field = "sliding_window" in (one.keys | one.optional).values() and len(sizes) == 1
    fits = has_field and all(bool(window) == _has_window(one, layer) for layer, window in enumerate(windows))
    _require(fits, one, "a sliding window on these layers")


def _require_ropes(one: Architecture, gpt: GPTConfig) -> None:
    turning = [bool(rope) for rope in gpt.ropes]
    _require(turning == [_turns(one, layer) for layer in range(gpt.layers)], one, "RoPE on these layers only")
    kinds = {(_is_local(one, gpt, layer), rope) for layer, rope in enumerate(gpt.ropes) if rope}
    _require(len(kinds) == len({local for local, _ in kinds}), one, "another RoPE in each layer")
    _require(all(not local or rope.scaling is None for local, rope in kinds), one, "a scaled RoPE in window layers")
    _require(all(local for local, _ in kinds) is False, one, "windows on all layers")
