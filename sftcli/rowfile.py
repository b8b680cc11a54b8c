"""Rows as columns in a safetensors file: numbers flat with offsets, strings as bytes with offsets.

The format is eight bytes of header length, a JSON header, then the columns. It is written and read here without torch
or numpy, so that `sft mask` streams any number of rows in constant memory and `sft show` starts at once.
"""

import json
import mmap
import shutil
import struct
import tempfile
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, BinaryIO

from sftcli.artifacts import CHUNK
from sftcli.errors import CheckpointError, UsageError
from sftcli.rows import FORMAT, PER_TOKEN, Row
from sftcli.tensorheader import read_header
from sftcli.writing import atomic_file, cannot_write

TYPES = {"I64": ("q", 8), "F64": ("d", 8), "I32": ("i", 4), "U8": ("B", 1)}
FLAT = {"input_ids": "I32", "labels": "I32"} | dict.fromkeys(PER_TOKEN, "I32") | {"loss_weight": "F64"}
STRINGS = ("id", "align", "objective", "tokenizer", "template", "format", "source")
PER_TOKEN_DEFAULT: dict[str, Any] = {"loss_weight": 1.0, "block_position_ids": 0, "token_type_ids": 0}
GATHERED, MANY_ROWS = 1 << 15, 256  # tokens or rows whose columns are written at once
NONE = -1  # next_sentence_label of a row that has none


class _Column:
    """One column on its way to disk: values are gathered and go through a temporary file."""

    def __init__(self, dtype: str, folder: Path):
        self.dtype, self.count = dtype, 0
        self.values = array(TYPES[dtype][0])
        self.file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def extend(self, values: Any) -> None:
        before = len(self.values)
        self.values.extend(values)
        self.count += len(self.values) - before

    def append(self, value: int) -> None:
        self.values.append(value)
        self.count += 1

    def append_text(self, text: str) -> None:
        data = text.encode()
        self.values.frombytes(data)
        self.count += len(data)

    def flush(self) -> None:
        self.values.tofile(self.file)
        del self.values[:]


