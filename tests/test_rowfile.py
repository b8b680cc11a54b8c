"""Rows on disk: JSON lines and safetensors hold the same, and damaged files are refused."""

import json
import os
import stat
import struct

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftcli.errors import CheckpointError, DataError, Exit, SftError, UsageError
from sftcli.rowfile import FLAT, STRINGS, RowFile, write_rows
from sftcli.rows import FORMAT, Row, encode_row, read_rows_jsonl

ints = st.integers(-(2**31), 2**31 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def a_row(ids=(5, 6), labels=None, **columns):
    given_ = {"id": "r", "input_ids": list(ids), "labels": list(labels or ids), "align": "next", "objective": "causal"}
    return Row(**(given_ | {"tokenizer": None, "template": None, "format": FORMAT} | columns))


@st.composite
def rows(draw):
    """A row with any of the optional columns."""
    length = draw(st.integers(1, 6))
    column = lambda values: draw(st.none() | st.lists(values, min_size=length, max_size=length))
    spans = st.tuples(st.integers(0, length - 1), st.integers(1, length), texts, st.integers(0, 9))
    turns = [turn for turn in draw(st.lists(spans, max_size=3)) if turn[0] < turn[1]]
    return a_row(
        ids=draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)),
        labels=draw(st.lists(ints, min_size=length, max_size=length)),
        id=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
        align=draw(st.sampled_from(["next", "same"])),
        objective=draw(texts),
        tokenizer=draw(st.none() | texts),
        template=draw(st.none() | texts),
        source=draw(st.none() | texts),
        loss_weight=column(st.floats(0, 1e6)),
        position_ids=column(ints),
        block_position_ids=column(ints),
        order=column(ints),
        token_type_ids=column(ints),
        next_sentence_label=draw(st.none() | st.integers(0, 1)),
        turns=turns or None,
    )


def without_defaults(row):
    """The row as it is read: columns at their default are None."""
    length = len(row.input_ids)
    defaults = {"loss_weight": [1.0] * length, "block_position_ids": [0] * length, "token_type_ids": [0] * length}
    defaults |= {"position_ids": list(range(length)), "order": list(range(length))}
    return msgspec.structs.replace(
        row, **{name: None for name, value in defaults.items() if getattr(row, name) == value}
    )


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rows(), max_size=5))
def test_json_lines_and_safetensors_hold_equal_rows(tmp_path, some):
    columns, lines = tmp_path / "rows.safetensors", tmp_path / "rows.jsonl"
    assert write_rows(columns, iter(some)) == len(some)
    lines.write_bytes(b"".join(encode_row(row, {}) for row in some))
    from_lines = [row for _, row, _ in read_rows_jsonl(str(lines))]
    file = RowFile(columns)
    assert from_lines == some
    assert list(file) == [without_defaults(row) for row in some]
    assert file.lengths() == [len(row.input_ids) for row in some]


def test_columns_that_never_differ_from_their_default_are_not_written(tmp_path):
    write_rows(tmp_path / "r.safetensors", iter([a_row(), a_row([7, 8, 9])]))
    columns = RowFile(tmp_path / "r.safetensors").columns
    assert set(columns) & set(FLAT) == {"input_ids", "labels"}


@pytest.mark.parametrize("name", ["loss_weight", "position_ids", "order", "block_position_ids", "token_type_ids"])
def test_a_column_that_differs_late_has_its_default_in_the_rows_before_and_after(tmp_path, name):
    odd = a_row([7, 8, 9], **{name: [0.5, 1.0, 0.25] if name == "loss_weight" else [4, 4, 4]})
    some = [a_row(), a_row([1]), odd, a_row([2, 3, 4])]
    write_rows(tmp_path / "r.safetensors", iter(some))
    file = RowFile(tmp_path / "r.safetensors")
    assert list(file) == some
    plain = {"loss_weight": [1, 1], "position_ids": [0, 1], "order": [0, 1]}.get(name, [0, 0])
    assert file.columns[name][0:2].tolist() == plain
    assert len(file.columns[name]) == 9


