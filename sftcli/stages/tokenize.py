"""sft tokenize: raw JSONL -> documents (tokens.jsonl)."""

from collections import Counter as Tally
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

import msgspec

from sftcli import console
from sftcli.artifacts import json_line, open_output
from sftcli.errors import DataError, UsageError
from sftcli.recipe import Tokenize
from sftcli.rows import Document, encode_document
from sftcli.stages.common import Rejects, codec_for, keep_for_later, read_lines_of, template_for
from sftcli.text import pretokenized
from sftcli.text.records import Conversation, read_record, renamed
from sftcli.text.template import Rendered, Speaker, Template
from sftcli.text.tokenizer import Codec, Encoded

BATCH = 512  # records whose texts are encoded in one call of the library


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


@dataclass
class _Record:
    """A line on its way: its conversation and the texts to encode."""

    where: str
    line: bytes
    conversation: Conversation
    texts: list[Rendered]


@dataclass
class _Batch:
    records: list[_Record]
    passed: list[tuple[int, bytes]]  # (place before which it goes, a line that was tokenised already)
    error: DataError | None = None  # what ended the input


def tokenize(options: Tokenize, model: str | None, output: str | None) -> Summary:
    """Run the stage: read every input, write documents, tell on stderr what was done."""
    if not options.data:
        raise UsageError("no data", hint="sft tokenize FILE... -m MODEL, or - for standard input")
    codec = codec_for(model, options.tokenizer)
    template = template_for(codec, model, options.template, options.template_text, options.columns)
    keep_for_later(codec, template)
    summary = Summary()
    with (
        Rejects(options.on_error, options.rejects) as rejects,
        open_output(output) as out,
        console.live() as line,
    ):
        counter = console.Counter(line, "tokenize")
        for rows, encoded_lines in _lines(options, codec, template, rejects, summary):
            out.writelines(encoded_lines)
            out.flush()
            counter.add(rows)
    summary.rejected = rejects.count
    _report(summary, codec, template)
    return summary


def _lines(
    options: Tokenize, codec: Codec, template: Template, rejects: Rejects, summary: Summary
) -> Iterator[tuple[int, list[bytes]]]:
    """(rows read, output lines) batch by batch; the next batch is rendered while this one is encoded."""
    batches = _batches(options, codec, template, rejects, summary)
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for batch in chain(batches, [None]):
            future = pool.submit(_encode, batch, codec, rejects) if batch else None
            if pending:
                done, encoded, error = pending[0], *pending[1].result()
                yield len(done.records) + len(done.passed), _written(done, encoded, codec, template, summary)
                if error or done.error:
                    raise error or done.error  # type: ignore[misc]
            pending = (batch, future) if batch and future else None


def _batches(
    options: Tokenize, codec: Codec, template: Template, rejects: Rejects, summary: Summary
) -> Iterator[_Batch]:
    """Records in batches; a bad line ends the batch before it, or is rejected."""
    speaker = Speaker(template, codec.ends)
    batch = _Batch([], [])
    for where, line, fields in read_lines_of(options.data):
        try:
            if isinstance(fields, DataError):
                raise fields
            summary.rows += 1
            conversation = _conversation(fields, where, options, template, summary)
            if conversation.shape == "tokens":
                batch.passed.append((len(batch.records), _passed(line, fields, where, codec, summary)))
            else:
                batch.records.append(_Record(where, line, conversation, speaker.documents(conversation)))
        except DataError as error:
            try:
                rejects.add(error.located(where), line)
            except DataError as final:
                batch.error = final
                break
        if len(batch.records) >= BATCH:
            yield batch
            batch = _Batch([], [])
    yield batch


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
    top = max(document.input_ids)
    if top >= codec.size or min(document.input_ids) < 0:
        raise DataError(f"id {top} is beyond the vocabulary of {codec.size}", where, "$.input_ids")
    summary.tokens += len(document.input_ids)
    return json_line({"id": document.id} | fields | {"tokenizer": codec.hash})


def _encode(batch: _Batch, codec: Codec, rejects: Rejects) -> tuple[list[list[Encoded] | None], DataError | None]:
    """Encode a batch at once; if that fails, one by one, to know which line it was."""
    texts = [text for record in batch.records for text in record.texts]
    try:
        encoded = iter(codec.encode(texts))
        return [[next(encoded) for _ in record.texts] for record in batch.records], None
    except DataError:
        results: list[list[Encoded] | None] = []
        for record in batch.records:
            try:
                results.append(codec.encode(record.texts))
            except DataError as error:
                try:
                    rejects.add(error.located(record.where), record.line)
                except DataError as final:
                    return results, final
                results.append(None)
        return results, None


def _written(
    batch: _Batch, encoded: list[list[Encoded] | None], codec: Codec, template: Template, summary: Summary
) -> list[bytes]:
    """The output lines of a batch, in input order."""
    lines: list[bytes] = []
    passed = iter([*batch.passed, (len(batch.records) + 1, b"")])
    place, kept = next(passed)
    for i, (record, results) in enumerate(zip(batch.records, encoded, strict=False)):
        while place <= i:
            lines.append(kept)
            place, kept = next(passed)
        lines += _documents(record, results or [], codec, template, summary)
    if len(encoded) == len(batch.records):
        lines += [line for place, line in batch.passed if place >= len(batch.records)]
    return lines


def _documents(
    record: _Record, results: list[Encoded], codec: Codec, template: Template, summary: Summary
) -> Iterator[bytes]:
    summary.expanded += len(results) > 1
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
        yield encode_document(document, record.conversation.extra)


def _report(summary: Summary, codec: Codec, template: Template) -> None:
    if summary.rows == 0:
        console.warn("tokenize: the input is empty")
        return
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in summary.shapes.items())
    tools = f", {summary.with_tools:,} with tools" if summary.with_tools else ""
    console.note(
        f"tokenize: {summary.rows:,} rows in ({shapes}{tools}), {summary.documents:,} documents, "
        f"{summary.rejected:,} rejected; {summary.tokens:,} tokens, {summary.own:,} the model's own; "
        f"template {template.name} {template.hash}, tokenizer {codec.hash}"
    )
    if summary.expanded:
        console.note(f"tokenize: the template rewrites history: {summary.expanded:,} rows became one document a turn")
    if codec.counts.merges_cut:
        console.note(
            f"tokenize: at {codec.counts.merges_cut:,} starts of the model's words the tokenizer would have merged "
            "across; the cut is kept, as generate feeds it"
        )
    if codec.counts.defused:
        console.note(f"tokenize: {codec.counts.defused:,} control strings in content were encoded as plain text")
