"""GPT-NeoX's binary datasets: what we write reads there, what is written there trains here."""

import os
import struct
from pathlib import Path

import pytest

from sftcli.rows import IGNORE

DOCUMENTS = [
    {"id": "1", "input_ids": [9, 9, 4, 5, 4, 5, 7], "labels": [IGNORE] * 4 + [4, 5, 7]},
    {"id": "2", "input_ids": [65_600, 0], "labels": [IGNORE, 0]},
    {"id": "3", "input_ids": [3, 8], "labels": [IGNORE, 8]},
]


def read_by_definition(name):
    """The documents of NAME.bin by MMapIndexedDataset's layout, each field read by its own rule."""
    index, data = (name.with_name(name.name + end).read_bytes() for end in (".idx", ".bin"))
    assert index[:9] == b"MMIDIDX\0\0"
    version, code, count, marks = struct.unpack_from("<QBQQ", index, 9)
    assert (version, code, marks) == (1, 4, count + 1)
    lengths = struct.unpack_from(f"<{count}i", index, 34)
    offsets = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    assert struct.unpack_from(f"<{marks}q", index, 34 + 12 * count) == tuple(range(marks))
    assert len(index) == 34 + 12 * count + 8 * marks and len(data) == 4 * sum(lengths)
    return [list(struct.unpack_from(f"<{n}i", data, at)) for n, at in zip(lengths, offsets, strict=True)]


def written_by_definition(name, documents, code, letter):
    data = b"".join(struct.pack(f"<{len(ids)}{letter}", *ids) for ids in documents)
    size = struct.calcsize(letter)
    offsets = [size * sum(map(len, documents[:i])) for i in range(len(documents))]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    index += struct.pack(f"<{len(documents)}i", *map(len, documents)) + struct.pack(f"<{len(documents)}q", *offsets)
    index += struct.pack(f"<{len(documents) + 1}q", *range(len(documents) + 1))
    name.with_name(name.name + ".bin").write_bytes(data)
    name.with_name(name.name + ".idx").write_bytes(index)


def masked(sft, *flags, code=0):
    result = sft("mask", *flags)
    assert result.code == code, result.err
    return result if code else [(row["input_ids"], row["labels"]) for row in result.rows]


def test_text_and_labels_are_written_as_gpt_neox_reads_them(sft, lines, tmp_path):
    assert sft("mask", lines(*DOCUMENTS), "--format", "neox", "-o", tmp_path / "train.bin").code == 0
    assert read_by_definition(tmp_path / "train") == [row["input_ids"] for row in DOCUMENTS]
    assert read_by_definition(tmp_path / "train_label") == [row["labels"] for row in DOCUMENTS]
    assert not list(tmp_path.glob(".tmp*"))


def test_an_index_is_published_after_what_it_is_of(sft, lines, tmp_path, monkeypatch):
    published = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (published.append(Path(b).name), replace(a, b)))
    assert sft("mask", lines(*DOCUMENTS), "--format", "neox", "-o", tmp_path / "train.bin").code == 0
    assert published == ["train_label.bin", "train.bin", "train_label.idx", "train.idx"]


def test_what_is_written_is_read_back_as_it_was(sft, lines, tmp_path):
    sft("mask", lines(*DOCUMENTS), "--format", "neox", "-o", tmp_path / "train.bin")
    expected = [(row["input_ids"], row["labels"]) for row in DOCUMENTS]
    for name in ("train.bin", "train.idx"):
        assert masked(sft, tmp_path / name) == expected


def test_ids_of_16_bits_and_a_dataset_without_labels(sft, tmp_path):
    """GPT-NeoX keeps the ids of a small vocabulary in 16 bits; without labels it trains everything."""
    written_by_definition(tmp_path / "text", [[5, 65_000], [7, 8, 9]], 8, "H")
    rows = masked(sft, tmp_path / "text.bin", "--train-on", "all")
    assert rows == [([5, 65_000], [5, 65_000]), ([7, 8, 9], [7, 8, 9])]
    assert "neither segments nor labels" in masked(sft, tmp_path / "text.bin", code=3).err


def test_eod_is_masked_by_gpt_neoxs_loader_and_not_in_its_labels(sft, lines, tmp_path):
    row = {"input_ids": [5, 0, 7], "labels": [5, 0, 7]}
    masked(sft, lines(row), "--eod-mask-loss", "0", "--format", "neox", "-o", tmp_path / "x.bin", code=0)
    assert read_by_definition(tmp_path / "x_label") == [[5, 0, 7]]


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda f: (f / "x.idx").write_bytes(b"TNTIDX\0\0" + bytes(40)), "x.idx: not an index of GPT-NeoX"),
        (lambda f: (f / "x.idx").write_bytes((f / "x.idx").read_bytes()[:50]), "shorter than its 2 documents"),
        (lambda f: (f / "x.bin").write_bytes(b"12345"), "x.bin:1: the file is shorter than its index says"),
        (lambda f: (f / "x.bin").unlink(), "x.bin: No such file or directory"),
        (lambda f: written_by_definition(f / "x_label", [[5, 6]], 4, "i"), "x_label ends before"),
        (lambda f: written_by_definition(f / "x_label", [[5, 6], [7], [8]], 4, "i"), "has more documents than"),
        (lambda f: written_by_definition(f / "x_label", [[5], [7]], 4, "i"), "1 values for 2 input_ids at $.label"),
        (lambda f: written_by_definition(f / "x", [[5.0, 6.0], [7.0]], 7, "d"), "tokens of type 7"),
        (lambda f: written_by_definition(f / "x", [[5, -6], [7]], 4, "i"), "at $.text[1]"),
    ],
)
def test_damaged_files_are_named_in_one_line(sft, tmp_path, damage, told):
    written_by_definition(tmp_path / "x", [[5, 6], [7]], 4, "i")
    damage(tmp_path)
    result = sft("mask", tmp_path / "x.bin", "--train-on", "all")
    assert result.code in (2, 3) and told in result.err and result.err.count("error:") == 1, result.err


def test_flags_that_do_not_fit_are_refused(sft, lines, tmp_path):
    for flags in ((), ("--format", "hf"), ("--format", "neox", "--seq-len", "8")):
        result = sft("mask", lines(*DOCUMENTS), *flags, "-o", tmp_path / "x.bin")
        assert result.code == 2 and "--format neox, without --seq-len" in result.err
    assert not list(tmp_path.glob("x*"))


def test_a_row_trains_from_binary_files(sft, base, tmp_path):
    written_by_definition(tmp_path / "x", [[5, 6, 7]] * 4, 4, "i")
    written_by_definition(tmp_path / "x_label", [[IGNORE, 6, 7]] * 4, 4, "i")
    rows = tmp_path / "rows.safetensors"
    assert sft("mask", tmp_path / "x.bin", "-o", rows).code == 0
    result = sft("train", rows, "-m", base, "-o", tmp_path / "run", "--set", "train.max_steps=1")
    assert result.code == 0 and "4 rows" in result.err, result.err
