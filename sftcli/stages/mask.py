"""sft mask: documents -> rows; which tokens are trained."""

import hashlib
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

import msgspec

from sftcli import console, views
from sftcli.artifacts import text_folder
from sftcli.errors import DataError, UsageError
from sftcli.indexedfile import indexed_lines, is_indexed, write_indexed
from sftcli.reading import decode_json, line_fields
from sftcli.recipe import BlankInfilling, Causal, Mask, MaskedLM
from sftcli.rowfile import is_row_file, write_rows
from sftcli.rows import IGNORE, RESERVED, Document, Extra, Row, encode_row
from sftcli.stages.common import LULL, Input, Rejects, read_lines_of
from sftcli.text import pretokenized
from sftcli.text.folder import load_codec
from sftcli.text.objectives import blank_infilling, causal, masked_lm
from sftcli.text.store import recall_codec, recall_specials
from sftcli.text.tokenizer import Codec
from sftcli.writing import json_line, open_output, refuse_to_replace

MOSTLY_LOST = 0.1  # warn when more than this share of the rows is dropped


@dataclass
class Summary:
    """What one run of the stage did: rows in = kept + dropped, where the objective makes one row of each."""

    rows: int = 0
    kept: int = 0
    cut: int = 0
    dropped: Tally[str] = field(default_factory=Tally)
    first_dropped: dict[str, str] = field(default_factory=dict)  # file:line, by reason
    tokens: int = 0
    trained: int = 0
    turns: int = 0
    turn_ends: Tally[int] = field(default_factory=Tally)  # the last token of the model's turns ...
    trained_ends: Tally[int] = field(default_factory=Tally)  # ... and how often it is trained
    lost_fields: set[str] = field(default_factory=set)
    weights_lost: int = 0  # rows whose weights --format neox cannot hold
    tokenizers: set[str | None] = field(default_factory=set)


@dataclass
class Made:
    """A row, the document it came from and its weights before eod_mask_loss (GPT-NeoX keeps the two apart)."""

    row: Row
    document: Document
    weights: list[float]
    extra: Extra


@dataclass
class Read:
    """A line of the input as a document, with the weights that it may bring."""

    where: str  # file:line
    line: bytes
    document: Document
    given: list[float] | None
    extra: Extra


Maker = Callable[[Document, list[float] | None], list[tuple[Row, Document, list[float]]]]  # as in `Made`


def mask(options: Mask, source: str, output: str | None, show: int = 0, model: str | None = None) -> Summary:
    """Run the stage. `model` only names tokens in what is shown."""
    summary = Summary()
    to_columns = output is not None and is_row_file(output)
    to_index = output is not None and is_indexed(output)
    with ExitStack() as stack:
        out = None if to_columns or to_index else stack.enter_context(open_output(output, [source]))
        rejects = stack.enter_context(Rejects("skip", options.rejects, [source], output))
        line = stack.enter_context(console.live())
        _refuse(options, to_columns, to_index)
        if out is None:
            refuse_to_replace([source], str(output))
        codec = load_codec(text_folder(model)) if model else None
        read = _read(options, source, summary, out.flush if out else lambda: None)
        maker, read = _maker(options, codec, read)
        made = _shown(_counted(_made(options, maker, read, rejects, summary), line), show, codec, line)
        made = _accounted(made, summary, codec, line, to_columns or options.format != "rows")
        if to_index:
            write_indexed(str(output), (pretokenized.neox_document(item.row, item.weights) for item in made))
        elif out is None:
            write_rows(str(output), (item.row for item in made))
        else:
            out.writelines(_formatted(item, options) for item in made)
    return summary


