"""Rows that somebody else tokenised: `input_ids` with `labels` or `loss_mask` (Hugging Face), or GPT-NeoX's `text`
and `label`; in and out."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from sftcli.errors import DataError
from sftcli.reading import decode_json
from sftcli.rows import IGNORE, Document, Row, Segment, TokenId

NEOX_PAD = 0  # GPT-NeoX pads text with 0 and labels with -100

KNOWN = frozenset(
    {"id", "input_ids", "labels", "loss_mask", "loss_weight", "attention_mask", "weight", "source", "tokenizer"}
    | {"template"}
)
NEOX = frozenset({"text", "label", "tokens"})  # beside `labels` and `loss_mask`, which there belong to the targets


class Line(msgspec.Struct, kw_only=True):
    """What a pretokenised line may say. A `loss_mask` one shorter than the ids is the targets', else the ids' own."""

    loss_mask: list[float] | None = None
    loss_weight: list[float] | None = None
    attention_mask: list[int] | None = None
    weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    id: str | int | None = None
    source: str | None = None
    tokenizer: str | None = None
    template: str | None = None


class Tokens(Line, kw_only=True):
    """Our columns, which are Hugging Face's."""

    input_ids: list[TokenId]
    labels: list[int] | None = None


class NeoxTokens(Line, kw_only=True):
    """GPT-NeoX's: `label` is not shifted yet, `labels` and `loss_mask` are (and the mask knows more than the label)."""

    input_ids: list[TokenId] = msgspec.field(name="text")
    labels: list[int] | None = msgspec.field(name="label", default=None)


def is_tokens(fields: Mapping[str, msgspec.Raw]) -> bool:
    """Whether a line is tokenised already."""
    return "input_ids" in fields or is_neox(fields)


def is_neox(fields: Mapping[str, msgspec.Raw]) -> bool:
    """Whether a line is a row of GPT-NeoX: its `text` is a list of ids."""
    return "input_ids" not in fields and "text" in fields and bytes(fields["text"]).startswith(b"[")


def known(fields: Mapping[str, msgspec.Raw]) -> frozenset[str]:
    """The fields of a pretokenised line that are read; all others pass through."""
    return KNOWN | NEOX if is_neox(fields) else KNOWN


def read(
    line: bytes, fields: Mapping[str, msgspec.Raw], where: str, number: int
) -> tuple[Document, list[float] | None]:
    """The document of a pretokenised line and, if it brings a mask, its weights. Raises DataError with the field."""
    neox = is_neox(fields)
    given = decode_json(line, where, NeoxTokens) if neox else decode_json(line, where, Tokens)
    ids = given.input_ids
    if not ids:
        raise DataError("no tokens", where, "$.text" if neox else "$.input_ids")
    weights = _weights(given, where)
    start, end = (0, _neox_end(ids, weights)) if neox else _attended(given.attention_mask, weights, len(ids), where)
    ids, weights = ids[start:end], weights and weights[start:end]
    document = Document(
        id=str(number if given.id is None else given.id),
        input_ids=ids,
        segments=[] if given.weight == 1 else [Segment(0, len(ids), "tokens", False, given.weight)],
        source=given.source,
        tokenizer=given.tokenizer,
        template=given.template,
    )
    weights = weights and [given.weight * weight for weight in weights]
    if weights and math.inf in weights:
        raise DataError("the weights of row and tokens are too large together", where, "$.weight")
    return document, weights


def _weights(given: Tokens | NeoxTokens, where: str) -> list[float] | None:
    """One weight a token, as the line's labels or its loss_mask say."""
    ids, length = given.input_ids, len(given.input_ids)
    if given.loss_mask is not None and (given.labels is None or isinstance(given, NeoxTokens)):
        found = _checked(given.loss_mask, "loss_mask", (length, length - 1), where)
        first = float(given.labels is not None and given.labels[:1] == ids[:1])  # no target: only a label can tell
        return [first] * (length - len(found)) + found
    if given.labels is None:
        return None
    if isinstance(given, NeoxTokens):
        return _weights_of_labels([IGNORE if label < 0 else label for label in given.labels], ids, "label", where)
    weights = _weights_of_labels(given.labels, ids, "labels", where)
    factors = _checked(given.loss_weight or [1.0] * length, "loss_weight", (length,), where)
    return [weight * factor for weight, factor in zip(weights, factors, strict=True)]


