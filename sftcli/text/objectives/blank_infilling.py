"""Blank infilling (GLM): spans of a text become blanks that are filled behind it, each token seeing all of the text.

text    x1 x2 x3 x4 x5 x6          spans 2:3 and 4:6, filled in the order 1, 0
ids     x1 x2 M  x4 M  | S  x5 x6 S  x3      part A: the text with its blanks; part B: start + span, each in turn
labels  -  -  -  -  -  | x5 x6 E  x3 E       scored where they stand: never shifted
pos     0  1  2  3  4  | 4  4  4  2  2       of a filled token: its blank's
block   0  0  0  0  0  | 1  2  3  1  2
order   0  0  0  0  0  | 1  2  3  4  5       A sees A; B sees A and what was filled before
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from sftcli.errors import DataError, UsageError
from sftcli.recipe import BlankInfilling
from sftcli.rows import FORMAT, IGNORE, Document, Row, Segment
from sftcli.text.objectives.causal import NothingTrained, Weights
from sftcli.text.speaker import Rendered
from sftcli.text.tokenizer import Codec

LONGEST = 39  # tokens of a drawn span
DRAWS = 1000  # until a text counts as too short
SENTENCE_ENDS = frozenset(".?!;:。？！；：…\n")
MASKS = {"token": "[MASK]", "sentence": "[sMASK]", "document": "[gMASK]", "sft": "[gMASK]"}
STARTS, ENDS = ("<|startofpiece|>", "<sop>"), ("<|endofpiece|>", "<eop>")

Span = tuple[int, int]


@dataclass(frozen=True)
class Marks:
    """The ids that stand for a blank, open its filling and end it."""

    mask: int
    sop: int
    eop: int


@dataclass(frozen=True)
class Filler:
    """What a tokenizer says of prompts with blanks: the texts and ids that stand for one, the marks of an answer."""

    masks: dict[str, int]
    marks: Marks

    def opened(self, text: Rendered) -> Rendered:
        return opened(text, list(self.masks))

    def with_blanks(self, ids: list[int]) -> tuple[list[int], tuple[int, ...]]:
        """The prompt and where its blanks are; one without any gets one at its end, as level sft trains it."""
        places = tuple(t for t, token in enumerate(ids) if token in self.masks.values())
        return (ids, places) if places else ([*ids, self.marks.mask], (len(ids),))


def opened(text: Rendered, masks: Sequence[str]) -> Rendered:
    """The text with the mask tokens in its content: they are blanks, not content."""
    if not masks:
        return text
    pattern, content = re.compile("|".join(map(re.escape, masks))), []
    for start, end in text.content:
        for found in pattern.finditer(text.text, start, end):
            content.append((start, found.start()))
            start = found.end()
        content.append((start, end))
    return replace(text, content=[(a, b) for a, b in content if a < b])


def filler_of(codec: Codec) -> Filler:
    """Raises UsageError where the tokenizer lacks GLM's control tokens."""
    masks = {text: codec.added[text] for text in dict.fromkeys(MASKS.values()) if text in codec.added}
    return Filler(masks, marks_of(BlankInfilling(level="sft"), codec))


@dataclass(frozen=True)
class Blanks:
    """Spans of a text from left to right, the order in which they are filled, and whether the last one ends with eop
    (the end of a text has an end token of its own)."""

    spans: list[Span]
    order: list[int]
    ended: bool = True


def marks_of(options: BlankInfilling, codec: Codec | None) -> Marks:
    """The ids of the options, else the tokenizer's control tokens of GLM's names. Raises UsageError."""
    names = {"mask": (MASKS[options.level],), "sop": STARTS, "eop": ENDS}
    found: dict[str, int] = {}
    for option, texts in names.items():
        known = [codec.added[text] for text in texts if codec and text in codec.added]
        given = getattr(options, option)
        if given is None and not known:
            raise UsageError(
                f"blank infilling needs the control token {texts[0]}, "
                + ("which the tokenizer lacks" if codec else "and the tokenizer of these documents is not known here"),
                hint=f"{'`sft init --set controls=glm` makes it' if codec else '-m MODEL'}; "
                f"or --set objective.{option}=ID",
            )
        found[option] = known[0] if given is None else given
    if len(set(found.values())) < len(found):
        raise UsageError(f"mask, sop and eop must be three ids, got {', '.join(map(str, found.values()))}")
    return Marks(**found)