def _refuse(options: Mask, to_columns: bool, to_index: bool) -> None:
    """Raise UsageError for options that do not fit together."""
    if to_index and (options.format != "neox" or options.seq_len):
        raise UsageError("a .bin file holds whole documents of GPT-NeoX", hint="--format neox, without --seq-len")
    if options.format == "neox" and not (options.seq_len or to_index):
        raise UsageError("--format neox needs --seq-len N, or -o NAME.bin")
    if options.seq_len and options.format != "neox":
        raise UsageError("--seq-len is the length of GPT-NeoX's rows", hint="--format neox, or --max-length")
    if options.format != "rows" and to_columns:
        raise UsageError(f"--format {options.format} is written as JSON lines", hint="choose another -o")
    if isinstance(options.objective, Causal):
        return
    kind, allowed = options.objective.kind, {"objective", "train_on", "max_length", "too_long", "rejects"}
    defaults = {name: field.default for name, field in type(options).model_fields.items()}
    if other := {name for name in defaults if getattr(options, name) != defaults[name]} - allowed - {"format"}:
        raise UsageError(f"objective {kind} chooses its own tokens: no {', '.join(sorted(other))}")
    turns = ("own", "last") if isinstance(options.objective, BlankInfilling) else ("own",)
    for name, usable in (("format", ("rows",)), ("train_on", turns), ("too_long", ("drop", "error"))):
        if getattr(options, name) not in usable:
            raise UsageError(f"objective {kind} has no {name} {getattr(options, name)}", hint=" or ".join(usable))


def _maker(options: Mask, codec: Codec | None, read: Iterator[Read]) -> tuple[Maker, Iterator[Read]]:
    """The objective as a function of a document (and the weights it may bring), and the documents as they come."""
    objective = options.objective
    known = lru_cache(maxsize=4)(lambda tokenizer: codec or recall_codec(tokenizer))

    def of_rows(rows: Callable[[Document, list[float] | None], list[Row]]) -> Maker:
        return lambda document, given: [
            (row, msgspec.structs.replace(document, segments=[]), []) for row in rows(document, given)
        ]

    if isinstance(objective, BlankInfilling):
        blank, train_on = objective, options.train_on
        return of_rows(lambda d, given: blank_infilling.rows(d, given, blank, train_on, known(d.tokenizer))), read
    if isinstance(objective, MaskedLM):
        masks, length, others = objective, options.max_length, None
        if masks.nsp:
            others = masked_lm.Others(masks.seed, lambda d: masked_lm.sentences_of(d, known(d.tokenizer)))
            read = others.ahead(read)
        return of_rows(lambda d, given: masked_lm.rows(d, masks, length, known(d.tokenizer), others)), read
    rule = causal.rule_of(options)
    return lambda document, given: [_causal(document, given, rule, options)], read


def _causal(
    document: Document, given: list[float] | None, rule: causal.Rule, options: Mask
) -> tuple[Row, Document, list[float]]:
    if given is not None and options.train_on == "own" and not options.roles:
        weights = given
    else:
        weights = causal.weights_of(document, rule, options)
    return causal.row_of(document, causal.after_eod(document, weights, options)), document, weights


def _accounted(
    made: Iterator[Made], summary: Summary, codec: Codec | None, line: console.Live, loses_fields: bool
) -> Iterator[Made]:
    """The rows, then the account of them. Raises DataError while the output is still open if none is left."""
    for item in made:
        if loses_fields:
            summary.lost_fields |= item.extra.keys()
        yield item
    line.clear()
    if codec:
        _report(summary, {token: codec.token_text(token) for token in codec.special_ids})
    else:
        _report(summary, recall_specials(next(iter(summary.tokenizers), None)))
    if summary.rows and not summary.kept:
        raise DataError(f"nothing is left to train: all {summary.rows:,} rows were dropped ({_reasons(summary)})")


def _read(options: Mask, source: str, summary: Summary, flush: Callable[[], None]) -> Iterator[Read]:
    """The lines of the input as documents. When the next one is asked for, what was made of those before is written."""
    flushed = time.monotonic()
    for where, line, fields, pause in _lines(source):
        if isinstance(fields, DataError):
            raise fields
        summary.rows += 1
        try:
            yield _document(line, fields, where, summary.rows, options)
        except DataError as error:
            raise error.located(where) from None
        if pause or time.monotonic() - flushed > LULL:
            flush()
            flushed = time.monotonic()


def _lines(source: str) -> Iterator[Input]:
    if not is_indexed(source):
        return read_lines_of([source])
    return ((where, line, line_fields(line, where), False) for where, line in indexed_lines(source))