def _checked(weights: list[float], name: str, lengths: tuple[int, ...], where: str) -> list[float]:
    if len(weights) not in lengths:
        raise DataError(f"{len(weights)} values for {lengths[0]} input_ids", where, f"$.{name}")
    if any(not 0 <= weight < float("inf") for weight in weights):
        raise DataError("a weight must be 0 or more", where, f"$.{name}")
    return weights


def _neox_end(ids: list[int], weights: list[float] | None) -> int:
    """Where the padding of a row of GPT-NeoX begins: it is no part of the text."""
    end = len(ids)
    while weights and end > 1 and ids[end - 1] == NEOX_PAD and not weights[end - 1]:
        end -= 1
    return end


def _attended(mask: list[int] | None, weights: list[float] | None, length: int, where: str) -> tuple[int, int]:
    """The tokens of a Hugging Face row between its pads, which `attention_mask` marks with 0 on either side."""
    if mask is None:
        return 0, length
    if len(mask) != length:
        raise DataError(f"{len(mask)} values for {length} input_ids", where, "$.attention_mask")
    if 1 not in mask:
        raise DataError("no tokens but pads", where, "$.attention_mask")
    start, end = mask.index(1), length - mask[::-1].index(1)
    if any(value != 1 for value in mask[start:end]):
        raise DataError("not 0 for pads at an end and 1 for tokens", where, "$.attention_mask")
    if weights and any(weights[:start] + weights[end:]):
        hint = "attention_mask does not mask the loss: give pads the label -100"
        raise DataError("a pad is trained", where, "$.attention_mask", hint)
    return start, end


def _weights_of_labels(labels: list[int], ids: list[int], name: str, where: str) -> list[float]:
    if len(labels) != len(ids):
        raise DataError(f"{len(labels)} values for {len(ids)} input_ids", where, f"$.{name}")
    for i, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (IGNORE, token):
            hint = None
            if labels[:-1] == [x if x == IGNORE else t for x, t in zip(labels, ids[1:], strict=False)]:
                hint = "these labels are shifted already; give them as they stand under their own tokens"
            raise DataError(f"label {label} under token {token}", where, f"$.{name}[{i}]", hint)
    return [0.0 if label == IGNORE else 1.0 for label in labels]


# ---- out, for other projects


def huggingface(row: Row) -> dict[str, Any]:
    """Columns as transformers' data collators take them: labels unshifted."""
    line: dict[str, Any] = {"id": row.id, "input_ids": row.input_ids, "labels": row.labels}
    line["attention_mask"] = [1] * len(row.input_ids)
    if row.loss_weight is not None:
        line["loss_weight"] = row.loss_weight
    return line


def neox_document(row: Row, trained: list[float]) -> tuple[list[int], list[int]]:
    """GPT-NeoX's `text` and `label` of a row, unpadded."""
    return row.input_ids, [token if weight else IGNORE for token, weight in zip(row.input_ids, trained, strict=True)]


def neox(row: Row, trained: list[float], seq_len: int) -> dict[str, Any]:
    """GPT-NeoX's view of a row: `text` and `label` of seq_len + 1, and the batch it makes of them.

    `trained`: the weights before eod_mask_loss, which NeoX applies apart (its mask, not its labels).
    Source: megatron/training.py:get_batch_pipe, megatron/utils.py:get_ltor_masks_and_position_ids.
    """
    pad = seq_len + 1 - len(row.input_ids)
    ids, labels = neox_document(row, trained)
    text, label = ids + [NEOX_PAD] * pad, labels + [IGNORE] * pad
    return {
        "id": row.id,
        "text": text,
        "label": label,
        "tokens": text[:-1],
        "labels": [max(value, 0) for value in label[1:]],
        "loss_mask": [int(value != IGNORE) for value in (row.labels + [IGNORE] * pad)[1:]],
    }
