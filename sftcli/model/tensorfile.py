"""Files of weights (safetensors): every header is read and checked first, then tensors come one at a time.

The data is mapped, and the pages of a tensor are given back as soon as it is copied, so that loading takes the memory
of the model and not twice as much.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sftcli.artifacts import no_duplicates, read_json, write_json
from sftcli.errors import CheckpointError, UsageError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EXTRA = "extra.safetensors"  # what an objective adds to a model
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `start` and `end` in bytes from the beginning of the file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; none where it has no weights yet."""
    if (folder / WEIGHTS).is_file():  # goes before an index, as in transformers
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder)
    if strays := sorted(path.name for path in folder.glob("*.safetensors") if path.name != EXTRA):
        raise CheckpointError(
            f"{folder} has {strays[0]}, but neither {WEIGHTS} nor {INDEX}", hint="is a file of the model missing?"
        )
    if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise CheckpointError(
            f"{folder} has only {pickles[0].name}, a pickle, which can run code",
            hint="convert it to model.safetensors where you trust it",
        )
    return []


def _shards(folder: Path) -> list[Path]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
            raise CheckpointError(f"{folder / INDEX} names a file outside of its folder: {name!r}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: shard {name} is missing")
    return sorted(folder / name for name in set(weight_map.values()))


def read_entries(path: Path) -> list[Entry]:
    """What a safetensors file holds. Raises CheckpointError where header and file do not agree."""
    try:
        with safetensors.safe_open(path, framework="pt"):  # the library checks that offsets fit shapes and file
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=no_duplicates)
    except (safetensors.SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    begin = 8 + length
    return [
        Entry(path, name, _dtype(path, name, said["dtype"]), tuple(said["shape"]), begin + start, begin + end)
        for name, said in header.items()
        if name != "__metadata__"
        for start, end in [said["data_offsets"]]
    ]


def _dtype(path: Path, name: str, dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} is stored as {dtype}", hint=f"only {', '.join(DTYPES)} can be loaded"
        )
    return DTYPES[dtype]


def read_tensors(entries: Iterable[Entry]) -> Iterator[tuple[Entry, Tensor]]:
    """Each tensor as a view of its file: copy what you need before you ask for the next.

    The largest come first: while a tensor is copied it is there twice, which then costs least.
    """
    maps: dict[Path, mmap.mmap] = {}
    for entry in sorted(entries, key=lambda entry: (entry.start - entry.end, entry.name)):
        data = maps.get(entry.path) or maps.setdefault(entry.path, _mapped(entry.path))
        count = math.prod(entry.shape)
        tensor = torch.frombuffer(data, dtype=entry.dtype, count=count, offset=entry.start)
        yield entry, tensor.view(entry.shape)
        if hasattr(data, "madvise"):  # give the pages back
            begin = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
            data.madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)


def _mapped(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants a writable buffer
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be mapped: {error}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """safetensors, on disk, with the mode that the umask says (the library publishes 0600)."""
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_shards(folder: Path, tensors: Mapping[str, Any], sizes: Mapping[str, int], limit: int) -> None:
    """model.safetensors, or shards of at most `limit` bytes (a larger tensor alone) with their index.

    `tensors[name]()` makes a tensor when its turn comes; `sizes` are in bytes.
    """
    shards: list[list[str]] = [[]]
    for name in tensors:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > limit:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS, {name: make() for name, make in tensors.items()})
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, {name: tensors[name]() for name in names})
        weight_map |= dict.fromkeys(names, file)
    total = {"total_size": sum(sizes.values())}
    write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


def bytes_of(text: str) -> int:
    """'5GB' -> 5,000,000,000. Raises UsageError."""
    number, unit = text[:-2].strip(), text[-2:].upper()
    try:
        value = float(number) * UNITS[unit]
    except (KeyError, ValueError):
        value = 0
    if not 0 < value < 1 << 60:
        raise UsageError(f"shard size {text!r} is not a size", hint="such as 500MB or 5GB")
    return int(value)
