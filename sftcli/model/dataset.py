"""Rows on disk as a model is to see them: checked against it, split, and what ends their turns."""

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from sftcli.errors import DataError, UsageError
from sftcli.model.batches import shuffled, weight_of
from sftcli.model.gpt import TOKEN_TYPES, GPTConfig
from sftcli.rowfile import NONE, RowFile, is_row_file
from sftcli.rows import IGNORE, Row, read_rows_jsonl

POSITIONS = {"position_ids", "block_position_ids"}
WEIGHT = "a weight is negative or not finite"
HELD_OUT_EPOCH = (1 << 20) - 1  # the shuffle that picks held-out rows: no epoch of a run


def column(rows: RowFile, name: str) -> Tensor:
    """A column of a row file as a tensor over the same memory (not to be written to)."""
    view = rows.columns[name]
    kind = {"q": torch.int64, "i": torch.int32, "d": torch.float64, "B": torch.uint8}[view.format]
    return torch.frombuffer(view, dtype=kind) if len(view) else torch.empty(0, dtype=kind)


def check_rows(rows: RowFile, config: GPTConfig, where: str) -> None:
    """Raise DataError for the first row that does not fit the model (length, ids), or if nothing is trained."""
    if len(rows) == 0:
        raise DataError("no rows to train on", where, hint="see what `sft mask` said it dropped")
    offsets = column(rows, "offsets")
    lengths = offsets.diff()
    if (long := (lengths > config.context).nonzero()).numel():
        i = int(long[0])
        raise DataError(
            f"row {rows[i].id!r} (number {i + 1}) has {int(lengths[i])} tokens, the model's context is "
            f"{config.context} ({len(long):,} such rows)",
            where,
            hint=f"sft mask --max-length {config.context}",
        )
    for name, what in (("input_ids", "id"), ("labels", "label")):
        values = column(rows, name)
        outside = (values < 0) | (values >= config.vocab_size)
        if name == "labels":
            outside &= values != IGNORE
        if (found := outside.nonzero()).numel():
            token = int(found[0])
            i = int((offsets <= token).sum()) - 1
            raise DataError(
                f"row {rows[i].id!r} (number {i + 1}) has {what} {int(values[token])}, "
                f"the model's vocabulary has {config.vocab_size}",
                where,
                f"$.{name}",
            )
    for name in POSITIONS & rows.columns.keys():
        outside = (column(rows, name) < 0) | (column(rows, name) >= config.context)
        if (found := outside.nonzero()).numel():
            i = int((offsets <= int(found[0])).sum()) - 1
            raise DataError(f"row {rows[i].id!r} (number {i + 1}): {_off(config)}", where, f"$.{name}")
    for name, least, most in (("token_type_ids", 0, types_of(config) - 1), ("next_sentence_label", NONE, 1)):
        if name in rows.columns and bool(((values := column(rows, name)) < least).any() or (values > most).any()):
            for row in rows:  # one of them
                check_halves(row, config, where)
    if "loss_weight" in rows.columns:
        weights = column(rows, "loss_weight")
        if (found := (~weights.isfinite() | (weights < 0)).nonzero()).numel():
            i = int((offsets <= int(found[0])).sum()) - 1
            raise DataError(f"row {rows[i].id!r} (number {i + 1}): {WEIGHT}", where, "$.loss_weight")
    if not any(weight_of([row]) for row in rows):
        raise DataError("no token of any row is trained", where)


def _off(config: GPTConfig) -> str:
    return f"a position outside of the model's context of {config.context}"


def types_of(config: GPTConfig) -> int:
    """How many token types there are, or will be once the model is trained on rows that have them."""
    return config.token_types or TOKEN_TYPES


def check_halves(row: Row, config: GPTConfig, where: str) -> None:
    """Raise DataError for token types or a next-sentence label that there are not."""
    types = types_of(config)
    if outside := [value for value in row.token_type_ids or () if not 0 <= value < types]:
        raise DataError(f"row {row.id!r} has token type {outside[0]} of {types}", where, "$.token_type_ids")
    if row.next_sentence_label not in (None, 0, 1):
        told = f"row {row.id!r}: {row.next_sentence_label} is neither 0 (is next) nor 1 (random)"
        raise DataError(told, where, "$.next_sentence_label")


