"""Prompts on their way to the model: lines of the input, read as they come, rendered and encoded some ahead."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import msgspec

from sftcli import console
from sftcli.errors import DataError, SftError
from sftcli.model.growth import Blanks, Prompt
from sftcli.reading import decode_json
from sftcli.recipe import Generate
from sftcli.rows import Document, Extra, own_turns
from sftcli.stages.common import LULL, encode_lines, read_lines_of
from sftcli.text import pretokenized
from sftcli.text.objectives.blank_infilling import Filler
from sftcli.text.objectives.masked_lm import Cloze
from sftcli.text.records import read_record, renamed
from sftcli.text.speaker import SCAFFOLD, Rendered, Speaker
from sftcli.text.template import Template
from sftcli.text.tokenizer import Codec

READ_AHEAD = 256  # prompts encoded in one call of the library, where so many come at once
Filling = Filler | Cloze  # GLM's blanks, BERT's masks


@dataclass
class Asked:
    """What the output line of a prompt repeats."""

    fields: Extra
    reference: str | None
    sample: int
    row: Sequence[int] = ()  # what was fed


@dataclass
class _Record:
    """An input line that was read: `text` is rendered, or the ids of a line that was tokenised already."""

    where: str  # file:line
    fields: Extra
    reference: str | None
    key: str  # of its random stream
    text: Rendered | list[int]
    pause: bool  # the next line does not come at once


_Batch = tuple[list[_Record], bool]  # records that come together, and whether the input pauses after them


class Prompts:
    """The prompts of an input, `options.n` times each. `asked`: of those that were given out, in the same order."""

    def __init__(
        self,
        options: Generate,
        source: str,
        codec: Codec,
        template: Template,
        vocabulary: int,
        filler: Filling | None,
    ):
        self.options, self.source, self.codec, self.filler = options, source, codec, filler
        self.speaker, self.wanted, self.vocabulary = Speaker(template, codec.ends), template.wanted, vocabulary
        self.asked: deque[Asked] = deque()
        self.read = 0  # lines
        self.shapes: set[str] = set()
        self._unread: list[SftError] = []
        self._failed: list[SftError] = []  # of lines before the one that could not be read

    @property
    def errors(self) -> list[SftError]:
        """What ended the reading, known once the rows before it are answered."""
        return self._failed + self._unread

    def groups(self) -> Iterator[Iterator[Prompt]]:
        """The prompts between two pauses of the input: they are answered before the next line is read."""
        batches = _batches(_until_error(self._records(), self._unread))
        for batch in batches:
            yield _until_error(self._up_to_pause(chain([batch], batches)), self._failed)
            if self._failed:
                return

    def _records(self) -> Iterator[_Record]:
        """Read and render the lines of the input."""
        for where, line, fields, pause in read_lines_of([self.source]):
            if isinstance(fields, DataError):
                raise fields
            self.read += 1
            try:
                yield self._record(line, fields, where, pause)
            except DataError as error:
                raise error.located(where) from None

    def _record(self, line: bytes, fields: dict[str, msgspec.Raw], where: str, pause: bool) -> _Record:
        record = read_record(renamed(fields, self.options.columns, where), where, self.read, self.wanted)
        if record.shape not in self.shapes:
            console.note(f"{where}: reading as {record.shape}")
            self.shapes.add(record.shape)
        if record.shape == "tokens":
            document, weights = pretokenized.read(line, fields, where, self.read)
            starts = [t for t, weight in enumerate(weights or ()) if weight]
            if "segments" in fields:
                starts = _answered(decode_json(line, where, Document))
            end = next(iter(starts), len(document.input_ids))
            return _Record(where, fields, None, record.id, document.input_ids[:end], pause)
        if isinstance(self.filler, Filler) and record.shape == "text":  # its end is seen by what fills it, too
            opened = self.filler.opened(self.speaker.documents(record)[0])
            return _Record(where, fields, None, record.id, opened, pause)
        rendered, reference = self.speaker.prompt(record)
        rendered = self.filler.opened(rendered) if self.filler else rendered
        return _Record(where, fields, reference, record.id, rendered, pause)

    def _up_to_pause(self, batches: Iterator[_Batch]) -> Iterator[Prompt]:
        for batch, pause in batches:
            yield from self._encoded(batch)
            if pause:
                return

    def _encoded(self, batch: list[_Record]) -> Iterator[Prompt]:
        for record, tokens in zip(batch, self._ids(batch), strict=True):
            if not tokens:
                raise DataError("the prompt is empty", record.where)
            if outside := [token for token in tokens if not 0 <= token < self.vocabulary]:
                told = f"id {outside[0]}, the model's vocabulary has {self.vocabulary}"
                raise DataError(told, record.where, "$.input_ids")
            blanks = None
            if isinstance(self.filler, Filler):
                tokens, places = self.filler.with_blanks(tokens)
                blanks = Blanks(places, self.filler.marks.sop)
            elif self.filler:
                tokens = _row(self.filler, tokens, record.where)
            for sample in range(self.options.n):
                self.asked.append(Asked(record.fields, record.reference, sample, tokens))
                yield Prompt(tokens, record.key, sample, blanks)

    def _ids(self, batch: list[_Record]) -> Iterator[list[int]]:
        """The ids of every record, up to the first that cannot be encoded."""
        texts = [(record.where, [record.text]) for record in batch if isinstance(record.text, Rendered)]
        results = iter(encode_lines(self.codec, texts))
        for record in batch:
            if not isinstance(record.text, Rendered):
                yield record.text
            elif isinstance(result := next(results), DataError):
                raise result
            else:
                yield result[0][0]


def _answered(document: Document) -> list[int]:
    """Where the turn begins that a document ends with: it is the answer; none where somebody else speaks last."""
    turns = own_turns(document.segments)[-1:]
    ends = max((segment.end for segment in document.segments if segment.role != SCAFFOLD), default=0)
    return [turn.start for turn in turns if turn.start and turn.end == ends]


def first_of(groups: Iterator[Iterator[Prompt]], size: int) -> tuple[list[Prompt], Iterator[Iterator[Prompt]]]:
    """The first prompts, `size` at the most, and all groups with them."""
    group = next(groups, iter(()))
    first = list(islice(group, size))
    return first, chain([chain(first, group)], groups)


def _row(cloze: Cloze, tokens: list[int], where: str) -> list[int]:
    try:
        return cloze.row(tokens)
    except DataError as error:
        raise error.located(where) from None


def _until_error(items: Iterator[Any], failed: list[SftError]) -> Iterator[Any]:
    """Records or prompts up to the first bad line; its error is kept until the rows before it are answered."""
    try:
        yield from items
    except SftError as error:
        failed.append(error)


def _batches(records: Iterator[_Record]) -> Iterator[_Batch]:
    batch: list[_Record] = []
    begun = time.monotonic()
    for record in records:
        batch.append(record)
        if len(batch) == READ_AHEAD or record.pause or time.monotonic() - begun > LULL:
            yield batch, record.pause
            batch, begun = [], time.monotonic()
    if batch:
        yield batch, False
