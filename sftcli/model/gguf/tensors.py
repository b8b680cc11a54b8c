"""Tensors of a GGUF file and of a family's files: other names, other layouts, the same numbers."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sftcli.errors import CheckpointError
from sftcli.model.checkpoint import SHARD_SIZE, ModelFolder, narrowed, stored_shape
from sftcli.model.families import Stored
from sftcli.model.gguf.architectures import Architecture
from sftcli.model.gguf.configs import HEAD
from sftcli.model.gguf.file import GGUF, Planned, library
from sftcli.model.gguf.ropes import FACTORS, LONG, SHORT
from sftcli.model.gpt import GPTConfig
from sftcli.model.tensorfile import bytes_of, read_tensors, write_shards

POSITIONS = "position_embd.weight"  # float32 in every file, as vectors are


def named(one: Architecture, folder: ModelFolder) -> dict[str, Stored]:
    """The family's tensors by their names in a GGUF file. Raises CheckpointError for one without a name there."""
    gguf = library()
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == one.name)
    names = gguf.get_tensor_name_map(kind, folder.config.layers)
    found = {}
    for stored in folder.family.tensors(folder.config):
        name = names.get_name(stored.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise CheckpointError(f"tensor {stored.name} has no name in GGUF's {one.name}")
        found[name] = stored
    return found


class Layout:
    """How an architecture's tensors lie in a GGUF file: as linear layers want them, fused ones as blocks [q; k; v],
    q and k permuted where RoPE is interleaved there, Gemma's norms with 1 added."""

    def __init__(self, one: Architecture, config: GPTConfig):
        self.one, self.config = one, config

    def to_file(self, name: str, stored: Stored, value: Tensor) -> Tensor:
        value = value.T if stored.transposed else value
        if stored.heads:
            value = torch.cat(stored.split(value, [len(value) // len(stored.ours)] * len(stored.ours)))
        if heads := self._permuted_heads(name):
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # (H, D / 2, 2, ...)
        return value.float() + 1 if self._is_offset(name) else value

    def from_file(self, name: str, stored: Stored, value: Tensor) -> Tensor:
        value = value - 1 if self._is_offset(name) else value
        if heads := self._permuted_heads(name):
            value = value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # (H, 2, D / 2, ...)
        if stored.heads:
            value = stored.join(list(value.chunk(len(stored.ours))))
        return (value.T if stored.transposed else value).contiguous()

    def _permuted_heads(self, name: str) -> int:
        heads = {"attn_q": self.config.heads, "attn_k": self.config.kv_heads}
        return heads.get(name.split(".")[-2], 0) if self.one.permuted else 0

    def _is_offset(self, name: str) -> bool:
        return self.one.offset_norms and name.endswith("norm.weight")


def import_weights(file: GGUF, one: Architecture, folder: ModelFolder, output: Path, dtype: torch.dtype) -> None:
    """Write the family's files, tensor by tensor. Raises CheckpointError where file and config do not fit."""
    wanted = named(one, folder)
    _check_tensors(file, wanted, folder)
    layout = Layout(one, folder.config)
    makers = {stored.name: partial(_imported, file, layout, name, stored, dtype) for name, stored in wanted.items()}
    sizes = {stored.name: dtype.itemsize * file.tensors[name].n_elements for name, stored in wanted.items()}
    write_shards(output, makers, sizes, bytes_of(SHARD_SIZE))


def _check_tensors(file: GGUF, wanted: dict[str, Stored], folder: ModelFolder) -> None:
    spare = {FACTORS, LONG, SHORT} | ({HEAD} if folder.config.tied else set())
    if missing := sorted(set(wanted) - set(file.tensors)):
        raise CheckpointError(f"{file.path} has no tensor {missing[0]} ({len(missing)} are missing)")
    if unknown := sorted(set(file.tensors) - set(wanted) - spare):
        raise CheckpointError(f"{file.path}: tensor {unknown[0]} has no place in the model ({len(unknown)} have none)")
    for name, stored in wanted.items():
        shape = stored_shape(stored, folder.config)
        expected = list(shape[::-1] if stored.transposed else shape)
        if file.shape(name) != expected:
            raise CheckpointError(f"{file.path}: tensor {name} has shape {file.shape(name)}, the fields say {expected}")


def _imported(file: GGUF, layout: Layout, name: str, stored: Stored, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype`; a vector that would lose by it (files keep them in float32) stays as it is."""
    packed = file.read(name)
    value = layout.from_file(name, stored, packed)
    narrow = narrowed(stored.name, value, dtype)
    exact = value.ndim > 1 or torch.equal(layout.to_file(name, stored, narrow.float()), packed)
    return narrow if exact else value


def plan(one: Architecture, folder: ModelFolder) -> list[tuple[Planned, Stored]]:
    """What an export writes, in order."""
    found = []
    for name, stored in named(one, folder).items():
        shape = folder.entries[stored.name].shape
        laid = shape[::-1] if stored.transposed else shape
        found.append((Planned(name, laid, len(shape) == 1 or name == POSITIONS), stored))
    return found


def exported(one: Architecture, folder: ModelFolder, planned: list[tuple[Planned, Stored]]) -> Iterator[Tensor]:
    """The planned tensors in a GGUF file's layout, one at a time."""
    layout = Layout(one, folder.config)
    for tensor, stored in planned:
        for _, value in read_tensors([folder.entries[stored.name]]):
            yield layout.to_file(tensor.name, stored, value)