def rows(
    document: Document, given: Weights | None, options: BlankInfilling, train_on: str, codec: Codec | None
) -> list[Row]:
    """The rows of a document: one, or under level sft one a turn of the model. Raises NothingTrained, DataError."""
    marks = marks_of(options, codec)
    if options.level == "sft":
        turns = [turn for turn in _turns(document, given) if turn.weight > 0]
        answers = [turn for turn in turns if turn.start]  # the others have no text whose blank they could be
        if not answers:
            raise NothingTrained("nothing before the answer" if turns else "no turn of the model")
        return [_answer_row(document, turn, marks) for turn in (answers[-1:] if train_on == "last" else answers)]
    stream = random.Random(f"{options.seed} {document.id}")  # of the row alone: no batch or worker changes it
    return [infilled(document, blanks_of(document.input_ids, options, stream, codec), marks)]


def _turns(document: Document, given: Weights | None) -> list[Segment]:
    """The model's turns; of a line that was tokenised elsewhere, from its first trained token to its last."""
    if given is None:
        return [segment for segment in document.segments if segment.own]
    trained = [t for t, weight in enumerate(given) if weight]
    return [Segment(trained[0], trained[-1] + 1, "tokens", True, given[trained[0]])] if trained else []


def _answer_row(document: Document, turn: Segment, marks: Marks) -> Row:
    """Everything before a turn is the text, the turn its blank; what comes after it is not there yet."""
    until = Document(
        id=document.id,
        input_ids=document.input_ids[: turn.end],
        segments=[],
        source=document.source,
        tokenizer=document.tokenizer,
        template=document.template,
    )
    row = infilled(until, Blanks([(turn.start, turn.end)], [0]), marks)
    if turn.weight != 1:
        row.loss_weight = [1.0 if label == IGNORE else turn.weight for label in row.labels]
    return row


def infilled(document: Document, blanks: Blanks, marks: Marks) -> Row:
    """Part A, then every blank's tokens in the order of filling."""
    ids, places = _with_masks(document.input_ids, blanks.spans, marks.mask)
    size = len(ids)
    labels, positions, blocks = [IGNORE] * size, list(range(size)), [0] * size
    for number in blanks.order:
        words = document.input_ids[slice(*blanks.spans[number])]
        said = [*words, marks.eop] if blanks.ended else words
        ids += [marks.sop, *said[:-1]]  # what ends a blank is said, never fed
        labels += said
        positions += [places[number]] * len(said)
        blocks += range(1, len(said) + 1)
    return Row(
        id=document.id,
        input_ids=ids,
        labels=labels,
        align="same",
        objective="glm",
        tokenizer=document.tokenizer,
        template=document.template,
        format=FORMAT,
        position_ids=positions,
        block_position_ids=blocks,
        order=[0] * size + list(range(1, len(ids) - size + 1)),
        source=document.source,
    )


def _with_masks(ids: Sequence[int], spans: Sequence[Span], mask: int) -> tuple[list[int], list[int]]:
    """The text with one mask token for each span, and where those stand in it."""
    found: list[int] = []
    places, at = [], 0
    for start, end in spans:
        found += ids[at:start]
        places.append(len(found))
        found.append(mask)
        at = end
    return found + list(ids[at:]), places


# ---- which spans


def blanks_of(ids: Sequence[int], options: BlankInfilling, stream: random.Random, codec: Codec | None) -> Blanks:
    """The blanks that the options name, else drawn ones. The first token is never drawn, the last one only at the end
    of a document."""
    ended = True
    if options.spans:
        if options.spans[-1][1] > len(ids):
            raise DataError(f"span {options.spans[-1][0]}:{options.spans[-1][1]} of {len(ids)} tokens")
        spans = list(options.spans)
    elif options.level == "document":
        spans, ended = _document(len(ids), options, stream)
    elif options.level == "sentence" and not options.lengths:
        spans = _sentences(ids, options, stream, codec)
    else:
        spans = _tokens(len(ids), options, stream)
    order = list(options.order) or stream.sample(range(len(spans)), len(spans))
    if sorted(order) != list(range(len(spans))):
        raise DataError(f"order {','.join(map(str, order))} for {len(spans)} blanks")
    return Blanks(spans, order, ended)


