"""Rotary positions in GGUF: fields for theta and scaling, tensors of factors for Llama 3's scaling and LongRoPE's."""

import math
from typing import Any

import torch
from torch import Tensor

from sftcli.errors import CheckpointError
from sftcli.model.gguf.file import GGUF
from sftcli.model.rope import Linear, Llama3, LongRope, Rope, Yarn, base_frequencies

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
LOCAL_THETA = 10000.0  # of Gemma 3's layers with a window, where a file does not say
LOW, HIGH = 1.0, 4.0  # Llama 3's ramp; files keep only what comes of it


def read_rope(file: GGUF, name: str, dim: int, context: int) -> dict[str, Any]:
    """config.json's rope_parameters of a file. Raises CheckpointError for a scaling that is not known."""
    fields = file.fields
    theta = decimal(fields.get(f"{name}.rope.freq_base", 10000.0))
    scaling = f"{name}.rope.scaling."
    kind = fields.get(scaling + "type", "none")
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    original = fields.get(scaling + "original_context_length", context)
    if FACTORS in file.tensors:
        return found | _llama3_of(file.read(FACTORS), theta, dim)
    if LONG in file.tensors and SHORT in file.tensors:
        amplitude = decimal(fields.get(scaling + "attn_factor", 1.0))
        factors = {"long_factor": _numbers(file.read(LONG)), "short_factor": _numbers(file.read(SHORT))}
        told = {"original_max_position_embeddings": original, "attention_factor": amplitude}
        return found | {"rope_type": "longrope", "factor": context / original} | factors | told
    if kind == "none":
        return found
    factor = decimal(fields.get(scaling + "factor", 1.0))
    if kind == "linear":
        return found | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        betas = {key: fields.get(f"{scaling}yarn_{key}") for key in ("beta_fast", "beta_slow")}
        told = {key: decimal(value) for key, value in betas.items() if value is not None}
        return found | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | told
    raise CheckpointError(f"{file.path}: RoPE scaling {kind!r} is not supported")


def decimal(value: float) -> float:
    """A float32 as the shortest decimal that is it: 1e-05, not 9.999999747378752e-06."""
    return float(str(torch.tensor(value, dtype=torch.float32).numpy()))


def _numbers(tensor: Tensor) -> list[float]:
    return [decimal(value) for value in tensor.tolist()]


def _llama3_of(factors: Tensor, theta: float, dim: int) -> dict[str, Any]:
    """The scaling whose divisors these are. Raises CheckpointError if none is."""
    factor = decimal(float(factors.max()))
    for original in [8192, *(2**n for n in range(4, 20))]:
        expected = llama3_factors(Rope(dim, theta, scaling=Llama3(factor, LOW, HIGH, original)))
        if expected.shape == factors.shape and torch.allclose(expected, factors, rtol=1e-5):
            ramp = {"low_freq_factor": LOW, "high_freq_factor": HIGH}
            return {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original} | ramp
    raise CheckpointError(f"the file's {FACTORS} is no scaling of Llama 3's kind")


def llama3_factors(rope: Rope) -> Tensor:
    """What divides each frequency (dim / 2)."""
    assert isinstance(rope.scaling, Llama3)
    return base_frequencies(rope.dim, rope.theta) / rope.scaling.frequencies(rope, None)


def write_rope(name: str, rope: Rope) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields and tensors of a rope. Raises CheckpointError for a scaling that GGUF does not have."""
    scaling, key = rope.scaling, f"{name}.rope.scaling."
    fields: dict[str, Any] = {f"{name}.rope.freq_base": float(rope.theta), f"{name}.rope.dimension_count": rope.dim}
    if isinstance(scaling, Llama3) and (scaling.low, scaling.high) == (LOW, HIGH):
        return fields, {FACTORS: llama3_factors(rope)}
    if isinstance(scaling, LongRope):
        fields |= {key + "original_context_length": scaling.original, key + "attn_factor": float(scaling.amplitude)}
        return fields, {LONG: torch.tensor(scaling.long), SHORT: torch.tensor(scaling.short)}
    if isinstance(scaling, Linear):
        return fields | {key + "type": "linear", key + "factor": float(scaling.factor)}, {}
    if isinstance(scaling, Yarn) and scaling.truncate and _usual_amplitude(scaling):
        fields |= {key + "type": "yarn", key + "factor": float(scaling.factor)}
        fields |= {key + "yarn_beta_fast": float(scaling.fast), key + "yarn_beta_slow": float(scaling.slow)}
        return fields | {key + "original_context_length": scaling.original}, {}
    if scaling is not None:
        raise CheckpointError(f"RoPE scaling {type(scaling).__name__} with these settings has no place in GGUF")
    return fields, {}


def _usual_amplitude(scaling: Yarn) -> bool:
    """llama.cpp computes it from the factor."""
    return math.isclose(scaling.amplitude, 0.1 * math.log(scaling.factor) + 1, rel_tol=1e-6)
