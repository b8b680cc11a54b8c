"""The contract between the stages: documents (tokens.jsonl) and rows (what is trained), one JSON line each."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec

from sftcli.errors import DataError
from sftcli.reading import decode_json, read_objects
from sftcli.writing import json_line

IGNORE = -100  # a label that is not trained (Hugging Face's ignore_index)
FORMAT = "sft-rows/1"

Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]  # as safetensors columns hold them
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
REASONING = "reasoning"  # the role of own words up to the end of what closes the reasoning; the turn goes on behind it
Turn = tuple[Int32, Int32, str, Int32]  # start, end, role, number of the turn
PER_TOKEN = ("loss_weight", "position_ids", "block_position_ids", "order", "token_type_ids")


class Segment(msgspec.Struct, array_like=True, frozen=True):
    """Tokens start..end (exclusive) with one role. `own`: they are the model's own words; `weight` 0 = not trained."""

    start: int
    end: int
    role: str
    own: bool
    weight: float = 1.0


def own_turns(segments: Sequence[Segment]) -> list[Segment]:
    """The turns of the model, one segment each: a turn's reasoning and what follows it are one turn."""
    found: list[Segment] = []
    reasoned: Segment | None = None
    for segment in segments:
        if not segment.own:
            continue
        if reasoned and reasoned.end == segment.start:
            found[-1] = Segment(found[-1].start, segment.end, segment.role, True, segment.weight)
        else:
            found.append(segment)
        reasoned = segment if segment.role == REASONING else None
    return found


class Document(msgspec.Struct, kw_only=True):
    """A tokenised conversation: facts about the text, no objective yet."""

    id: str
    input_ids: list[TokenId]
    segments: list[Segment]
    source: str | None = None
    tokenizer: str | None = None
    template: str | None = None


class Row(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is trained. `labels[t]` belongs to `input_ids[t]` and is never shifted here (`align` says how it is scored).

    Columns that are None have their default: loss_weight 1.0, position_ids and order 0..n-1, the others 0.
    """

    id: str
    input_ids: list[TokenId]
    labels: list[Int32]
    align: Literal["next", "same"]
    objective: str
    tokenizer: str | None
    template: str | None
    format: str
    loss_weight: list[Annotated[float, msgspec.Meta(ge=0)]] | None = None
    position_ids: list[Int32] | None = None
    block_position_ids: list[Int32] | None = None
    order: list[Int32] | None = None
    token_type_ids: list[Int32] | None = None
    next_sentence_label: Int32 | None = None
    source: str | None = None
    turns: list[Turn] | None = None

    def trained(self) -> int:
        """How many positions are scored: a label on the first token of a causal row has nothing before it."""
        first = 1 if self.align == "next" else 0
        return len(self.labels) - first - self.labels[first:].count(IGNORE)


DOCUMENT_FIELDS = frozenset(Document.__struct_fields__)
ROW_FIELDS = frozenset(Row.__struct_fields__)
RESERVED = DOCUMENT_FIELDS | ROW_FIELDS  # a field of the data with such a name would be taken for a column of ours
Extra = dict[str, msgspec.Raw]


def encode_document(document: Document, extra: Extra) -> bytes:
    """One JSON line: the document, its record's unknown fields as they came, the two hashes last."""
    line: dict[str, Any] = {"id": document.id, "input_ids": document.input_ids, "segments": document.segments}
    if document.source is not None:
        line["source"] = document.source
    line |= extra
    return json_line(line | {"tokenizer": document.tokenizer, "template": document.template})


def encode_row(row: Row, extra: Extra) -> bytes:
    """One JSON line: the row without columns at their default, then its record's unknown fields."""
    if not extra:
        return json_line(row)
    columns = {name: value for name in row.__struct_fields__ if (value := getattr(row, name)) is not None}
    return json_line({"tokenizer": None, "template": None} | columns | extra)


def check_row(row: Row, where: str) -> None:
    """Raise DataError where the columns of a row do not fit together."""
    length = len(row.input_ids)
    if length == 0:
        raise DataError("empty row", where, "$.input_ids")
    for name in ("labels", *PER_TOKEN):
        column = getattr(row, name)
        if column is not None and len(column) != length:
            raise DataError(f"{len(column)} values for {length} input_ids", where, f"$.{name}")
    if any(not 0 <= start < end <= length for start, end, _, _ in row.turns or ()):
        raise DataError(f"a turn outside of {length} input_ids", where, "$.turns")


def read_rows_jsonl(path: str) -> Iterator[tuple[str, Row, Extra]]:
    """Yield (file:line, row, unknown fields) of a rows file in JSON lines."""
    for where, line, fields in read_objects(path):
        if "labels" not in fields or "align" not in fields:
            raise DataError("not a row: labels or align missing", where, hint="rows come from `sft mask`")
        row = decode_json(line, where, Row)
        if row.format != FORMAT:
            raise DataError(f"rows of format {row.format!r}, this program reads {FORMAT}", where, "$.format")
        check_row(row, where)
        yield where, row, {name: raw for name, raw in fields.items() if name not in ROW_FIELDS}
