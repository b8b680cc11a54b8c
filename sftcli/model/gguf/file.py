"""A GGUF file: its fields and tensors, read lazily, and written tensor by tensor. Needs the extra `gguf`."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from sftcli.errors import CheckpointError, Exit, SftError, UsageError
from sftcli.writing import cannot_write, to_disk

KINDS = {"f16": 1, "bf16": 32, "q8_0": 7}  # general.file_type: "mostly" this
BLOCK = 32  # weights of a Q8_0 block; it runs along a row


def library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UsageError("GGUF files need the gguf library", hint="pip install 'sftcli[gguf]'") from None
    return gguf


@dataclass
class GGUF:
    """An open file: `fields` as plain values, `tensors` still packed as the library's reader has them."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Any]

    def field(self, key: str) -> Any:
        if key not in self.fields:
            raise CheckpointError(f"{self.path} has no {key}")
        return self.fields[key]

    def shape(self, name: str) -> list[int]:
        """Outputs first, as torch has it; the file says it the other way round."""
        return [int(size) for size in reversed(self.tensors[name].shape)]

    def read(self, name: str) -> Tensor:
        """A tensor in float32, whatever it is packed as. Raises CheckpointError."""
        packed = self.tensors[name]
        try:
            values = library().quants.dequantize(packed.data, packed.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} of type {packed.tensor_type.name} cannot be read: {error}"
            ) from None
        return torch.from_numpy(numpy.array(values, dtype=numpy.float32, order="C"))  # a copy: the file is read-only


def open_gguf(path: str) -> GGUF:
    """Read a file's fields and find its tensors. Raises CheckpointError for one that is damaged."""
    if Path(path).is_dir():
        raise CheckpointError(f"{path} is a folder, not a GGUF file", hint="-m takes model folders as they are")
    if not Path(path).is_file():
        raise CheckpointError(f"no file {path}")
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path} is not a GGUF file")
        reader = _reader_class()(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        told = re.sub(r"np\.\w+\((\d+)\)", r"\1", str(error))
        if "not a valid GGMLQuantizationType" in told:
            raise CheckpointError(f"{path}: tensor type {told}", hint="a newer gguf library may know it") from None
        raise CheckpointError(f"{path} is damaged: {told}") from None
    if reader.endianess == library().GGUFEndian.BIG:
        raise CheckpointError(f"{path} is big-endian, which is not supported")
    if fields.get("split.count", 0) not in (0, 1):
        raise CheckpointError(f"{path} is one of {fields['split.count']} parts", hint="llama-gguf-split --merge")
    return GGUF(Path(path), fields, {tensor.name: tensor for tensor in reader.tensors})


def _reader_class() -> Any:
    class Reader(library().GGUFReader):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            """A memmap is slow to take pieces of: a vocabulary of 128,000 took 13 s, and 4 as a plain array."""
            super().__setattr__(name, numpy.asarray(value) if name == "data" else value)

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            """The library reads past the end in silence, and then counts to whatever a damaged length says."""
            end = int(offset) + int(count) * numpy.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, but goes on to byte {end} by its own account")
            return super()._get(offset, dtype, count, override_order)

    return Reader


# ---- writing


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its name and shape, and whether it keeps float32 (norms, biases, positions)."""

    name: str
    shape: tuple[int, ...]
    full: bool


def write_gguf(
    path: Path, kind: str, architecture: str, fields: dict[str, Any], plan: list[Planned], tensors: Iterable[Tensor]
) -> None:
    """Write a file; `tensors` come in the order of the plan, one at a time."""
    with _writer(path, architecture) as writer:
        writer.add_file_type(KINDS[kind])
        writer.add_quantization_version(library().GGML_QUANT_VERSION)
        for key, value in fields.items():
            _add_field(writer, key, value)
        types = [_type_of(tensor, kind) for tensor in plan]
        for tensor, packed in zip(plan, types, strict=True):
            _add_tensor(writer, tensor, packed)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, packed, values in zip(plan, types, tensors, strict=True):
            writer.write_tensor_data(_pack(tensor.name, values, packed))


@contextmanager
def _writer(path: Path, architecture: str) -> Iterator[Any]:
    """The library's writer of a file that is there only when complete."""
    temporary = path.with_name(f".tmp-{path.name}")
    writer = library().GGUFWriter(temporary, architecture)
    try:
        yield writer
        for file in writer.fout:
            file.flush()
            if os.fstat(file.fileno()).st_size < file.tell():  # numpy lets errors of its last write go
                raise SftError(f"cannot write {path}: it ends early, is there room?", Exit.WRITE)
        writer.close()
        to_disk(temporary)
        temporary.replace(path)
        to_disk(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def _type_of(tensor: Planned, kind: str) -> Any:
    types = library().GGMLQuantizationType
    if tensor.full:
        return types.F32
    if kind == "q8_0" and tensor.shape[-1] % BLOCK:
        return types.F16  # as llama.cpp does where rows are not whole blocks
    return types[kind.upper()]


def _add_tensor(writer: Any, tensor: Planned, packed: Any) -> None:
    block, size = library().GGML_QUANT_SIZES[packed]
    shape, count = list(tensor.shape), int(numpy.prod(tensor.shape))
    dtypes = {"F32": numpy.float32, "F16": numpy.float16}
    dtype = numpy.dtype(dtypes.get(packed.name, numpy.uint8))
    if dtype == numpy.uint8:
        shape[-1] = shape[-1] // block * size  # in bytes: the writer turns it back
    writer.add_tensor_info(tensor.name, shape, dtype, count // block * size, raw_dtype=packed)


def _pack(name: str, values: Tensor, packed: Any) -> Any:
    floats = values.float().contiguous().numpy()
    if packed.name == "F32":
        return floats
    if packed.name == "F16":
        halves = values.half()
        if not torch.equal(halves.isfinite(), values.isfinite()):
            raise CheckpointError(f"tensor {name} has values beyond float16", hint="--gguf bf16")
        return halves.contiguous().numpy()
    return library().quants.quantize(floats, packed)


def _add_field(writer: Any, key: str, value: Any) -> None:
    """A field in the type that llama.cpp's converter gives it."""
    types = library().GGUFValueType
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_key_value(key, value, types.FLOAT32 if isinstance(value, float) else types.STRING)
