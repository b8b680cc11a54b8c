"""sft tokenize: raw JSONL -> documents (tokens.jsonl)."""

import os
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sftcli import console
from sftcli.errors import DataError, SftError, UsageError
from sftcli.recipe import Tokenize
from sftcli.rowfile import is_row_file
from sftcli.rows import REASONING, RESERVED, Document, encode_document
from sftcli.stages.common import (
    LULL,
    Rejects,
    codec_for,
    encode_lines,
    keep_for_later,
    read_lines_of,
    report_controls,
    template_for,
)
from sftcli.text import pretokenized
from sftcli.text.records import Conversation, read_record, renamed
from sftcli.text.speaker import REASONING_FIELDS, Rendered, Speaker
from sftcli.text.template import Template
from sftcli.text.tokenizer import Codec, Encoded, Work
from sftcli.writing import json_line, open_output

BATCH_ROWS, BATCH_BYTES = 128, 1 << 18  # of input, whose texts are encoded in one call of the library
PIECE_LINES = 32  # that are written at once
MAX_THREADS = 8  # more would wait for the one that reads, renders and writes
LIBRARY_THREADS = "TOKENIZERS_PARALLELISM"


@dataclass
class Summary:
    """What one run of the stage did."""

    rows: int = 0
    documents: int = 0
    rejected: int = 0
    tokens: int = 0
    own: int = 0
    expanded: int = 0
    shapes: Tally[str] = field(default_factory=Tally)
    with_tools: int = 0
    unwritten: int = 0  # turns whose reasoning the template leaves out
    left_out: set[str] = field(default_factory=set)  # fields of the data that have the name of a column of ours


@dataclass
class _Record:
    """A line on its way: its conversation and the texts to encode."""

    where: str
    line: bytes
    conversation: Conversation
    texts: list[Rendered]


@dataclass
class _Bad:
    """A line that is rejected when its turn comes."""

    line: bytes
    error: DataError


_Item = _Record | _Bad | SftError | bytes  # an error that ends the input; the output line of a row that came tokenised


@dataclass
class _Batch:
    """Lines that go through the library together, and its part of the work, if any, which is done in a thread."""

    items: list[_Item]
    work: Work | None
    encodings: Future[list[Any]] | None

    @property
    def ready(self) -> bool:
        return self.encodings is None or self.encodings.done()


def tokenize(options: Tokenize, model: str | None, output: str | None) -> Summary:
    """Run the stage: read every input, write documents, tell on stderr what was done."""
    if not options.data:
        raise UsageError("no data", hint="sft tokenize FILE... -m MODEL, or - for standard input")
    if output and is_row_file(output):
        told = f"-o {output}: documents are JSON lines"
        raise UsageError(told, hint="-o NAME.jsonl; `sft mask -o NAME.safetensors` writes such files")
    summary = Summary()
    with (
        open_output(output, options.data) as out,
        Rejects(options.on_error, options.rejects, options.data, output) as rejects,
        console.libraries_silenced(),
        console.live() as line,
    ):
        codec = codec_for(model, options.tokenizer, options.special_in_content)
        template = template_for(codec, model, options.template, options.template_text, options.columns)
        keep_for_later(codec, template)
        counter = console.Counter(line, "tokenize")
        for rows, encoded_lines in _lines(options, codec, template, rejects, summary):
            out.writelines(_in_pieces(encoded_lines))
            out.flush()
            counter.add(rows)
        line.clear()
        summary.rejected = rejects.count
        _report(summary, codec, template)
        if summary.rows and not summary.documents:
            raise DataError(f"nothing was tokenised: of {summary.rows:,} rows {summary.rejected:,} were rejected")
    return summary


