"""Rows that somebody else tokenised: `input_ids` with `labels` or `loss_mask`, in and out."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from sftcli.artifacts import decode_json
from sftcli.errors import DataError
from sftcli.rows import IGNORE, Document, Row, Segment, TokenId

NEOX_PAD = 0  # GPT-NeoX pads text with 0 and labels with -100

KNOWN = {"id", "input_ids", "labels", "loss_mask", "attention_mask", "weight", "source", "tokenizer", "template"}


class Tokens(msgspec.Struct):
    """A pretokenised line. A `loss_mask` one shorter than the ids is the targets' (GPT-NeoX), else the ids' own."""

    input_ids: list[TokenId]
    labels: list[int] | None = None
    loss_mask: list[float] | None = None
    weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    id: str | int | None = None
    source: str | None = None
    tokenizer: str | None = None
    template: str | None = None


def read(
    line: bytes, fields: Mapping[str, msgspec.Raw], where: str, number: int
) -> tuple[Document, list[float] | None]:
    """The document of a pretokenised line and, if it brings a mask, its weights. Raises DataError with the field."""
    given = decode_json(line, where, Tokens)
    length = len(given.input_ids)
    if not length:
        raise DataError("no tokens", where, "$.input_ids")
    identity = str(number if given.id is None else given.id)
    document = Document(
        id=identity,
        input_ids=given.input_ids,
        segments=[] if given.weight == 1 else [Segment(0, length, "tokens", False, given.weight)],
        source=given.source,
        tokenizer=given.tokenizer,
        template=given.template,
    )
    if given.labels is not None:
        return document, [given.weight * w for w in _weights_of_labels(given.labels, given.input_ids, where)]
    if given.loss_mask is not None:
        if len(given.loss_mask) not in (length, length - 1):
            raise DataError(f"{len(given.loss_mask)} values for {length} input_ids", where, "$.loss_mask")
        if any(not 0 <= weight < float("inf") for weight in given.loss_mask):
            raise DataError("a weight must be 0 or more", where, "$.loss_mask")
        return document, [0.0] * (length - len(given.loss_mask)) + [given.weight * w for w in given.loss_mask]
    return document, None


def _weights_of_labels(labels: list[int], ids: list[int], where: str) -> list[float]:
    if len(labels) != len(ids):
        raise DataError(f"{len(labels)} values for {len(ids)} input_ids", where, "$.labels")
    for i, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (IGNORE, token):
            hint = None
            if labels[:-1] == [x if x == IGNORE else t for x, t in zip(labels, ids[1:], strict=False)]:
                hint = "these labels are shifted already; give them as they stand under their own tokens"
            raise DataError(f"label {label} under token {token}", where, f"$.labels[{i}]", hint)
    return [0.0 if label == IGNORE else 1.0 for label in labels]


# ---- out, for other projects


def huggingface(row: Row) -> dict[str, Any]:
    """Columns as transformers' data collators take them: labels unshifted."""
    line: dict[str, Any] = {"id": row.id, "input_ids": row.input_ids, "labels": row.labels}
    line["attention_mask"] = [1] * len(row.input_ids)
    if row.loss_weight is not None:
        line["loss_weight"] = row.loss_weight
    return line


def neox(row: Row, trained: list[float], seq_len: int) -> dict[str, Any]:
    """GPT-NeoX's view of a row: `text` and `label` of seq_len + 1, and the batch it makes of them.

    `trained`: the weights before eod_mask_loss, which NeoX applies apart (its mask, not its labels).
    Source: megatron/training.py:get_batch_pipe, megatron/utils.py:get_ltor_masks_and_position_ids.
    """
    pad = seq_len + 1 - len(row.input_ids)
    text = row.input_ids + [NEOX_PAD] * pad
    label = [token if weight else IGNORE for token, weight in zip(row.input_ids, trained, strict=True)] + [IGNORE] * pad
    return {
        "id": row.id,
        "text": text,
        "label": label,
        "tokens": text[:-1],
        "labels": [max(value, 0) for value in label[1:]],
        "loss_mask": [int(value != IGNORE) for value in (row.labels + [IGNORE] * pad)[1:]],
    }