def test_safetensors_itself_opens_our_file(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("numpy")
    some = [a_row([1, 2, 3], loss_weight=[1.0, 0.1, 0.5], turns=[(1, 3, "assistant", 0)], source="é"), a_row([4])]
    write_rows(tmp_path / "r.safetensors", iter(some))
    with safetensors.safe_open(tmp_path / "r.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": FORMAT, "rows": "2"}
        assert set(file.keys()) == set(RowFile(tmp_path / "r.safetensors").columns)
        assert file.get_tensor("input_ids").tolist() == [1, 2, 3, 4]
        assert file.get_tensor("offsets").tolist() == [0, 3, 4]
        assert file.get_tensor("loss_weight").tolist() == [1.0, 0.1, 0.5, 1.0]
        assert file.get_tensor("turns").tolist() == [[1, 3, 0]]
        assert bytes(file.get_tensor("source")).decode() == "é"
        assert file.get_tensor("input_ids").dtype == numpy.int32


def test_a_file_without_rows_is_a_file_of_no_rows(tmp_path):
    assert write_rows(tmp_path / "r.safetensors", iter([])) == 0
    file = RowFile(tmp_path / "r.safetensors")
    assert (len(file), list(file), file.lengths()) == (0, [], [])


def test_rows_are_read_by_number_and_an_error_beyond(tmp_path):
    write_rows(tmp_path / "r.safetensors", iter([a_row([i], id=str(i)) for i in range(9)]))
    file = RowFile(tmp_path / "r.safetensors")
    assert [file[i].id for i in (8, 0, 4)] == ["8", "0", "4"]
    for i in (9, -1):
        with pytest.raises(IndexError):
            file[i]


# ---- damage


def spoiled(tmp_path, change):
    """A good file after `change(header, data)`, which returns both again."""
    path = tmp_path / "r.safetensors"
    write_rows(path, iter([a_row([1, 2, 3], turns=[(1, 3, "assistant", 0)]), a_row([4, 5])]))
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header, data = change(json.loads(whole[8 : 8 + size]), whole[8 + size :])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def with_column(header, name, **change):
    return header | {name: header[name] | change}


DAMAGES = {
    "cut off": lambda header, data: (header, data[:-40]),
    "cut to the header": lambda header, data: (header, b""),
    "header is no JSON": lambda header, data: (b"{", data),
    "header is a list": lambda header, data: ([], data),
    "metadata is a list": lambda header, data: (header | {"__metadata__": []}, data),
    "header nested deeply": lambda header, data: (b"[" * 100_000, data),
    "another format": lambda header, data: (header | {"__metadata__": {"format": "other/1"}}, data),
    "no labels": lambda header, data: ({k: v for k, v in header.items() if k != "labels"}, data),
    "unknown type": lambda header, data: (with_column(header, "labels", dtype="I17"), data),
    "offsets before the start": lambda header, data: (with_column(header, "labels", data_offsets=[-4, 8]), data),
    "offsets are texts": lambda header, data: (with_column(header, "labels", data_offsets=["0", "8"]), data),
    "labels are short": lambda header, data: (with_column(header, "labels", data_offsets=[0, 4]), data),
    "ids of another row count": lambda header, data: (with_column(header, "id.offsets", data_offsets=[0, 8]), data),
    "no offsets of id": lambda header, data: ({k: v for k, v in header.items() if k != "id.offsets"}, data),
    "no offsets at all": lambda header, data: (with_column(header, "offsets", data_offsets=[0, 0]), data),
    "half a number": lambda header, data: (with_column(header, "labels", data_offsets=[0, 5]), data),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage):
    path = spoiled(tmp_path, DAMAGES[damage])
    with pytest.raises(CheckpointError) as caught:
        RowFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_offsets_that_go_back_are_refused(tmp_path):
    def swap(header, data):
        at = header["offsets"]["data_offsets"][0]
        return header, data[: at + 8] + struct.pack("<q", 99) + data[at + 16 :]

    with pytest.raises(CheckpointError, match="its offsets do not increase"):
        RowFile(spoiled(tmp_path, swap))


@pytest.mark.parametrize("content", [b"", b"1234567", b"{}\n" * 9, b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        RowFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["nothing.safetensors", "."])
def test_a_missing_file_and_a_folder_are_usage_errors(tmp_path, name):
    with pytest.raises(UsageError, match="cannot read"):
        RowFile(tmp_path / name)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_one_wrong_byte_gives_rows_or_one_of_our_errors(tmp_path, place, value):
    path = spoiled(tmp_path, lambda header, data: (header, data))
    whole = bytearray(path.read_bytes())
    whole[place % len(whole)] = value
    path.write_bytes(whole)
    try:
        list(RowFile(path))
    except SftError as error:
        assert str(error)


# ---- writing


def test_a_folder_that_is_not_there_and_a_full_disk_are_write_errors(tmp_path):
    with pytest.raises(SftError) as caught:
        write_rows(tmp_path / "no" / "r.safetensors", iter([a_row()]))
    assert caught.value.code == Exit.WRITE


def test_a_failing_row_leaves_nothing_behind(tmp_path):
    def some():
        yield a_row()
        raise DataError("the next line is bad")

    (tmp_path / "r.safetensors").write_bytes(b"what was there")
    with pytest.raises(DataError):
        write_rows(tmp_path / "r.safetensors", some())
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]
    assert (tmp_path / "r.safetensors").read_bytes() == b"what was there"


def test_files_have_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_rows(tmp_path / "r.safetensors", iter([a_row()]))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "r.safetensors").stat().st_mode) == 0o640


