"""Tensors that processes share out by rows (dimension 0), and the files that hold them.

Each process writes its own rows of every tensor; in the order of the files they lie end to end. A reader asks for the
rows that it needs, and only these are read: by plain reads, for what another process cuts off would kill who maps it.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sftcli.errors import CheckpointError
from sftcli.model.tensorfile import STORED, Entry, memory_of, read_entries


def is_shared_out(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes (FSDP2)."""
    return hasattr(tensor, "full_tensor")


def held(tensor: Any) -> Tensor:
    """The rows of a tensor that this process holds: all of them, where it is not spread."""
    found: Tensor = tensor.to_local() if is_shared_out(tensor) else tensor
    return found


def rows_held(tensor: Any) -> slice:
    """Which rows of a tensor `held` gives: torch deals them out as `chunk` does, the last shares smaller or empty."""
    if not is_shared_out(tensor):
        return slice(0, len(tensor) if tensor.ndim else 1)
    each = math.ceil(len(tensor) / tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * each, len(tensor))
    return slice(start, start + len(tensor.to_local()))


def spread_like(rows: Tensor, like: Any) -> Tensor:
    """The rows that `rows_held(like)` tells, as a tensor that is spread as `like` is."""
    if not is_shared_out(like):
        return rows
    from torch.distributed.tensor import DTensor

    place = like.device_mesh, like.placements
    found: Tensor = DTensor.from_local(rows, *place, run_check=False, shape=like.shape, stride=like.stride())
    return found


def file_name(name: str, number: int, count: int) -> str:
    """Of the file of one of `count` processes (from 1), where each writes its own: `name` with its number."""
    path = Path(name)
    return f"{path.stem}-{number:05}-of-{count:05}{path.suffix}"


class TensorFiles:
    """The tensors of one file, or of the files of several processes in their order."""

    def __init__(self, paths: Sequence[Path]):
        self._parts: dict[str, list[Entry]] = {}
        for path in paths:
            for entry in read_entries(path, STORED):
                parts = self._parts.setdefault(entry.name, [])
                if parts and (entry.dtype, entry.shape[1:]) != (parts[0].dtype, parts[0].shape[1:]):
                    raise CheckpointError(f"{path} is damaged: its {entry.name} does not fit {parts[0].path.name}")
                parts.append(entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor. Raises KeyError."""
        parts = self._parts[name]
        return (sum(map(_rows, parts)), *parts[0].shape[1:]) if parts[0].shape else ()

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a tensor (of one without dimensions: itself). Raises KeyError, CheckpointError."""
        parts, shape = self._parts[name], self.shape(name)
        start, stop, _ = rows.indices(shape[0] if shape else 1)
        found = torch.empty(max(stop - start, 0), *shape[1:], dtype=parts[0].dtype)
        begin = 0  # the row that a part begins with
        for part in parts:
            end = begin + _rows(part)
            first, last = max(start, begin), min(stop, end)
            if first < last:
                _read_into(found[first - start : last - start], part, first - begin)
            begin = end
        return found if shape else found.view(())

    def read_like(self, name: str, like: Tensor) -> Tensor:
        """A tensor on the device of `like`, and spread as it is: then only this process's rows are read.

        Raises KeyError, ValueError for another shape, CheckpointError."""
        if (shape := self.shape(name)) != tuple(like.shape):
            raise ValueError(f"tensor {name} has shape {list(shape)}, not {list(like.shape)}")
        return spread_like(self.read(name, rows_held(like)).to(like.device), like)


def _rows(part: Entry) -> int:
    return part.shape[0] if part.shape else 1


def _read_into(target: Tensor, part: Entry, first: int) -> None:
    """Fill rows (contiguous) with those of a file, from its row `first` on."""
    data = memory_of(target)
    try:
        with open(part.path, "rb") as file:
            file.seek(part.start + first * ((part.end - part.start) // _rows(part)))
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{part.path} is damaged: it ends in tensor {part.name}")
    except OSError as error:
        raise CheckpointError(f"cannot read {part.path}: {error.strerror}") from None