def _in_pieces(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Lines joined, also those before an error: a reader of a pipe is woken for each piece."""
    held: list[bytes] = []
    try:
        for line in lines:
            held.append(line)
            if len(held) == PIECE_LINES:
                yield b"".join(held)
                held.clear()
    except SftError:
        yield b"".join(held)
        raise
    yield b"".join(held)


def _lines(
    options: Tokenize, codec: Codec, template: Template, rejects: Rejects, summary: Summary
) -> Iterator[tuple[int, Iterator[bytes]]]:
    """(rows read, output lines) batch by batch. While the library's threads encode, the next ones are rendered and what
    needs no library is encoded."""
    threads = _threads()
    waiting: deque[_Batch] = deque()

    def first() -> tuple[int, Iterator[bytes]]:
        batch = waiting.popleft()
        return len(batch.items), _written(batch.items, _encoded(batch, codec), codec, template, rejects, summary)

    with _calls_in_one_thread(), ThreadPoolExecutor(threads) as pool:
        try:
            for items, lull in _batches(options, codec, template, summary):
                waiting.append(_begun(items, codec, pool))
                while waiting and (lull or len(waiting) > threads or waiting[0].ready):
                    yield first()
            while waiting:
                yield first()
        finally:
            pool.shutdown(cancel_futures=True)


def _threads() -> int:
    """One more than there are cores: a thread that has encoded waits for the interpreter before it can go on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + 1, MAX_THREADS)


