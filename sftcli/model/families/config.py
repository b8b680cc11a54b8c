"""What the families' files read config.json with."""

from typing import Any

from sftcli.errors import CheckpointError

MAX_LAYERS = 2_000
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
}


def refuse(config: dict[str, Any], **accepted: tuple[Any, ...]) -> None:
    """Refuse switches whose value is none of the accepted ones; an absent key is the first of them."""
    for key, values in accepted.items():
        value = config.get(key, values[0])
        if value not in values:
            raise CheckpointError(f"config.json: {key} = {value!r} is not supported")


def required(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise CheckpointError(f"config.json has no {key}")
    return config[key]


def size(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; an absent key is the default."""
    value = config.get(key)
    if value is None:
        value = required(config, key) if default is None else default
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {key} = {value!r} is not a positive whole number")
    return value


def number(config: dict[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = required(config, key) if default is None else default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json: {key} = {value!r} is not a number")
    if not abs(value) < 1e30:  # NaN, too
        raise CheckpointError(f"config.json: {key} = {value!r} makes no sense")
    return float(value)


def positive(config: dict[str, Any], key: str, default: float | None = None) -> float:
    value = number(config, key, default)
    if value <= 0:
        raise CheckpointError(f"config.json: {key} = {value:g} is not above 0")
    return value


def limit(config: dict[str, Any], key: str, default: float | None = None) -> float | None:
    """A number above 0, or None where the key says null; an absent key is the default."""
    if key not in config:
        return default
    return None if config[key] is None else positive(config, key)


def switch(config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} = {value!r} is not true or false")
    return value


def activation(config: dict[str, Any], key: str, default: str) -> str:
    value = config.get(key) or default
    if value not in ACTIVATIONS:
        raise CheckpointError(f"config.json: {key} = {value!r} is not supported")
    return ACTIVATIONS[value]


def sizes(
    config: dict[str, Any],
    *,
    context: int = 2048,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    takes_head_dim: bool = True,
    layers: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
    width: str = "hidden_size",
    inner: str = "intermediate_size",
    positions: str = "max_position_embeddings",
) -> dict[str, Any]:
    """The sizes of a GPTConfig. Defaults where keys are absent: as many key heads as heads, width / heads, 4 x width.

    `takes_head_dim`: whether the family honours the key head_dim. Raises CheckpointError for senseless ones.
    """
    found: dict[str, Any] = {
        "vocab_size": size(config, "vocab_size"),
        "context": size(config, positions, context),
        "layers": size(config, layers),
        "width": size(config, width),
        "heads": size(config, heads),
    }
    if found["layers"] > MAX_LAYERS:
        raise CheckpointError(f"config.json: {found['layers']} layers are beyond any memory")
    own_dim = takes_head_dim and config.get("head_dim") is not None
    if not own_dim and not head_dim and found["width"] % found["heads"]:
        raise CheckpointError(f"config.json: {width} {found['width']} is not a multiple of {heads} {found['heads']}")
    found["head_dim"] = size(config, "head_dim") if own_dim else head_dim or found["width"] // found["heads"]
    null_kv_heads = "num_key_value_heads" in config and config["num_key_value_heads"] is None
    found["kv_heads"] = size(
        config, "num_key_value_heads", found["heads"] if null_kv_heads else kv_heads or found["heads"]
    )
    found["mlp_width"] = size(config, inner, 4 * found["width"])
    return found


def windows(config: dict[str, Any], kinds: list[str], default: int | None = None) -> tuple[int | None, ...]:
    """The window of each layer by its kind: those that slide have sliding_window, the others see all."""
    if "sliding_attention" not in kinds or config.get("sliding_window", default) is None:
        return ()
    window = size(config, "sliding_window", default)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def layer_types(config: dict[str, Any], layers: int, default: list[str]) -> list[str]:
    """`layer_types`, one of full_attention and sliding_attention a layer, or what stands for it where it is absent."""
    kinds = config.get("layer_types")
    if kinds is None:
        return default
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise CheckpointError(f"config.json: layer_types does not name the {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(f"config.json: layer_types has {kind!r}, which is not supported")
    return kinds
