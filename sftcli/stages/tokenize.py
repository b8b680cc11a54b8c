"""sft tokenize: raw JSONL -> documents (tokens.jsonl)."""

from collections import Counter as Tally
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain

import msgspec

from sftcli import console
from sftcli.artifacts import json_line, open_output
from sftcli.errors import DataError, SftError, UsageError
from sftcli.recipe import Tokenize
from sftcli.rows import RESERVED, Document, encode_document
from sftcli.stages.common import Rejects, codec_for, keep_for_later, read_lines_of, template_for
from sftcli.text import pretokenized
from sftcli.text.records import Conversation, read_record, renamed
from sftcli.text.speaker import Rendered, Speaker
from sftcli.text.template import Template
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


def tokenize(options: Tokenize, model: str | None, output: str | None) -> Summary:
    """Run the stage: read every input, write documents, tell on stderr what was done."""
    if not options.data:
        raise UsageError("no data", hint="sft tokenize FILE... -m MODEL, or - for standard input")
    summary = Summary()
    with (
        open_output(output) as out,
        Rejects(options.on_error, options.rejects) as rejects,
        console.live() as line,
    ):
        codec = codec_for(model, options.tokenizer)
        template = template_for(codec, model, options.template, options.template_text, options.columns)
        keep_for_later(codec, template)
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
) -> Iterator[tuple[int, Iterator[bytes]]]:
    """(rows read, output lines) batch by batch; the next batch is rendered while this one is encoded."""
    batches = _batches(options, codec, template, summary)
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for batch in chain(batches, [None]):
            future = pool.submit(_encode, batch, codec) if batch else None
            if pending:
                yield len(pending[0]), _written(pending[0], pending[1].result(), codec, template, rejects, summary)
            pending = (batch, future) if batch and future else None


def _batches(options: Tokenize, codec: Codec, template: Template, summary: Summary) -> Iterator[list[_Item]]:
    """Lines in batches. What ends the input too early is the last item of the last batch: the rows before it count."""
    speaker = Speaker(template, codec.ends)
    batch: list[_Item] = []
    try:
        for where, line, fields in read_lines_of(options.data):
            summary.rows += 1
            try:
                if isinstance(fields, DataError):
                    raise fields
                conversation = _conversation(fields, where, options, template, summary)
                if conversation.shape == "tokens":
                    batch.append(_passed(line, fields, where, codec, summary))
                else:
                    batch.append(_Record(where, line, conversation, speaker.documents(conversation)))
            except DataError as error:
                if options.on_error == "fail":
                    raise error.located(where) from None
                batch.append(_Bad(line, error.located(where)))
            if len(batch) == BATCH:
                yield batch
                batch = []
    except SftError as error:
        batch.append(error)
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
    if document.tokenizer not in (None, codec.hash):
        raise DataError(f"tokenised with {document.tokenizer}, not with {codec.hash}", where, "$.tokenizer")
    top = max(document.input_ids)
    if top >= codec.size or min(document.input_ids) < 0:
        raise DataError(f"id {top} is beyond the vocabulary of {codec.size}", where, "$.input_ids")
    summary.documents += 1
    summary.tokens += len(document.input_ids)
    return json_line({"id": document.id} | fields | {"tokenizer": codec.hash})


def _encode(batch: list[_Item], codec: Codec) -> list[list[Encoded] | DataError]:
    """The documents of every record, encoded at once; if that fails, one by one, to know which line it was."""
    records = [item for item in batch if isinstance(item, _Record)]
    before = replace(codec.counts)
    try:
        encoded = iter(codec.encode([text for record in records for text in record.texts]))
        return [[next(encoded) for _ in record.texts] for record in records]
    except DataError:
        codec.counts = before
        return [_encode_one(record, codec) for record in records]


def _encode_one(record: _Record, codec: Codec) -> list[Encoded] | DataError:
    try:
        return codec.encode(record.texts)
    except DataError as error:
        return error.located(record.where)


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
    extra = {name: raw for name, raw in record.conversation.extra.items() if name not in RESERVED}
    summary.left_out |= record.conversation.extra.keys() - extra.keys()
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
        yield encode_document(document, extra)


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
    if summary.expanded:
        console.note(f"tokenize: the template rewrites history: {summary.expanded:,} rows became one document a turn")
    if codec.counts.merges_cut:
        console.note(
            f"tokenize: at {codec.counts.merges_cut:,} starts of the model's words the tokenizer would have merged "
            "across; the cut is kept, as generate feeds it"
        )
    if codec.counts.defused:
        console.note(f"tokenize: {codec.counts.defused:,} control strings in content were encoded as plain text")
