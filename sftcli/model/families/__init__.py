"""One file a Hugging Face family: its config keys and tensor names onto the GPT, and back.

A family says how config.json reads and which of its modules is which of ours; `tensors` then lists every tensor of its
files. A module that the GPT of a config does not have (a bias, a tied head, a norm) has no tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sftcli.errors import CheckpointError
from sftcli.model.gpt import GPT, GPTConfig

# a name here is a file beside this one and a model_type in config.json
FAMILIES = (
    *("bert", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neo", "gpt_neox", "gptj", "granite"),
    *("llama", "minimind", "mistral", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "smollm3"),
    *("stablelm", "starcoder2"),
)


@dataclass(frozen=True)
class Stored:
    """A tensor of the family's files: ours, joined along the outputs, transposed where stored as [in, out].

    `heads` > 0: the parts alternate head by head (GPT-NeoX: rows [q; k; v] of head 0, then of head 1, ...).
    """

    name: str
    ours: tuple[str, ...]
    transposed: bool = False
    heads: int = 0

    def split(self, value: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """A fused (sum(rows), ...) tensor -> its parts of `rows` rows each, in the order of `ours`."""
        if not self.heads:
            return list(value.split(list(rows)))
        per_head = value.unflatten(0, (self.heads, len(rows), -1))  # (H, parts, D, ...)
        return [part.flatten(0, 1) for part in per_head.unbind(1)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts (rows, ...) -> the fused tensor; the inverse of `split`."""
        if not self.heads:
            return parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return torch.stack([part.unflatten(0, (self.heads, -1)) for part in parts], 1).flatten(0, 2)


@dataclass(frozen=True)
class Family:
    """What a family's file holds: how config.json reads, and its modules by our names."""

    read_config: Callable[[dict[str, Any]], GPTConfig]  # raises CheckpointError naming a switch that is not supported
    outside: Mapping[str, str]  # embedding, final norm, head
    layer: Mapping[str, str | tuple[str, ...]]  # of one layer, below `layers`; a tuple: fused
    layers: str = "model.layers.{}."
    transposed: bool = False  # linear weights lie as [in, out] (GPT-2's Conv1D)
    alternating: bool = False  # what is fused in attention alternates head by head
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)  # endings of tensors in old files that are no weights
    lacking: str = ""  # a prefix that some files leave out
    renamed: Mapping[str, str] = field(default_factory=dict)  # other names that files use
    endings: Mapping[str, str] = field(default_factory=dict)  # and other ends of names
    optional: Mapping[str, str] = field(default_factory=dict)  # tensors that files may lack -> their switch

    def tensors(self, config: GPTConfig) -> list[Stored]:
        """Every tensor of the family's files."""
        shapes = shapes_of(config)
        found = [s for theirs, ours in self.outside.items() for s in self._module(config, shapes, theirs, (ours,))]
        for n in range(config.layers):
            for theirs, ours in self.layer.items():
                parts = (ours,) if isinstance(ours, str) else ours
                ours_here = tuple(f"blocks.{n}.{part}" for part in parts)
                found += self._module(config, shapes, self.layers.format(n) + theirs, ours_here)
        return found

    def _module(
        self, config: GPTConfig, shapes: Mapping[str, torch.Size], theirs: str, ours: tuple[str, ...]
    ) -> list[Stored]:
        found = []
        for kind in ("weight", "bias"):
            names = tuple(f"{module}.{kind}" for module in ours)
            if names[0] not in shapes or (names[0] == "head.weight" and config.tied):
                continue
            linear = len(shapes[names[0]]) == 2 and names[0].startswith("blocks.")
            heads = config.heads if self.alternating and len(names) > 1 else 0
            found.append(Stored(f"{theirs}.{kind}", names, self.transposed and linear, heads))
        return found

    def upstream_name(self, name: str) -> str:
        """The name that a tensor of a file has in `tensors`."""
        for theirs, ours in self.endings.items():
            name = name.removesuffix(theirs) + ours if name.endswith(theirs) else name
        name = self.renamed.get(name, name)
        inside = not self.lacking or name.startswith((self.lacking, *self.outside))
        return name if inside else self.lacking + name

    @property
    def head(self) -> str:
        """Their name of the output projection's weight."""
        return next(theirs for theirs, ours in self.outside.items() if ours == "head") + ".weight"


@lru_cache(maxsize=8)
def shapes_of(config: GPTConfig) -> dict[str, torch.Size]:
    """The shape of every parameter of a GPT, without taking memory for it."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(config).named_parameters(remove_duplicate=False)}


def family_of(config: dict[str, Any]) -> Family:
    """The family that config.json names. Raises CheckpointError for one that is not here."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        hint = f"supported: {', '.join(FAMILIES)}"
        raise CheckpointError(f"config.json: model_type {kind!r} is not supported", hint=hint)
    family: Family = import_module(f"{__name__}.{kind}").FAMILY
    return family