def _tokens(size: int, options: BlankInfilling, stream: random.Random) -> list[Span]:
    """Poisson lengths until they reach the share of the text; drawn anew where they do not fit into it."""
    if options.lengths:
        return _given(size, options, stream)
    for _ in range(DRAWS if size > 2 else 0):
        lengths = _lengths(int(options.rate * size), options.span_mean, stream)
        room = _room(size, lengths)
        if room >= 0:
            return placed(lengths, sorted(stream.randint(0, room) for _ in lengths))
    raise NothingTrained("too short for blanks")


def _given(size: int, options: BlankInfilling, stream: random.Random) -> list[Span]:
    """The lengths of the options, at their places or anywhere."""
    room = _room(size, options.lengths)
    if room < 0 or any(place > room for place in options.places):
        raise DataError(f"blanks of {', '.join(map(str, options.lengths))} tokens do not fit there in {size} tokens")
    return placed(options.lengths, sorted(options.places or [stream.randint(0, room) for _ in options.lengths]))


def _lengths(wanted: int, mean: float, stream: random.Random) -> list[int]:
    """Lengths of Poisson(mean), 1 to LONGEST only, until their sum reaches what is wanted; at least one."""
    sizes = range(1, LONGEST + 1)
    shares = list(accumulate(math.exp(n * math.log(mean) - math.lgamma(n + 1)) for n in sizes))
    found: list[int] = []
    while not found or sum(found) < wanted:
        found += stream.choices(sizes, cum_weights=shares)
    return found


def _room(size: int, lengths: Sequence[int]) -> int:
    """How many tokens stay free if the first and the last are kept, and one behind each span but the last."""
    return size - 2 - sum(lengths) - (len(lengths) - 1)


def placed(lengths: Sequence[int], places: Sequence[int]) -> list[Span]:
    """Spans with as many free tokens before each as its place says, and one more between two spans."""
    found, offset = [], 1
    for length, place in zip(lengths, places, strict=True):
        found.append((offset + place, offset + place + length))
        offset += length + 1
    return found


def _document(size: int, options: BlankInfilling, stream: random.Random) -> tuple[list[Span], bool]:
    """One long span: the end of the text (which needs no eop), or anywhere."""
    least, most = max(1, int(options.min_ratio * size)), size - 2
    if options.lengths:
        least = most = options.lengths[0]
    if not least <= most <= size - 2 or len(options.lengths) > 1:
        if options.lengths:
            raise DataError(f"level document blanks one span of at most {size - 2} of these {size} tokens")
        raise NothingTrained("too short for blanks")
    length = stream.randint(least, most)
    if not options.places and stream.random() < options.suffix:
        return [(size - length, size)], False
    return _given(size, options.model_copy(update={"lengths": [length]}), stream), True


def _sentences(ids: Sequence[int], options: BlankInfilling, stream: random.Random, codec: Codec | None) -> list[Span]:
    """Whole sentences in random order until they reach the share of the text, no two of them side by side."""
    if codec is None:
        raise UsageError("level sentence needs the tokenizer of these documents", hint="-m MODEL")
    every = sentences(ids, codec.token_text, codec.special_ids)
    for _ in range(DRAWS if every else 0):
        found: list[Span] = []
        for start, end in stream.sample(every, len(every)):
            if all(end < a or b < start for a, b in found):
                found.append((start, end))
            if sum(b - a for a, b in found) >= int(options.rate * len(ids)):
                return sorted(found)
    raise NothingTrained("no sentences to blank")


def sentences(ids: Sequence[int], text: Callable[[int], str], controls: set[int]) -> list[Span]:
    """Spans of sentences inside the text, its first and last token aside; a control token belongs to none."""
    if len(ids) < 3:
        return []
    inside = range(1, len(ids) - 1)
    cuts = {1, len(ids) - 1}
    for t in inside:
        if ids[t] in controls:
            cuts |= {t, t + 1}
        elif not SENTENCE_ENDS.isdisjoint(text(ids[t])):
            cuts.add(t + 1)
    return [(a, b) for a, b in pairwise(sorted(cuts)) if ids[a] not in controls]