def _made(options: Mask, maker: Maker, read: Iterator[Read], rejects: Rejects, summary: Summary) -> Iterator[Made]:
    """Every document that leaves something to train, as rows that fit; the others are counted by reason."""
    limit = _limit(options)
    seen: set[bytes] = set()
    for item in read:
        reasons: list[str] = []
        before = summary.kept
        try:
            for made in maker(item.document, item.given):
                try:
                    yield _fitted(Made(*made, item.extra), limit, options, summary, seen)
                except causal.NothingTrained as nothing:  # of one row: the document may have others
                    reasons.append(str(nothing))
        except causal.NothingTrained as nothing:
            reasons.append(str(nothing))
        except DataError as error:
            raise error.located(item.where) from None
        summary.dropped.update(reasons)
        for reason in reasons:
            summary.first_dropped.setdefault(reason, item.where)
        if reasons and rejects.path and summary.kept == before:  # else a part of it would be trained twice
            rejects.add(DataError(reasons[0], item.where), item.line)


def _refuse_duplicate(row: Row, seen: set[bytes]) -> None:
    """Raise NothingTrained for a row that trains what one before it has trained; 16 bytes of each are remembered."""
    key = hashlib.blake2b(msgspec.json.encode((row.input_ids, row.labels, row.loss_weight)), digest_size=16).digest()
    if key in seen:
        raise causal.NothingTrained("duplicate")
    seen.add(key)


def _fitted(made: Made, limit: int | None, options: Mask, summary: Summary, seen: set[bytes]) -> Made:
    """The row, no longer than it may be. Raises NothingTrained."""
    if not made.row.trained():
        silent = _needs_turns(options) and not options.roles and not any(s.own for s in made.document.segments)
        raise causal.NothingTrained("no turn of the model" if silent and made.document.segments else "nothing trained")
    if too_long := limit is not None and len(made.row.input_ids) > limit:
        if options.too_long == "error":
            raise DataError(f"{len(made.row.input_ids)} tokens, more than {limit}", None, "$.input_ids")
        made = _cut(made, limit, options.too_long)
    if options.drop_duplicates:
        _refuse_duplicate(made.row, seen)
    summary.cut += too_long
    _count(made, summary)
    summary.weights_lost += options.format == "neox" and made.row.loss_weight is not None
    return made


def _document(line: bytes, fields: dict[str, msgspec.Raw], where: str, number: int, options: Mask) -> Read:
    if "segments" in fields:
        document = decode_json(line, where, Document)
        _check_segments(document, where)
        given = None
    elif pretokenized.is_tokens(fields):
        document, given = pretokenized.read(line, fields, where, number)
        if given is None and _needs_turns(options):
            raise DataError(
                "input_ids with neither segments nor labels nor loss_mask",
                where,
                hint="or say --train-on all|after:IDS",
            )
    else:
        raise DataError(
            f"not a document: the line has {', '.join(fields)}", where, hint="documents come from `sft tokenize`"
        )
    known = RESERVED | pretokenized.known(fields)
    return Read(where, line, document, given, {name: raw for name, raw in fields.items() if name not in known})


def _needs_turns(options: Mask) -> bool:
    """Whether the objective asks whose words are where."""
    if isinstance(options.objective, BlankInfilling):
        return options.objective.level == "sft"
    if isinstance(options.objective, MaskedLM):
        return False
    return options.train_on in ("own", "own-final", "own-reasoning", "last")


def _check_segments(document: Document, where: str) -> None:
    if not document.input_ids:
        raise DataError("no tokens", where, "$.input_ids")
    at = 0
    for i, segment in enumerate(document.segments):
        if not at <= segment.start < segment.end <= len(document.input_ids) or not segment.weight >= 0:
            raise DataError("segment out of order or outside of the ids", where, f"$.segments[{i}]")
        at = segment.end


def _limit(options: Mask) -> int | None:
    """The most tokens a row may have; GPT-NeoX's rows have seq_len + 1 (inputs and targets)."""
    limits = [options.max_length, options.seq_len + 1 if options.format == "neox" and options.seq_len else None]
    return min((limit for limit in limits if limit is not None), default=None)