class RowFileWriter:
    """Collects rows into columns; `write_to` assembles the safetensors file."""

    def __init__(self, folder: Path):
        self.folder, self.rows, self.tokens, self.flushed = folder, 0, 0, 0
        self.columns: dict[str, _Column] = {}
        for name in ("offsets", "turns.offsets", "turns.role.offsets", *(f"{name}.offsets" for name in STRINGS)):
            self._column(name, "I64").append(0)
        for name, dtype in {"input_ids": "I32", "labels": "I32", "turns": "I32", "turns.role": "U8"}.items():
            self._column(name, dtype)
        for name in STRINGS:
            self._column(name, "U8")

    def _column(self, name: str, dtype: str) -> _Column:
        if name not in self.columns:
            self.columns[name] = _Column(dtype, self.folder)
        return self.columns[name]

    def append(self, row: Row) -> None:
        length = len(row.input_ids)
        for name, dtype in FLAT.items():
            values = getattr(row, name)
            if values is None and name not in self.columns:
                continue
            column = self._column(name, dtype)
            if missing := self.tokens - column.count:  # earlier rows had the default
                _fill(column, name, self, missing)
            column.extend(_default(name, length) if values is None else values)
        if row.next_sentence_label is not None or "next_sentence_label" in self.columns:
            column = self._column("next_sentence_label", "I32")
            column.extend([NONE] * (self.rows - column.count))
            column.append(NONE if row.next_sentence_label is None else row.next_sentence_label)
        for name in STRINGS:
            self._append_text(name, getattr(row, name))
        self._append_turns(row)
        self.rows += 1
        self.tokens += length
        self.columns["offsets"].append(self.tokens)
        if self.tokens - self.flushed > GATHERED or self.rows % MANY_ROWS == 0:
            self.flushed = self.tokens
            for column in self.columns.values():
                column.flush()

    def _append_text(self, name: str, text: str | None) -> None:
        column = self.columns[name]
        column.append_text(text or "")
        self.columns[f"{name}.offsets"].append(column.count)

    def _append_turns(self, row: Row) -> None:
        numbers, roles, ends = (self.columns[name] for name in ("turns", "turns.role", "turns.role.offsets"))
        for start, end, role, turn in row.turns or ():
            numbers.extend([start, end, turn])
            roles.append_text(role)
            ends.append(roles.count)
        self.columns["turns.offsets"].append(numbers.count // 3)

    def write_to(self, out: IO[bytes]) -> None:
        """Header, then every column, widest type first so that each lies aligned."""
        order = sorted(self.columns.items(), key=lambda item: (-TYPES[item[1].dtype][1], item[0]))
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "rows": str(self.rows)}}
        end = 0
        for name, column in order:
            start, end = end, end + column.count * TYPES[column.dtype][1]
            shape = [column.count // 3, 3] if name == "turns" else [column.count]
            header[name] = {"dtype": column.dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        out.write(struct.pack("<Q", len(text)) + text)
        for _, column in order:
            column.flush()
            column.file.seek(0)
            shutil.copyfileobj(column.file, out, CHUNK)
            column.file.close()


def _default(name: str, length: int) -> Any:
    """The default of a per-token column for one row of `length` tokens."""
    return [PER_TOKEN_DEFAULT[name]] * length if name in PER_TOKEN_DEFAULT else range(length)


def _fill(column: _Column, name: str, writer: RowFileWriter, missing: int) -> None:
    """A column that first differs from its default late: write the defaults of the rows before."""
    if name in PER_TOKEN_DEFAULT:
        for start in range(0, missing, GATHERED):
            column.extend(_default(name, min(GATHERED, missing - start)))
            column.flush()
        return
    offsets = writer.columns["offsets"]
    offsets.flush()
    offsets.file.seek(0)
    ends = array("q", offsets.file.read())
    for start, end in pairwise(ends):
        column.extend(range(end - start))
        if len(column.values) > GATHERED:
            column.flush()


def write_rows(path: str | Path, rows: Iterator[Row]) -> int:
    """Write rows to a safetensors file (atomically, in constant memory); returns how many."""
    try:
        writer = RowFileWriter(Path(path).absolute().parent)
        for row in rows:
            writer.append(row)
        with atomic_file(path) as out:
            writer.write_to(out)
    except OSError as error:  # the temporary files lie beside the output
        raise cannot_write(path, error) from None
    return writer.rows


class RowFile:
    """Random access to the rows of a safetensors file, through a memory map."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        try:
            with open(path, "rb") as file:
                columns, metadata, begin = read_header(file, path)
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))[begin:]
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        missing = {"input_ids", "labels", "offsets", "id", "align"} - set(columns)
        if missing or metadata.get("format") != FORMAT:
            told = f"{path} holds no rows (missing {', '.join(sorted(missing)) or 'format'})"
            raise CheckpointError(
                told, hint="`sft mask -o FILE.safetensors` writes rows; these may be a model's weights"
            )
        self.columns = {name: self._view(data, name, said) for name, said in columns.items()}
        self.offsets = self.columns["offsets"]
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raise CheckpointError where the columns of a damaged file do not fit together."""
        turns = len(self.columns.get("turns", ())) // 3
        sizes = [(name, "offsets", len(self)) for name in FLAT]
        sizes += [(name, f"{name}.offsets", len(self)) for name in STRINGS]
        sizes += [("turns", "turns.offsets", len(self)), ("turns.role", "turns.role.offsets", turns)]
        for name, ends, count in sizes:
            if name in self.columns:
                offsets = self.columns.get(ends)
                values = turns if name == "turns" else len(self.columns[name])
                if not offsets or len(offsets) != count + 1 or offsets[0] != 0 or offsets[-1] != values:
                    raise CheckpointError(f"{self.path} is damaged: {ends} does not describe column {name}")
        if any(start > end for start, end in pairwise(self.offsets.tolist())):
            raise CheckpointError(f"{self.path} is damaged: its offsets do not increase")

    def _view(self, data: memoryview, name: str, said: dict[str, Any]) -> memoryview:
        if said["dtype"] not in TYPES:
            raise CheckpointError(f"{self.path}: column {name} is stored as {said['dtype']}")
        start, end = said["data_offsets"]
        code: Any = TYPES[said["dtype"]][0]
        return data[start:end].cast(code)

    def __len__(self) -> int:
        return max(len(self.offsets) - 1, 0)

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def lengths(self) -> list[int]:
        """Tokens of every row."""
        ends = self.offsets.tolist()
        return [end - start for start, end in pairwise(ends)]

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(i)
        try:
            return self._row(i)
        except (IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path} is damaged: row {i + 1}: {error}") from None

    def _row(self, i: int) -> Row:
        start, end = self.offsets[i], self.offsets[i + 1]
        flat: dict[str, Any] = {name: self.columns[name][start:end].tolist() for name in FLAT if name in self.columns}
        length = end - start
        for name in PER_TOKEN:  # columns at their default are None again, as in JSON lines
            if name in flat and flat[name] == list(_default(name, length)):
                flat[name] = None
        texts: dict[str, Any] = {name: self._text(name, i) for name in STRINGS}
        for name in ("tokenizer", "template", "source"):
            texts[name] = texts[name] or None
        following = self.columns["next_sentence_label"][i] if "next_sentence_label" in self.columns else NONE
        return Row(**flat, **texts, turns=self._turns(i), next_sentence_label=None if following == NONE else following)

    def source(self, i: int) -> str | None:
        return self._text("source", i) or None

    def _text(self, name: str, i: int) -> str:
        if name not in self.columns:
            return ""
        ends = self.columns[f"{name}.offsets"]
        return bytes(self.columns[name][ends[i] : ends[i + 1]]).decode()

    def _turns(self, i: int) -> list[tuple[int, int, str, int]] | None:
        if "turns" not in self.columns:
            return None
        first, last = self.columns["turns.offsets"][i], self.columns["turns.offsets"][i + 1]
        numbers = self.columns["turns"]
        found = [
            (numbers[3 * t], numbers[3 * t + 1], self._text("turns.role", t), numbers[3 * t + 2])
            for t in range(first, last)
        ]
        return found or None


def is_row_file(path: str) -> bool:
    """Whether a file is safetensors rather than JSON lines: by its ending."""
    return path.endswith(".safetensors")