def check_tokenizer(made_with: str | None, tokenizer: str, where: str) -> None:
    """Raise UsageError for rows of another tokenizer than the model's (both by hash; rows may not say)."""
    if made_with and made_with != tokenizer:
        raise UsageError(
            f"{where}: rows were tokenised with tokenizer {made_with}, the model has {tokenizer}",
            hint="run `sft tokenize` and `sft mask` again with this -m",
        )


def fitting_rows(path: str, config: GPTConfig, tokenizer: str) -> Iterator[Row]:
    """Rows of a file (or `-`) as they come, each checked against the model as `check_rows` does."""
    if is_row_file(path):
        found = ((path, row) for row in RowFile(path))
    else:
        found = ((where, row) for where, row, _ in read_rows_jsonl(path))
    for where, row in found:
        check_tokenizer(row.tokenizer, tokenizer, where)
        if len(row.input_ids) > config.context:
            reason = f"row {row.id!r} has {len(row.input_ids)} tokens, the model's context is {config.context}"
            raise DataError(reason, where, hint=f"sft mask --max-length {config.context}")
        labels = [label for label in row.labels if label != IGNORE]
        for name, what, values in (("input_ids", "id", row.input_ids), ("labels", "label", labels)):
            outside = [value for value in values if not 0 <= value < config.vocab_size]
            if outside:
                reason = f"row {row.id!r} has {what} {outside[0]}, the model's vocabulary has {config.vocab_size}"
                raise DataError(reason, where, f"$.{name}")
        for name in POSITIONS:
            if any(not 0 <= value < config.context for value in getattr(row, name) or ()):
                raise DataError(f"row {row.id!r}: {_off(config)}", where, f"$.{name}")
        if any(not 0 <= weight < math.inf for weight in row.loss_weight or ()):
            raise DataError(f"row {row.id!r}: {WEIGHT}", where, "$.loss_weight")
        check_halves(row, config, where)
        _refuse_lacking(row, config, where)
        yield row


def _refuse_lacking(row: Row, config: GPTConfig, where: str) -> None:
    """Raise DataError for a row that needs what an objective would have added to the model."""
    needs = {
        "table of block positions": bool(row.block_position_ids) and not config.block_positions,
        "table of token types": any(row.token_type_ids or ()) and not config.token_types,
        "head for next sentences": row.next_sentence_label is not None and not config.nsp_head,
    }
    for name, lacking in needs.items():
        if lacking:
            hint = "`sft train` on such rows adds it"
            raise DataError(f"row {row.id!r} needs a {name}, which the model lacks", where, hint=hint)


def trained_stops(rows: RowFile, special_ids: Collection[int]) -> list[int]:
    """The special tokens that end a turn of the model (without turns: a run of labels) and are trained there."""
    said, offsets = column(rows, "labels"), column(rows, "offsets")  # under `align: same` not the id that stands there
    trained = said != IGNORE
    ends = trained & ~torch.cat([trained[1:], torch.zeros(1, dtype=torch.bool)])  # last token of each run of labels
    ends[offsets[1:] - 1] |= trained[offsets[1:] - 1]
    turns = column(rows, "turns").view(-1, 3)
    of_row = column(rows, "turns.offsets").diff()
    if len(turns):
        in_row = torch.repeat_interleave(torch.arange(len(rows)), of_row)
        has_turns = torch.repeat_interleave(of_row > 0, offsets.diff())
        ends &= ~has_turns
        last = offsets[in_row] + turns[:, 1].long() - 1
        ends[last] |= trained[last]
    found = said[ends & trained].unique().tolist()
    return [token for token in found if token in special_ids]


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(rows to train on, held-out rows): a pure function of (count, share, seed), each in file order."""
    if not share:
        return list(range(count)), []
    held = min(max(1, round(share * count)), count - 1)
    order = shuffled(count, seed, HELD_OUT_EPOCH)
    return sorted(order[held:]), sorted(order[:held])