def _cut(made: Made, limit: int, policy: str) -> Made:
    start, end = causal.window(made.row, limit, policy)
    row = causal.slice_row(made.row, start, end)
    if not row.trained():
        raise causal.NothingTrained("too long: the cut left nothing to train")
    segments = [
        msgspec.structs.replace(s, start=max(s.start, start) - start, end=min(s.end, end) - start)
        for s in made.document.segments
        if s.start < end and s.end > start
    ]
    return Made(row, msgspec.structs.replace(made.document, segments=segments), made.weights[start:end], made.extra)


def _formatted(item: Made, options: Mask) -> bytes:
    if options.format == "hf":
        return json_line(pretokenized.huggingface(item.row))
    if options.format == "neox":
        return json_line(pretokenized.neox(item.row, item.weights, options.seq_len or 0))
    return encode_row(item.row, item.extra)


def _shown(made: Iterator[Made], count: int, codec: Codec | None, line: console.Live) -> Iterator[Made]:
    """Print the first rows on their way."""
    for item in islice(made, count):
        line.clear()
        names = codec or recall_codec(item.row.tokenizer) or views.Numbers()
        views.show_row(item.row, names, item.document.segments)
        yield item
    yield from made


def _counted(made: Iterator[Made], line: console.Live) -> Iterator[Made]:
    counter = console.Counter(line, "mask")
    for item in made:
        yield item
        counter.add(1)


# ---- the account on stderr


def _count(made: Made, summary: Summary) -> None:
    row = made.row
    summary.kept += 1
    summary.tokens += len(row.input_ids)
    summary.trained += row.trained()
    summary.tokenizers.add(row.tokenizer)
    if len(summary.tokenizers) > 1:
        raise DataError(f"rows of two tokenizers in one input: {' and '.join(sorted(map(str, summary.tokenizers)))}")
    for _, end, _, _ in row.turns or ():
        summary.turns += 1
        summary.turn_ends[row.input_ids[end - 1]] += 1
        summary.trained_ends[row.input_ids[end - 1]] += row.labels[end - 1] != IGNORE


def _report(summary: Summary, specials: dict[int, str] | None) -> None:
    if summary.rows == 0:
        console.warn("mask: the input is empty")
        return
    dropped = sum(summary.dropped.values())
    reasons = f" ({_reasons(summary)})" if dropped else ""
    share = summary.trained / max(summary.tokens, 1)
    console.note(
        f"mask: {summary.rows:,} rows in, {summary.kept:,} kept, {summary.cut:,} cut, {dropped:,} dropped{reasons}; "
        f"{summary.trained:,} of {summary.tokens:,} tokens trained ({share:.0%})"
    )
    if dropped > MOSTLY_LOST * (summary.kept + dropped):
        console.warn(f"mask: {dropped / (summary.kept + dropped):.0%} of the rows were dropped")
    if summary.lost_fields:
        lost = ", ".join(sorted(summary.lost_fields))
        console.note(f"mask: not kept: {lost} (rows in JSON lines keep such fields: -o ROWS.jsonl)")
    if summary.weights_lost:
        console.warn(
            f"mask: GPT-NeoX's labels hold no weights: {summary.weights_lost:,} rows are trained in full there"
        )
    _report_stops(summary, specials)


def _reasons(summary: Summary) -> str:
    """`2 no match, first chat.jsonl:7`, for each reason."""
    return "; ".join(
        f"{count:,} {reason}, first {summary.first_dropped[reason]}" for reason, count in summary.dropped.items()
    )


def _report_stops(summary: Summary, specials: dict[int, str] | None) -> None:
    """How often each stop token is trained; a model whose stop token is not trained never stops."""
    if not summary.turns:
        return
    ends = {t: n for t, n in summary.turn_ends.items() if specials is None or t in specials}
    if specials is None and len(ends) > 8:  # ids alone do not tell a stop token from a last word
        return
    for token in ends:
        name = specials[token] if specials else f"id {token}"
        trained = summary.trained_ends[token]
        console.note(f"mask: stop token {name} ({token}) is trained {trained:,} times in {summary.turns:,} turns")
        if not trained:
            console.warn(f"mask: the stop token {name} is never trained: the model will not learn to stop")
    if not ends:
        console.warn("mask: no turn of the model ends with a special token: the model will not learn to stop")
