"""RoPE as config.json spells it: `rope_parameters` (transformers >= 5, per kind of layer where they differ), or the
older keys at the top (`rope_theta`, `rope_scaling`, `partial_rotary_factor`, and each family's own)."""

import math
from typing import Any

from sftcli.errors import CheckpointError
from sftcli.model.families.config import number, positive, size, switch
from sftcli.model.rope import Dynamic, Linear, Llama3, LongRope, Rope, Scaling, Yarn


def read_rope(
    config: dict[str, Any],
    head_dim: int,
    fraction: float | None = None,
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
    theta_key: str = "rope_theta",
    fraction_key: str = "partial_rotary_factor",
) -> Rope:
    """The one rope of a config; `theta` and `fraction` are the family's defaults, None: it turns all of each head,
    and a config that says otherwise is refused."""
    here = dict(_object(config, "rope_scaling") or _object(config, "rope_parameters"))  # in transformers' order
    here.setdefault("rope_theta", config.get(theta_key))
    here.setdefault("partial_rotary_factor", config.get(fraction_key))
    if fraction is None:
        _refuse_fraction(here)
    return rope_from(here, config, head_dim, theta, fraction or 1.0, interleaved)


def _refuse_fraction(parameters: dict[str, Any]) -> None:
    """transformers has the key read by some ways to scale and by no model of these families: there is no right way."""
    if parameters.get("partial_rotary_factor") not in (None, 1):
        told = parameters["partial_rotary_factor"]
        raise CheckpointError(f"config.json: partial_rotary_factor = {told!r} is not supported in this family")


def read_rope_of(
    config: dict[str, Any], kind: str, head_dim: int, *, theta: float, theta_key: str, scaled: bool
) -> Rope:
    """The rope of one kind of layer (full_attention, sliding_attention) of a family that tells them apart.

    `scaled`: whether an older config's rope_scaling is meant for this kind.
    """
    nested = _object(config, "rope_parameters")
    if nested and "full_attention" not in nested:
        raise CheckpointError("config.json: rope_parameters does not tell full_attention from sliding_attention")
    here = _object(nested, kind) | (_object(config, "rope_scaling") if scaled else {})
    here.setdefault("rope_theta", config.get(theta_key))
    _refuse_fraction(here)
    return rope_from(here, config, head_dim, theta, 1.0, False)


def rope_from(
    parameters: dict[str, Any], config: dict[str, Any], head_dim: int, theta: float, fraction: float, interleaved: bool
) -> Rope:
    theta = number(parameters, "rope_theta", theta)
    dim = int(head_dim * number(parameters, "partial_rotary_factor", fraction))
    if theta <= 1 or dim < 2 or dim % 2 or dim > head_dim:
        raise CheckpointError(f"config.json: RoPE with theta {theta:g} over {dim} of {head_dim} numbers makes no sense")
    return Rope(dim, theta, interleaved, _scaling(parameters, config, dim))


def _scaling(parameters: dict[str, Any], config: dict[str, Any], dim: int) -> Scaling | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(positive(parameters, "factor"))
    if kind == "dynamic":
        return Dynamic(positive(parameters, "factor"), size(config, "max_position_embeddings"))
    original = size(config, "original_max_position_embeddings", size(config, "max_position_embeddings"))
    if "original_max_position_embeddings" not in config:
        original = size(parameters, "original_max_position_embeddings", original)
    if kind == "llama3":
        low, high = positive(parameters, "low_freq_factor"), positive(parameters, "high_freq_factor")
        if high <= low:
            raise CheckpointError(f"config.json: high_freq_factor {high:g} is not above low_freq_factor {low:g}")
        return Llama3(positive(parameters, "factor"), low, high, original)
    if kind == "yarn":
        return _yarn(parameters, config, original)
    if kind in ("longrope", "su"):
        return _longrope(parameters, config, original, dim)
    raise CheckpointError(f"config.json: RoPE scaling {kind!r} is not supported")


def _stretch(parameters: dict[str, Any], config: dict[str, Any], original: int) -> float:
    """How many times longer the context has become."""
    return positive(parameters, "factor", size(config, "max_position_embeddings") / original)


def _yarn(parameters: dict[str, Any], config: dict[str, Any], original: int) -> Yarn:
    factor = _stretch(parameters, config, original)

    def gain(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    whole, part = parameters.get("mscale_all_dim"), parameters.get("mscale")
    amplitude = (
        gain(number(parameters, "mscale")) / gain(number(parameters, "mscale_all_dim")) if whole and part else gain(1.0)
    )
    return Yarn(
        factor=factor,
        original=original,
        fast=positive(parameters, "beta_fast") if parameters.get("beta_fast") else 32.0,
        slow=positive(parameters, "beta_slow") if parameters.get("beta_slow") else 1.0,
        amplitude=positive(parameters, "attention_factor", amplitude),
        truncate=switch(parameters, "truncate", True),
    )


def _longrope(parameters: dict[str, Any], config: dict[str, Any], original: int, dim: int) -> LongRope:
    factor = _stretch(parameters, config, original)
    amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = []
    for key in ("short_factor", "long_factor"):
        values = parameters.get(key)
        if not isinstance(values, list) or len(values) != dim // 2:
            raise CheckpointError(f"config.json: {key} must be {dim // 2} numbers, one a pair")
        divisors.append(tuple(positive({key: value}, key) for value in values))
    return LongRope(divisors[0], divisors[1], original, positive(parameters, "attention_factor", amplitude))


def turning(found: dict[str, Any], rope: Rope) -> dict[str, Any]:
    """Sizes of a model all of whose layers have this rope, which may stretch its context."""
    return found | {"context": reach(rope, found["context"]), "ropes": (rope,) * found["layers"]}


def reach(rope: Rope, context: int) -> int:
    """The longest row: what a scaling that stretches beyond the stated context makes of it."""
    if isinstance(rope.scaling, Dynamic):
        return max(context, int(rope.scaling.factor * rope.scaling.original))
    if isinstance(rope.scaling, Yarn):
        return max(context, int(rope.scaling.factor * rope.scaling.original))
    return context


def _object(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {key} is not an object")
    return value
