"""Rotary positions (RoFormer, arXiv 2104.09864) and the ways in which models stretch them beyond their training.

A pair of numbers of a head turns by position * frequency_i, frequency_i = theta^(-2i / dim), i < dim / 2. A scaling
changes the frequencies (once, or by the length of each row) and may multiply cos and sin by an amplitude.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sftcli.model.pieces import turned_


@dataclass(frozen=True)
class Linear:
    """Positions divided by a factor."""

    factor: float
    amplitude = 1.0
    by_length = False

    def frequencies(self, rope: "Rope", lengths: Tensor | None) -> Tensor:
        return base_frequencies(rope.dim, rope.theta) / self.factor


@dataclass(frozen=True)
class Dynamic:
    """NTK-aware: beyond `original` tokens theta grows with the row's own length."""

    factor: float
    original: int
    amplitude = 1.0
    by_length = True

    def frequencies(self, rope: "Rope", lengths: Tensor | None) -> Tensor:
        assert lengths is not None
        length = lengths.clamp(min=self.original)[..., None].double()  # (..., 1)
        stretch = self.factor * length / self.original - (self.factor - 1)
        theta = (rope.theta * stretch ** (rope.dim / (rope.dim - 2))).float()
        return 1.0 / theta ** exponents(rope.dim, lengths.device)  # (..., dim / 2)


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1: long wavelengths divided by a factor, short ones kept, a ramp between."""

    factor: float
    low: float
    high: float
    original: int
    amplitude = 1.0
    by_length = False

    def frequencies(self, rope: "Rope", lengths: Tensor | None) -> Tensor:
        frequency = base_frequencies(rope.dim, rope.theta)
        turns = self.original * frequency / (2 * math.pi)  # within the original context
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): fast pairs kept, slow pairs divided by a factor, a ramp between, a larger amplitude."""

    factor: float
    original: int
    fast: float
    slow: float
    amplitude: float
    truncate: bool = True
    by_length = False

    def frequencies(self, rope: "Rope", lengths: Tensor | None) -> Tensor:
        def pair_of(turns: float) -> float:
            return rope.dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

        first, last = pair_of(self.fast), pair_of(self.slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rope.dim - 1)
        width = last - first or 0.001
        ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
        frequency = base_frequencies(rope.dim, rope.theta)
        return frequency * (1 - ramp) + frequency / self.factor * ramp


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): a divisor for each pair, another set once a row is longer than `original`."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    amplitude: float
    by_length = True

    def frequencies(self, rope: "Rope", lengths: Tensor | None) -> Tensor:
        assert lengths is not None
        frequency = base_frequencies(rope.dim, rope.theta)
        short, long = (frequency / torch.tensor(divisors) for divisors in (self.short, self.long))
        beyond = (lengths > self.original)[..., None]  # (..., 1)
        return torch.where(beyond, long.to(lengths.device), short.to(lengths.device))


Scaling = Linear | Dynamic | Llama3 | Yarn | LongRope


@dataclass(frozen=True)
class Rope:
    """How the layers of one kind rotate queries and keys."""

    dim: int  # the first numbers of each head; the rest passes through
    theta: float
    interleaved: bool = False  # pairs (2i, 2i + 1) instead of (i, i + dim / 2)
    scaling: Scaling | None = None

    @property
    def by_length(self) -> bool:
        """Whether angles depend on the length of the row, not only on the position."""
        return self.scaling is not None and self.scaling.by_length


@dataclass(frozen=True)
class RotaryTable:
    """cos and sin (..., 1, dim) in float32 for the tokens of one forward; sin is negated for the first of each pair."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def exponents(dim: int, device: torch.device | None = None) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


def base_frequencies(dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** exponents(dim)


def rotary_table(rope: Rope, positions: Tensor, lengths: Tensor | None = None) -> RotaryTable:
    """The table for tokens at positions (...); `lengths` (...) of their rows, where the rope asks for them."""
    if rope.scaling is None:
        frequency, amplitude = base_frequencies(rope.dim, rope.theta), 1.0
    else:
        frequency, amplitude = rope.scaling.frequencies(rope, lengths), rope.scaling.amplitude
    angle = positions[..., None].float() * frequency.to(positions.device)  # (..., dim / 2)
    cos, sin = ((turn * amplitude).unsqueeze(-2) for turn in (angle.cos(), angle.sin()))  # the same for every head
    if rope.interleaved:
        return RotaryTable(cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2), True)
    return RotaryTable(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1), False)


def rotate_(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate the first `dim` numbers of every head of x (..., heads, D), in place: room for another is dear."""
    return turned_(x, table.cos.type_as(x), table.sin.type_as(x), table.interleaved)
