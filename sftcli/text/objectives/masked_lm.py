"""Masked language model (BERT): some tokens are hidden and told from all the others, on both sides.

text    The cat sat.⏎ It slept.       a sentence a line; its second half follows, or is another document's
ids     C  the cat M  S  it M  S      80% of the chosen tokens become [MASK], 10% any token, 10% stay as they are
labels  -  the -   sat - -  slept -   of all that were chosen; scored where they stand: never shifted
types   0  0   0   0  0  1  1  1      [CLS] A [SEP] are 0, B [SEP] are 1
order   0  0   0   0  0  0  0  0      everything sees everything
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, pairwise
from typing import Protocol, TypeVar

from sftcli.errors import DataError, UsageError
from sftcli.fieldtypes import MASKED_LM_CONTROLS
from sftcli.recipe import MaskedLM
from sftcli.rows import FORMAT, IGNORE, Document, Row
from sftcli.text.objectives.blank_infilling import SENTENCE_ENDS, opened
from sftcli.text.objectives.causal import NothingTrained
from sftcli.text.speaker import Rendered
from sftcli.text.tokenizer import Codec

LENGTH = 128  # of a row, where --max-length does not say
LEAST = 5  # [CLS] a [SEP] b [SEP]
POOL = 256  # documents that random second halves come from
TO_MASK, TO_ANY = 0.8, 0.1  # of the chosen tokens; the others stay
IS_NEXT, RANDOM = 0, 1  # next_sentence_label

Sentence = list[int]


@dataclass(frozen=True)
class Marks:
    """The ids that hide a token, open a row and close its halves."""

    mask: int
    cls: int
    sep: int


def marks_of(options: MaskedLM, codec: Codec | None) -> Marks:
    """The ids of the options, else the tokenizer's control tokens of BERT's names. Raises UsageError."""
    found: dict[str, int] = {}
    for option, text in MASKED_LM_CONTROLS.items():
        given = getattr(options, option)
        text = codec.specials.get(f"{option}_token", text) if codec else text
        if given is None and (codec is None or text not in codec.added):
            raise UsageError(
                f"masked LM needs the control token {text}, "
                + ("which the tokenizer lacks" if codec else "and the tokenizer of these documents is not known here"),
                hint=f"{'`sft init --set controls=bert` makes it' if codec else '-m MODEL'}; "
                f"or --set objective.{option}=ID",
            )
        found[option] = codec.added[text] if given is None and codec else given
    if len(set(found.values())) < len(found):
        raise UsageError(f"mask, cls and sep must be three ids, got {', '.join(map(str, found.values()))}")
    return Marks(**found)


# ---- sentences


@lru_cache(maxsize=4)
def _controls(codec: Codec | None) -> frozenset[int]:
    """Control tokens, which are never masked; what stands for unknown characters ([UNK]) is text."""
    unknown = codec.added.get(codec.json["model"].get("unk_token")) if codec else None
    return frozenset(codec.special_ids - {unknown}) if codec else frozenset()


def text_of(document: Document, codec: Codec | None) -> tuple[int, int]:
    """Where the text of a document lies: without the control tokens at its ends."""
    inside = [t for t, token in enumerate(document.input_ids) if token not in _controls(codec)]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def sentences_of(document: Document, codec: Codec | None) -> list[Sentence]:
    """The lines of a document; where the tokenizer keeps no line ends (BERT's own), what ends with one of . ? ! and the
    like. Segments and control tokens end a sentence, too; the latter belong to none, nor do blank tokens at its end."""
    ids, (start, end), controls = document.input_ids, text_of(document, codec), _controls(codec)
    cuts = {start, end} | {s.start for s in document.segments if start < s.start < end}
    if codec:
        cuts |= {t + 1 for t in range(start, end) if _ends(codec)(ids[t]) or ids[t] in controls}
        cuts |= {t for t in range(start, end) if ids[t] in controls}
    found = [ids[a:b] for a, b in pairwise(sorted(cuts))]
    if codec:
        found = [_stripped(sentence, codec) for sentence in found if sentence[0] not in controls]
    return [sentence for sentence in found if sentence]


def _stripped(sentence: Sentence, codec: Codec) -> Sentence:
    end = len(sentence)
    while end and _blank(codec)(sentence[end - 1]):
        end -= 1
    return sentence[:end]


@lru_cache(maxsize=4)
def _ends(codec: Codec) -> Callable[[int], bool]:
    """Whether a token ends a sentence."""
    ends = SENTENCE_ENDS
    if not codec.words_only:
        line, space = codec.tokenizer.encode_batch(["a\nb", "a b"], add_special_tokens=False)
        ends = SENTENCE_ENDS if line.ids == space.ids else frozenset("\n")
    return lru_cache(maxsize=None)(lambda token: not ends.isdisjoint(codec.token_text(token)))


@lru_cache(maxsize=4)
def _blank(codec: Codec) -> Callable[[int], bool]:
    return lru_cache(maxsize=None)(lambda token: codec.token_text(token).isspace())


# ---- pairs


class Read(Protocol):
    """Anything that was read and has a document."""

    document: Document


Reading = TypeVar("Reading", bound=Read)


class Others:
    """Documents that random second halves come from: at most POOL, of all that were read so far each as likely as any
    other. The first POOL are read ahead, so that the first document has others, too."""

    def __init__(self, seed: int, sentences: Callable[[Document], list[Sentence]]):
        self.seed, self.sentences = seed, sentences
        self.kept: list[tuple[Document, list[Sentence]]] = []

    def ahead(self, reading: Iterator[Reading]) -> Iterator[Reading]:
        """The same items; before one comes, the pool is what it is to be drawn from."""
        first = list(islice(reading, POOL))
        self.kept = [(item.document, self.sentences(item.document)) for item in first]
        yield from first
        stream = random.Random(f"{self.seed} others")
        for count, item in enumerate(reading, POOL + 1):
            yield item
            if (place := stream.randrange(count)) < POOL:
                self.kept[place] = (item.document, self.sentences(item.document))

    def draw(self, document: Document, stream: random.Random) -> list[Sentence]:
        """The sentences of another document. Raises DataError where there is none."""
        found = [sentences for other, sentences in self.kept if other is not document and sentences]
        if not found:
            raise DataError("next-sentence pairs need a second document", hint="--no-nsp trains without pairs")
        return stream.choice(found)


Pair = tuple[Sentence, Sentence, int | None]  # A, B, next_sentence_label


def pairs(
    sentences: Sequence[Sentence], room: int, short: float, stream: random.Random, other: Callable[[], list[Sentence]]
) -> Iterator[Pair]:
    """A document in pairs of at most `room` tokens. Where B is random, the sentences that it replaces come again."""
    at = 0
    while at < len(sentences):
        target = stream.randint(2, room) if stream.random() < short else room
        end = at + len(_until(sentences[at:], target))
        cut = stream.randint(at + 1, end - 1) if end - at > 1 else end
        a = _joined(sentences[at:cut])
        if end - at == 1 or stream.random() < 0.5:
            stranger = other()
            start = stream.randrange(len(stranger))
            b, label, at = _joined(_until(stranger[start:], target - len(a))), RANDOM, cut
        else:
            b, label, at = _joined(sentences[cut:end]), IS_NEXT, end
        yield *_fitted(a, b, room, stream), label


def _until(sentences: Sequence[Sentence], size: int) -> list[Sentence]:
    """The first sentences, until they have `size` tokens; at least one."""
    found: list[Sentence] = []
    for sentence in sentences:
        if found and size <= 0:
            break
        found.append(sentence)
        size -= len(sentence)
    return found


def _joined(sentences: Iterable[Sentence]) -> Sentence:
    return list(chain.from_iterable(sentences))


def _fitted(a: Sentence, b: Sentence, room: int, stream: random.Random) -> tuple[Sentence, Sentence]:
    """The pair in `room` tokens: the longer half loses one after the other, at its front or its back."""
    spans = [[0, len(a)], [0, len(b)]]
    while sum(end - start for start, end in spans) > room:
        longer = max(reversed(spans), key=lambda span: span[1] - span[0])
        if stream.random() < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    return a[slice(*spans[0])], b[slice(*spans[1])]


# ---- rows


def rows(
    document: Document, options: MaskedLM, length: int | None, codec: Codec | None, others: Others | None
) -> list[Row]:
    """The rows of a document, `copies` times; `others`: where pairs come from, None: no pairs. Raises NothingTrained,
    DataError."""
    marks, length = marks_of(options, codec), length or LENGTH
    if length < LEAST:
        raise UsageError(f"rows of {length} tokens are too short for masked LM", hint=f"--max-length {LEAST} or more")
    found: list[Row] = []
    for copy in range(options.copies):
        stream = random.Random(
            f"{options.seed} {document.id} {copy}"
        )  # of the row alone: no batch or worker changes it
        for pair in _pairs(document, options, length, codec, others, stream):
            found.append(masked(document, pair, options, marks, codec, stream))
    if not found:
        raise NothingTrained("no text")
    for number, row in enumerate(found if len(found) > 1 else ()):
        row.id = f"{document.id}.{number}"
    return found


def _pairs(
    document: Document,
    options: MaskedLM,
    length: int,
    codec: Codec | None,
    others: Others | None,
    stream: random.Random,
) -> Iterator[Pair]:
    if others:
        sentences = others.sentences(document)
        yield from pairs(sentences, length - 3, options.short, stream, lambda: others.draw(document, stream))
        return
    start, end = text_of(document, codec)
    for at in range(start, end, length - 2):
        yield document.input_ids[at : min(at + length - 2, end)], [], None


def masked(
    document: Document, pair: Pair, options: MaskedLM, marks: Marks, codec: Codec | None, stream: random.Random
) -> Row:
    """The row of a pair (of one half, where there is no label), with its tokens masked."""
    a, b, label = pair
    ids = [marks.cls, *a, marks.sep] + ([*b, marks.sep] if label is not None else [])
    types = [0] * (len(a) + 2) + [1] * (len(ids) - len(a) - 2)
    inputs, labels = list(ids), [IGNORE] * len(ids)
    for place in _chosen(ids, options, marks, codec, stream):
        labels[place] = ids[place]
        inputs[place] = _instead(ids[place], options, marks, codec, stream)
    return Row(
        id=document.id,
        input_ids=inputs,
        labels=labels,
        align="same",
        objective="bert",
        tokenizer=document.tokenizer,
        template=document.template,
        format=FORMAT,
        order=[0] * len(ids),
        token_type_ids=types,  # zeros, too: a model that is trained on them is to have the table
        next_sentence_label=label,
        source=document.source,
    )


def count_of(length: int, options: MaskedLM) -> int:
    """How many tokens of a row are chosen; round is the banker's: 4.5 is 4, 7.5 is 8."""
    return min(options.max_predictions, max(1, round(options.rate * length)))


def _chosen(
    ids: Sequence[int], options: MaskedLM, marks: Marks, codec: Codec | None, stream: random.Random
) -> list[int]:
    """The positions that the options name, else drawn ones: never a control token's."""
    never = {marks.cls, marks.sep} | _controls(codec)
    for place in options.mask_positions:
        if place >= len(ids) or ids[place] in never:
            told = f"of {len(ids)}" if place >= len(ids) else "is that of a control token"
            raise DataError(f"mask position {place} {told}; [CLS] is position 0")
    candidates = [place for place, token in enumerate(ids) if token not in never]
    if not candidates:
        raise NothingTrained("no token to mask")
    count = min(count_of(len(ids), options), len(candidates))
    return options.mask_positions or sorted(stream.sample(candidates, count))


def _instead(token: int, options: MaskedLM, marks: Marks, codec: Codec | None, stream: random.Random) -> int:
    """What stands in the place of a chosen token; positions that the options name are always masked."""
    drawn = 0.0 if options.mask_positions else stream.random()
    if drawn < TO_MASK:
        return marks.mask
    if drawn >= TO_MASK + TO_ANY:
        return token
    if codec is None:
        raise UsageError("random tokens need the tokenizer of these documents", hint="-m MODEL")
    return stream.randrange(codec.size)


# ---- prompts


@dataclass(frozen=True)
class Cloze:
    """How a text with mask tokens becomes a row to fill."""

    marks: Marks
    mask: str  # as a text
    space: list[int]  # the ids of a space: one before a mask is the hidden token's own, as in training

    def opened(self, text: Rendered) -> Rendered:
        return opened(text, [self.mask])

    def row(self, ids: Sequence[int]) -> list[int]:
        """[CLS] text [SEP]; a prompt that was tokenised with them keeps its own. Raises DataError without a mask."""
        if self.marks.mask not in ids:
            raise DataError(f"no {self.mask} to fill")
        whole = list(ids) if ids[0] == self.marks.cls else [self.marks.cls, *ids, self.marks.sep]
        following = [*whole[1:], self.marks.sep]
        pairs = zip(whole, following, strict=True)
        return [token for token, after in pairs if after != self.marks.mask or [token] != self.space]

    def filled(self, row: Sequence[int], fills: Sequence[int]) -> list[int]:
        """The row with its masks replaced from left to right; those that were not filled stay."""
        rest = iter(fills)
        return [next(rest, token) if token == self.marks.mask else token for token in row]


def cloze_of(codec: Codec) -> Cloze:
    """Raises UsageError where the tokenizer lacks BERT's control tokens."""
    space = [] if codec.words_only else codec.tokenizer.encode(" ", add_special_tokens=False).ids
    return Cloze(marks_of(MaskedLM(), codec), codec.specials.get("mask_token", MASKED_LM_CONTROLS["mask"]), space)
