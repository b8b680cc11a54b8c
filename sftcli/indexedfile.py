"""GPT-NeoX's datasets: NAME.bin, the tokens of all documents, NAME.idx, where each begins, and NAME_label the same way.

NAME.idx   MMIDIDX\\0\\0  version  dtype  documents n  marks n + 1  n lengths  n byte offsets  n + 1 marks
           9 bytes       u64      u8     u64          u64          int32      int64           int64

Labels are not shifted; what is not trained is -100. Format: megatron/data/indexed_dataset.py (MMapIndexedDataset); the
pair of text and label as tools/datasets/preprocess_data_with_mask.py writes them.
"""

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import IO

from sftcli.errors import DataError, UsageError
from sftcli.lines import name_of
from sftcli.writing import atomic_file, json_line

HEAD = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
TYPES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}  # NeoX's numbers of integer types: array's
INT32 = 4  # holds every id and -100
LABELS = "_label"


def is_indexed(path: str) -> bool:
    return path.endswith((".bin", ".idx"))


def write_indexed(path: str, rows: Iterable[tuple[list[int], list[int]]]) -> int:
    """Write (ids, labels) as NAME.bin and NAME_label.bin with their .idx; returns the number of rows."""
    name = Path(path).with_suffix("")
    lengths = array("i")
    with ExitStack() as stack:

        def opened(end: str) -> IO[bytes]:
            return stack.enter_context(atomic_file(f"{name}{end}"))

        indexes = [opened(".idx"), opened(f"{LABELS}.idx")]  # first in, last out: no index without what it is of
        text, label = opened(".bin"), opened(f"{LABELS}.bin")
        for ids, labels in rows:
            text.write(_bytes("i", ids))
            label.write(_bytes("i", labels))
            lengths.append(len(ids))
        for file in indexes:
            file.write(_index(lengths))
    return len(lengths)


def _index(lengths: "array[int]") -> bytes:
    count = len(lengths)
    offsets = accumulate((4 * length for length in lengths[:-1]), initial=0) if count else ()
    head = HEAD.pack(MAGIC, 1, INT32, count, count + 1)
    return head + _bytes("i", lengths) + _bytes("q", offsets) + _bytes("q", range(count + 1))


def _bytes(kind: str, values: Iterable[int]) -> bytes:
    found = array(kind, values)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def indexed_lines(path: str) -> Iterator[tuple[str, bytes]]:
    """(file:document, the document as a line with `text` and `label`, as GPT-NeoX's rows have them).

    Without a label file beside it a document has no `label`: NeoX trains all of it. Raises UsageError, DataError."""
    name = str(Path(path).with_suffix(""))
    labels = _documents(name + LABELS) if Path(f"{name}{LABELS}.idx").exists() else None
    for number, text in enumerate(_documents(name), 1):
        where = f"{name_of(path)}:{number}"
        line: dict[str, str | list[int]] = {"id": str(number), "text": text}
        if labels is not None:
            label = next(labels, None)
            if label is None:
                raise DataError(f"{name}{LABELS} ends before {name}", where)
            line["label"] = label
        yield where, json_line(line)
    if labels is not None and next(labels, None) is not None:
        raise DataError(f"{name}{LABELS} has more documents than {name}")


def _documents(name: str) -> Iterator[list[int]]:
    """The token lists of one pair of files, one read at a time."""
    try:
        with open(f"{name}.idx", "rb") as index, open(f"{name}.bin", "rb") as data:
            kind, lengths, offsets = _read_index(index, f"{name}.idx")
            for number, (length, offset) in enumerate(zip(lengths, offsets, strict=True), 1):
                found = array(kind)
                data.seek(offset)
                block = data.read(length * found.itemsize)
                if len(block) < length * found.itemsize:
                    raise DataError("the file is shorter than its index says", f"{name}.bin:{number}")
                found.frombytes(block)
                yield _native(found).tolist()
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from None


def _read_index(file: IO[bytes], name: str) -> "tuple[str, array[int], array[int]]":
    """(array's letter for the tokens, length of every document, byte offset of every document)."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise DataError("not an index of GPT-NeoX (MMIDIDX)", name)
    _, version, code, count, _ = HEAD.unpack(head)
    if version != 1 or code not in TYPES:
        raise DataError(f"version {version} with tokens of type {code}, expected version 1 and integers", name)
    block = file.read(12 * count)
    if len(block) < 12 * count:
        raise DataError(f"the index is shorter than its {count:,} documents", name)
    lengths, offsets = array("i"), array("q")
    lengths.frombytes(block[: 4 * count])
    offsets.frombytes(block[4 * count :])
    lengths, offsets = _native(lengths), _native(offsets)
    if any(length < 0 for length in lengths) or any(offset < 0 for offset in offsets):
        raise DataError("a negative length or offset", name)
    return TYPES[code], lengths, offsets


def _native(values: "array[int]") -> "array[int]":
    """The files are little-endian."""
    if sys.byteorder == "big":
        values.byteswap()
    return values
