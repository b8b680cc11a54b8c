"""Files of weights (safetensors): every header is read and checked first, then tensors come one at a time.

The data is mapped, and the pages of a tensor are given back as soon as it is copied, so that loading takes the memory
of the model and not twice as much.
"""

import ctypes
import json
import math
import mmap
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sftcli.artifacts import CHUNK
from sftcli.errors import CheckpointError, Exit, SftError, UsageError
from sftcli.reading import read_json
from sftcli.tensorheader import read_header
from sftcli.writing import write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # and what only checkpoints hold
NAMES |= {torch.float64: "F64", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
STORED = {name: dtype for dtype, name in NAMES.items()}
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


def read_entries(path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> list[Entry]:
    """What a safetensors file holds. Raises CheckpointError where header and file do not agree."""
    try:
        with open(path, "rb") as file:
            tensors, _, begin = read_header(file, path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return [
        Entry(path, name, _dtype(path, name, said["dtype"], dtypes), tuple(said["shape"]), begin + start, begin + end)
        for name, said in tensors.items()
        for start, end in [said["data_offsets"]]
    ]


def _dtype(path: Path, name: str, dtype: str, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    if dtype not in dtypes:
        raise _unloadable(path, name, dtype, dtypes)
    return dtypes[dtype]


def refuse_other_than_weights(entry: Entry) -> None:
    """Raises CheckpointError for a tensor that is stored as no weights are."""
    if entry.dtype not in DTYPES.values():
        raise _unloadable(entry.path, entry.name, NAMES[entry.dtype], DTYPES)


def _unloadable(path: Path, name: str, dtype: str, dtypes: Iterable[str]) -> CheckpointError:
    hint = f"only {', '.join(dtypes)} can be loaded"
    return CheckpointError(f"{path}: tensor {name} is stored as {dtype}", hint)


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Write safetensors; returns (bytes, crc32) of the file. Raises SftError (exit 4) for a number that is not finite.

    The library's own writer gives no error number where the disk is full, and publishes files with mode 0600.
    """
    size = crc = 0
    path.unlink(missing_ok=True)  # cutting off a file that somebody has mapped would kill them
    with open(path, "xb") as file:
        for data in _pieces(tensors):
            size, crc = size + len(data), zlib.crc32(data, crc)
            file.write(data)
    return size, crc


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, in pieces that the processor's cache holds from the sum to the write."""
    names = _in_order(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        value = tensors[name]
        start, end = end, end + value.nbytes
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        value = tensors[name].detach()
        if not is_finite(value):
            raise SftError(f"tensor {name} has a number that is not finite: it is not saved", Exit.DIVERGED)
        value = value.cpu().contiguous()  # lives until its last piece is written
        data = memory_of(value)
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The library's order: aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def memory_of(value: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory, which must outlive them."""
    return memoryview((ctypes.c_ubyte * value.nbytes).from_address(value.data_ptr()))


def is_finite(value: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity, by its extremes: one pass, no memory."""
    if not value.is_floating_point() or not value.numel():
        return True
    return all(bool(end.isfinite()) for end in value.detach().aminmax())


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