# ---- JSON lines


@pytest.mark.parametrize(
    "change, told",
    [
        ({"labels": [1]}, "1 values for 2 input_ids at $.labels"),
        ({"order": [0]}, "1 values for 2 input_ids at $.order"),
        ({"input_ids": [], "labels": []}, "empty row at $.input_ids"),
        ({"input_ids": [1, -1]}, "Expected `int` >= 0 at $.input_ids[1]"),
        ({"labels": [1, 2**31]}, "at $.labels[1]"),
        ({"align": "left"}, "Invalid enum value 'left' at $.align"),
        ({"format": "sft-rows/9"}, "rows of format 'sft-rows/9', this program reads sft-rows/1 at $.format"),
        ({"loss_weight": [-1, 1]}, "Expected `float` >= 0.0 at $.loss_weight[0]"),
        ({"turns": [[0, 3, "assistant", 0]]}, "a turn outside of 2 input_ids at $.turns"),
    ],
)
def test_rows_in_json_lines_are_checked(tmp_path, change, told):
    line = json.loads(encode_row(a_row(), {})) | change
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(DataError) as caught:
        list(read_rows_jsonl(str(path)))
    assert str(caught.value).startswith(f"{path}:1: ") and told in str(caught.value)


def test_a_line_that_is_no_row_says_where_rows_come_from(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="not a row: labels or align missing") as caught:
        list(read_rows_jsonl(str(tmp_path / "r.jsonl")))
    assert caught.value.hint == "rows come from `sft mask`"


def test_unknown_fields_come_back_beside_the_row(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(encode_row(a_row(), {"topic": msgspec.Raw(b"[1,  2]")}))
    ((where, row, extra),) = read_rows_jsonl(str(path))
    assert (where, row, {k: bytes(v) for k, v in extra.items()}) == (f"{path}:1", a_row(), {"topic": b"[1,  2]"})


def test_every_text_column_survives(tmp_path):
    row = a_row(id="ï\n\0", objective="o", tokenizer="t", template="u", source="s")
    write_rows(tmp_path / "r.safetensors", iter([row, a_row()]))
    assert list(RowFile(tmp_path / "r.safetensors")) == [row, a_row()]
    assert set(STRINGS) <= set(RowFile(tmp_path / "r.safetensors").columns)
