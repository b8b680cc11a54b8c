"""The header of a safetensors file, read and checked without torch: a length in eight bytes, then JSON."""

import json
import os
from pathlib import Path
from typing import IO, Any

from sftcli.errors import CheckpointError
from sftcli.reading import no_duplicates

MAX_HEADER = 100_000_000  # bytes, as the library has it
BITS = {"C64": 64, "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8}
BITS |= {f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)}


def read_header(file: IO[bytes], path: str | Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """(what it says of each tensor, its metadata, the byte at which the data begins).

    Raises CheckpointError unless every byte of the data belongs to one tensor, whose type and shape need just so many.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(size - 8, MAX_HEADER):
        told = f"{size:,} bytes, with a header of {length:,}" if len(head) == 8 else f"{size} bytes"
        raise CheckpointError(f"{path} is not a safetensors file, or is cut off: {told}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=no_duplicates)
        metadata = header.pop("__metadata__", {})
        end = _end_of(header)
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from None
    if rest := size - 8 - length - end:
        told = f"{rest:,} bytes belong to no tensor" if rest > 0 else f"{-rest:,} bytes are missing"
        raise CheckpointError(f"{path} is damaged: {told}")
    return header, metadata, 8 + length


def _end_of(tensors: dict[str, dict[str, Any]]) -> int:
    """Where the last tensor ends; they lie end to end."""
    end = 0
    for name, said in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = said["data_offsets"]
        if type(start) is not int or start != end or type(stop) is not int or 8 * (stop - start) != _bits_of(said):
            raise ValueError(f"tensor {name} does not lie where it should")
        end = stop
    return end


def _bits_of(said: dict[str, Any]) -> int:
    count = BITS[said["dtype"]]
    for size in said["shape"]:
        if type(size) is not int or size < 0:
            raise ValueError(f"a shape of {said['shape']}")
        count *= size
    return count
