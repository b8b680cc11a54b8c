"""One file a Hugging Face family: its config keys and tensor names onto the GPT, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from sftcli.errors import CheckpointError
from sftcli.model.gpt import GPTConfig

FAMILIES = ("gpt2", "llama")  # a name here is a file beside this one and a model_type in config.json


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


class Family(Protocol):
    """What a family's file holds."""

    BUFFERS: tuple[str, ...]  # endings of tensors in old files that are no weights

    def read_config(self, config: dict[str, Any]) -> GPTConfig:
        """config.json -> switches. Raises CheckpointError naming a switch that is not supported."""
        ...

    def tensors(self, config: GPTConfig) -> list[Stored]:
        """Every tensor of the family's files."""
        ...

    def upstream_name(self, name: str) -> str:
        """The name a tensor of a file has in `tensors` (old files lack a prefix, for example)."""
        ...


def family_of(config: dict[str, Any]) -> Family:
    """The family that config.json names. Raises CheckpointError for one that is not here."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(f"model_type {kind!r} is not supported", hint=f"supported: {', '.join(FAMILIES)}")
    return import_module(f"{__name__}.{kind}")


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