@contextmanager
def _calls_in_one_thread() -> Iterator[None]:
    """Let the library use one thread a call: ours make several calls at a time, and none waits for the longest text
    of each, nor do threads without work burn the time of those that have some."""
    before = os.environ.get(LIBRARY_THREADS)
    os.environ[LIBRARY_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[LIBRARY_THREADS]
        else:
            os.environ[LIBRARY_THREADS] = before


def _batches(
    options: Tokenize, codec: Codec, template: Template, summary: Summary
) -> Iterator[tuple[list[_Item], bool]]:
    """Lines in batches, and whether the input makes us wait: then they should go out before the next one comes.
    What ends the input too early is the last item of the last batch: the rows before it count."""
    speaker = Speaker(template, codec.ends)
    batch: list[_Item] = []
    size, waited, asked = 0, 0.0, time.monotonic()
    try:
        for where, line, fields, pause in read_lines_of(options.data):
            waited += time.monotonic() - asked
            lull = pause or waited > LULL
            summary.rows += 1
            size += len(line)
            try:
                batch.append(_item(where, line, fields, options, codec, speaker, summary))
            except DataError as error:
                if options.on_error == "fail":
                    raise error.located(where) from None
                batch.append(_Bad(line, error.located(where)))
            if len(batch) == BATCH_ROWS or size >= BATCH_BYTES or lull:
                yield batch, lull
                batch, size, waited = [], 0, 0.0
            asked = time.monotonic()
    except SftError as error:
        batch.append(error)
    yield batch, False


def _item(
    where: str,
    line: bytes,
    fields: dict[str, msgspec.Raw] | DataError,
    options: Tokenize,
    codec: Codec,
    speaker: Speaker,
    summary: Summary,
) -> _Item:
    if isinstance(fields, DataError):
        raise fields
    conversation = _conversation(fields, where, options, speaker.template, summary)
    if conversation.shape == "tokens":
        return _passed(line, fields, where, codec, summary)
    return _Record(where, line, conversation, speaker.documents(conversation))


def _conversation(
    fields: dict[str, msgspec.Raw], where: str, options: Tokenize, template: Template, summary: Summary
) -> Conversation:
    conversation = read_record(renamed(fields, options.columns, where), where, summary.rows, template.wanted)
    if conversation.shape not in summary.shapes:
        console.note(f"{where}: reading as {conversation.shape}")
    summary.shapes[conversation.shape] += 1
    summary.with_tools += bool(conversation.tools)
    return conversation


def _passed(line: bytes, fields: dict[str, msgspec.Raw], where: str, codec: Codec, summary: Summary) -> bytes:
    """A pretokenised line goes through as it is, once its ids are known to be the tokenizer's."""
    document, _ = pretokenized.read(line, fields, where, summary.rows)
    if document.tokenizer not in (None, codec.hash):
        raise DataError(f"tokenised with {document.tokenizer}, not with {codec.hash}", where, "$.tokenizer")
    top = max(document.input_ids)
    if top >= codec.size or min(document.input_ids) < 0:
        raise DataError(f"id {top} is beyond the vocabulary of {codec.size}", where, "$.input_ids")
    summary.documents += 1
    summary.tokens += len(document.input_ids)
    return json_line({"id": document.id} | fields | {"tokenizer": codec.hash})


def _begun(items: list[_Item], codec: Codec, pool: ThreadPoolExecutor) -> _Batch:
    try:
        work = codec.prepare([text for item in items if isinstance(item, _Record) for text in item.texts])
    except DataError:  # told when the turn of its line comes
        return _Batch(items, None, None)
    return _Batch(items, work, pool.submit(codec.run, work) if work.strings else None)


def _encoded(batch: _Batch, codec: Codec) -> list[list[Encoded] | DataError]:
    """The documents of every record, or why it has none."""
    work, encodings = batch.work, batch.encodings
    lines = [(item.where, item.texts) for item in batch.items if isinstance(item, _Record)]
    end = (lambda: codec.finish(work, encodings.result() if encodings else [])) if work else None
    return encode_lines(codec, lines, end)


def _written(
    batch: list[_Item],
    encoded: list[list[Encoded] | DataError],
    codec: Codec,
    template: Template,
    rejects: Rejects,
    summary: Summary,
) -> Iterator[bytes]:
    """The output lines of a batch, in input order; bad lines are rejected in theirs. Raises what ends the stage."""
    results = iter(encoded)
    for item in batch:
        if isinstance(item, bytes):
            yield item
        elif isinstance(item, SftError):
            raise item
        elif isinstance(item, _Bad):
            rejects.add(item.error, item.line)
        elif isinstance(result := next(results), DataError):
            rejects.add(result, item.line)
        else:
            yield from _documents(item, result, codec, template, summary)


def _documents(
    record: _Record, results: list[Encoded], codec: Codec, template: Template, summary: Summary
) -> Iterator[bytes]:
    extra = record.conversation.extra
    if not RESERVED.isdisjoint(extra):
        summary.left_out |= extra.keys() & RESERVED
        extra = {name: raw for name, raw in extra.items() if name not in RESERVED}
    summary.expanded += len(results) > 1
    summary.unwritten += _unwritten(record.conversation, results)
    for number, (ids, segments) in enumerate(results):
        summary.documents += 1
        summary.tokens += len(ids)
        summary.own += sum(segment.end - segment.start for segment in segments if segment.own)
        identity = record.conversation.id
        document = Document(
            id=f"{identity}.{number}" if len(results) > 1 else identity,
            input_ids=ids,
            segments=segments,
            source=record.conversation.source,
            tokenizer=codec.hash,
            template=template.hash,
        )
        yield encode_document(document, extra)


def _unwritten(conversation: Conversation, results: list[Encoded]) -> int:
    """How many turns have reasoning in a field of their message and none in what was made of them."""
    if all(len(message) == 2 for message in conversation.messages):  # role and content: most of them
        return 0
    named = [
        any(str(message.get(name) or "").strip() for name in REASONING_FIELDS) for message in conversation.messages
    ]
    return max(0, sum(named) - sum(s.own and s.role == REASONING for _, segments in results for s in segments))


def _report(summary: Summary, codec: Codec, template: Template) -> None:
    if summary.rows == 0:
        console.warn("tokenize: the input is empty")
        return
    kinds = [f"{count:,} {shape}" for shape, count in summary.shapes.items()]
    kinds += [f"{summary.with_tools:,} with tools"] if summary.with_tools else []
    shapes = f" ({', '.join(kinds)})" if kinds else ""
    console.note(
        f"tokenize: {summary.rows:,} rows in{shapes}, {summary.documents:,} documents, "
        f"{summary.rejected:,} rejected; {summary.tokens:,} tokens, {summary.own:,} the model's own; "
        f"template {template.name} {template.hash}, tokenizer {codec.hash}"
    )
    if summary.left_out:
        console.warn(
            f"tokenize: fields left out, as tokens and rows have such columns: {', '.join(sorted(summary.left_out))}"
        )
    if summary.unwritten:
        console.warn(f"tokenize: the template leaves out the reasoning of {summary.unwritten:,} turns")
    if summary.expanded:
        console.note(f"tokenize: the template rewrites history: {summary.expanded:,} rows became one document a turn")
    if codec.counts.merges_cut:
        console.note(
            f"tokenize: at {codec.counts.merges_cut:,} starts of the model's words the tokenizer would have merged "
            "across; the cut is kept, as generate feeds it"
        )
    report_controls("tokenize", codec)
