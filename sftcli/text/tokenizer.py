"""A tokenizer.json at work: rendered text into ids with segments, content never into control tokens."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgspec
from tokenizers import Tokenizer

from sftcli.artifacts import fingerprint
from sftcli.errors import CheckpointError, DataError
from sftcli.recipe import InContent
from sftcli.rows import Segment
from sftcli.text.bounds import Bounds, Placed, merged
from sftcli.text.renamed import Renamed
from sftcli.text.speaker import Rendered
from sftcli.text.words import Starts, words_of

NEAR = 8  # characters behind a hard cut that a pre-tokenizer may look at
MAX_LEFT_WORDS = 1024
BYTE = re.compile("<0x[0-9A-F]{2}>")
WINDOW = 32  # characters on each side of a hard cut that decide whether the tokenizer would merge across it

Encoded = tuple[list[int], list[Segment]]


@dataclass
class Counts:
    """What encoding did that a reader should know."""

    merges_cut: int = 0  # cuts across which the tokenizer would have merged
    defused: int = 0  # control strings inside content, encoded as plain text
    allowed: int = 0  # control strings inside content that became control tokens, as was asked for


class Codec:
    """A tokenizer and what is known of its control tokens. It adds no special tokens: templates write them."""

    def __init__(self, definition: bytes, name: str, specials: dict[str, str] | None = None):
        try:
            self.json: dict[str, Any] = msgspec.json.decode(definition, type=dict[str, Any])
            self.tokenizer = _bare(Tokenizer.from_buffer(definition))
        except Exception as error:  # the library raises plain Exception for a file it cannot take
            raise CheckpointError(f"cannot load tokenizer {name}: {error}") from None
        self.name, self.definition = name, definition
        self.hash = fingerprint(definition)
        self.specials = specials or {}
        added: list[dict[str, Any]] = self.json.get("added_tokens") or []
        self.added = {token["content"]: token["id"] for token in added}
        if "" in self.added:
            raise CheckpointError(f"tokenizer {name}: added token {self.added['']} is empty text")
        self.special_ids = {token["id"] for token in added if token["special"]}
        # some tokenizers keep runs of spaces as added tokens: those control nothing
        self.controls = {t["content"]: t["id"] for t in added if t["special"] or t["content"].strip()}
        self.control = _pattern(self.controls)
        self.ends = _pattern(token["content"] for token in added if token["special"])
        self.in_content: InContent = "escape"
        self.counts = Counts()
        self.words = None if self.tokenizer.normalizer else self.tokenizer.pre_tokenizer
        self.left_words: dict[str, Any] = {}
        self.by_words = words_of(self.tokenizer, self.json)

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def words_only(self) -> bool:
        """A vocabulary of whole words without an unknown token: other words are errors."""
        model = self.json["model"]
        return model.get("type") == "WordLevel" and model.get("unk_token") not in model["vocab"]

    @cached_property
    def _renamed(self) -> Renamed:
        """The same tokenizer with other names for its control tokens: it cannot produce a control id from content."""
        return Renamed(self.json, self.controls)

    @cached_property
    def _inside(self) -> set[str]:
        """Pairs of characters that stand side by side in an added token: it may reach across a cut between them."""
        return {a + b for token in self.added for a, b in pairwise(token)}

    @cached_property
    def _added_sizes(self) -> list[int]:
        """Lengths of added tokens, the longest first."""
        return sorted({len(token) for token in self.added}, reverse=True)

    @cached_property
    def _folds(self) -> bool:
        """Whether text is normalised before control tokens are looked for: other spellings become them too."""
        added = self.json.get("added_tokens") or ()
        found = any(token.get("normalized") and token["content"] in self.controls for token in added)
        return found and self.tokenizer.normalizer is not None

    @cached_property
    def _unwritable(self) -> set[int]:
        """Ids that content may not have; that of unknown characters comes from any text."""
        model = self.json["model"]
        unknown = model.get("unk_token") or ""
        if model.get("type") == "Unigram" and model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        return set(self.controls.values()) - {self.controls.get(unknown)}

    @cached_property
    def byte_ids(self) -> set[int]:
        """Ids that stand for single bytes beside others that stand for text (<0x0A>, as Llama 2 has them)."""
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=False)
        return {token for text, token in vocabulary.items() if BYTE.fullmatch(text)}

    def decode(self, ids: list[int], keep_special: bool = False) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=not keep_special))

    def token_text(self, token: int) -> str:
        """The text of one token, for people: whole characters where it has them, else the vocabulary's spelling."""
        text = self.decode([token], keep_special=True)
        return text if "\ufffd" not in text else str(self.tokenizer.id_to_token(token))

    def encode(self, texts: list[Rendered]) -> list[Encoded]:
        """Ids and token segments of rendered texts. A hard cut lies where the model's own words begin."""
        work = self.prepare(texts)
        return self.finish(work, self.run(work))

    def prepare(self, texts: list[Rendered]) -> "Work":
        """What the library has to encode for some texts. Stretches with control strings in content go apart."""
        spans = [self._stretches(text) for text in texts]
        stretches = [(text, start, end) for text, cuts in zip(texts, spans, strict=True) for start, end in cuts]
        pieces = [text.text[start:end] for text, start, end in stretches]
        anchors = [self._anchor(text, start) for text, start, _ in stretches]
        forged = [self._forged(text, start, end) for text, start, end in stretches]
        allowed = sum(map(len, forged)) if self.in_content == "allow" else 0
        if allowed:
            forged = [[] for _ in forged]
        windows = self._windows(stretches)
        strings = [anchor + piece for anchor, piece, found in zip(anchors, pieces, forged, strict=True) if not found]
        strings += [text for _, text, _ in windows]
        known = [self.by_words.encode(text) if self.by_words else None for text in strings]
        strings = [text for text, found in zip(strings, known, strict=True) if not found]
        return Work(texts, spans, stretches, pieces, anchors, forged, windows, known, strings, allowed)

    def run(self, work: "Work") -> list[Any]:
        """The library's part: it changes nothing here and lets go of the interpreter, so threads may do it."""
        return self._batch(self.tokenizer, work.strings) if work.strings else []

    def finish(self, work: "Work", encodings: list[Any]) -> list[Encoded]:
        """Ids and segments of the texts, from what the library made of them."""
        results = iter(self._results(work, encodings))
        return [self._assemble(text, spans, results) for text, spans in zip(work.texts, work.spans, strict=True)]

    def _stretches(self, text: Rendered) -> list[tuple[int, int]]:
        """What is encoded apart: the text between hard cuts, but for cuts that the tokenizer makes by itself."""
        cuts = [0, *(cut for cut in text.cuts if not self._cuts_itself(text, cut)), len(text.text)]
        return [(a, b) for a, b in pairwise(cuts) if a < b]

    def _cuts_itself(self, text: Rendered, cut: int) -> bool:
        """Whether ids of the whole text are those of its two sides here: then one encoding serves for both."""
        if self.words is None or self._strips or self._writes_a_space_first:
            return False
        left = self._left_of(text, cut)
        return not left or not self._may_merge(left, self._right_of(text, cut))

    @cached_property
    def _strips(self) -> bool:
        """Whether an added token swallows spaces beside it, and so reaches across a cut."""
        return any(token.get("lstrip") or token.get("rstrip") for token in self.json.get("added_tokens") or ())

    def _left_of(self, text: Rendered, cut: int) -> str:
        """The text before a cut, back to the last control token or WINDOW characters."""
        left = text.text[max(0, cut - WINDOW) : cut]
        if self.control and (last := list(self.control.finditer(left))):
            reaches = self._strips or self._writes_a_space_first  # what the token does to what follows it matters
            left = left[last[-1].start() if reaches else last[-1].end() :]
        return left

    def _right_of(self, text: Rendered, cut: int) -> str:
        """The text behind a cut, up to the next control token or NEAR characters: the library sees no further."""
        end = cut + NEAR
        if self.control:
            found = self.control.finditer(text.text, cut, end + self._added_sizes[0])
            end = min(end, next((m.start() for m in found if not _overlaps(text.content, *m.span())), end))
        return text.text[cut:end]

    def _assemble(self, text: Rendered, spans: list[tuple[int, int]], results: Iterator[Placed]) -> Encoded:
        ids: list[int] = []
        segments: list[Segment] = []
        remaining = iter(text.segments)
        for start, end in spans:
            piece = next(results)
            base = len(ids)
            ids += piece.ids
            first = base
            for _, b, role, own, weight in remaining:
                last = base + piece.token_at(b - start)
                if first < last:
                    segments.append(Segment(first, last, role, own, weight))
                first = last
                if b == end:
                    break
        return ids, segments

    def _results(self, work: "Work", encodings: list[Any]) -> list[Placed]:
        """Ids and bounds of every stretch. Counts last: work that fails is done again, line by line."""
        encoded = iter(encodings)
        made = (known or next(encoded) for known in work.known)
        results = [
            self._defused(anchor, *stretch) if found else self._taken_off(next(made), anchor, piece)
            for stretch, anchor, piece, found in zip(
                work.stretches, work.anchors, work.pieces, work.forged, strict=True
            )
        ]
        self.counts.defused += sum(map(len, work.forged))
        self.counts.allowed += work.allowed
        for right, text, cut in work.windows:
            joint, before, after = self._taken_off(next(made), "", text), results[right - 1], results[right]
            if not work.forged[right - 1] and not work.forged[right]:
                self.counts.merges_cut += merged(joint, cut, before.ids, after.ids)
        return results

    @cached_property
    def _writes_a_space_first(self) -> bool:
        """Whether a text begins with a space that is not in it (Llama 2): one that goes on must not."""
        if self.by_words:
            return False
        try:
            alone, behind = self._batch(self.tokenizer, ["a", "\na"])
        except DataError:  # a vocabulary of words
            return False
        return bool(behind.ids[-len(alone.ids) :] != alone.ids)

    def _anchor(self, text: Rendered, start: int) -> str:
        """What is encoded before a stretch that goes on, and taken off again."""
        if not start or not self._writes_a_space_first:
            return ""
        before = text.text[:start]
        end = len(before.rstrip()) if self._strips else start
        for size in self._added_sizes:
            if before[max(end - size, 0) : end] in self.added and not _overlaps(text.content, end - size, end):
                return before[end - size :]
        return "\n"

    def _taken_off(self, encoding: Any, anchor: str, piece: str, tokenizer: Tokenizer | None = None) -> Placed:
        """Ids of a piece, and where its characters lie in them, of the encoding of anchor + piece."""
        if isinstance(encoding, Starts):
            return encoding
        ids, size = encoding.ids, len(anchor)
        if not anchor:
            return Bounds(ids, encoding, len(piece))
        before = [end for start, end in encoding.offsets if start < size]
        if max(before, default=0) > size:  # the anchor became one token with what follows
            return self._taken_off(self._batch(tokenizer or self.tokenizer, [piece])[0], "", piece)
        return Bounds(ids[len(before) :], encoding, len(piece), size, len(before))

    def _windows(self, stretches: list[tuple[Rendered, int, int]]) -> list[tuple[int, str, int]]:
        """(number of the stretch that a hard cut begins, the text around the cut, the cut's place in it)."""
        found: list[tuple[int, str, int]] = []
        if self.words_only:  # nothing merges, and a window may cut a word in two
            return found
        for number, (text, start, end) in enumerate(stretches):
            if start > 0:
                left = self._left_of(text, start)
                right = text.text[start : min(end, start + WINDOW)]
                if left and self._may_merge(left, self._right_of(text, start)):
                    found.append((number, left + right, len(left)))
        return found

    def _may_merge(self, left: str, right: str) -> bool:
        """False where the pre-tokenizer cuts between the two sides and cuts the left one as it does alone."""
        if self.words is None or self._strips or left[-1] + right[:1] in self._inside:
            return True
        if self.by_words and (left + right).isascii():
            words = self.by_words.cut(left)
            return self.by_words.cut(left + right)[: len(words)] != words
        if left not in self.left_words:
            if len(self.left_words) >= MAX_LEFT_WORDS:
                self.left_words.clear()
            self.left_words[left] = self._words_of(left)
        alone = self.left_words[left]
        return bool(not alone or self._words_of(left + right)[: len(alone)] != alone)

    def _words_of(self, text: str) -> list[Any]:
        """The pre-tokenizer's pieces; none where it fails, as encoding the text will, with its line."""
        try:
            return list(self.words.pre_tokenize_str(text)) if self.words else []
        except BaseException as error:
            if not _of_library(error):
                raise
            return []

    def _forged(self, text: Rendered, start: int, end: int) -> list[tuple[int, int]]:
        """Control strings of a stretch that overlap content, as (start, end) in the stretch."""
        if not self.control:
            return []
        found: list[tuple[int, int]] = []
        for match in self.control.finditer(text.text, start, end):
            if _overlaps(text.content, *match.span()):
                found.append((match.start() - start, match.end() - start))
        if not found and self._folds:
            found = self._folded(text, start, end)
        if found and self.in_content == "error":
            (a, b), *_ = found
            raise DataError(f"control string {text.text[start + a : start + b]} in content")
        return found

    def _folded(self, text: Rendered, start: int, end: int) -> list[tuple[int, int]]:
        """Content that becomes control tokens only when it is normalised."""
        encoding = self._batch(self.tokenizer, [text.text[start:end]])[0]
        places = zip(encoding.ids, encoding.offsets, strict=True)
        spans = [span for token, span in places if token in self._unwritable]
        return [(a, b) for a, b in spans if _overlaps(text.content, a + start, b + start)]

    def _defused(self, anchor: str, text: Rendered, start: int, end: int) -> Placed:
        """Encode a stretch in which only the control strings that the template wrote are control tokens."""
        assert self.control
        renamed = self._renamed
        if renamed.taken.search(text.text, start, end):
            raise DataError("control strings and private-use characters stand in one text")
        pieces, at = [], start
        while match := self.control.search(text.text, at, end):
            a, b = match.span()
            forged = _overlaps(text.content, a, b)
            pieces.append(text.text[at : a + 1] if forged else text.text[at:a] + renamed.names[match[0]])
            at = a + 1 if forged else b  # a genuine one may begin inside a forged one
        pieces.append(text.text[at:end])
        changed = renamed.names.get(anchor.rstrip(), anchor.rstrip()) + anchor[len(anchor.rstrip()) :]
        encoding = self._batch(renamed.tokenizer, [changed + "".join(pieces)])[0]
        placed = self._taken_off(encoding, anchor, "".join(pieces), renamed.tokenizer)
        if self._unwritable.difference(renamed.ids) & set(placed.ids):
            raise DataError("content spells a control token that this tokenizer cannot write as text")
        placed.ids = [renamed.ids.get(token, token) for token in placed.ids]
        return placed

    def _batch(self, tokenizer: Tokenizer, texts: list[str]) -> list[Any]:
        try:
            return list(tokenizer.encode_batch(texts, add_special_tokens=False))
        except BaseException as error:
            if not _of_library(error):
                raise
            if self.words_only:
                words = {word for text in texts for word in text.split()}
                unknown = sorted(word for word in words if tokenizer.token_to_id(word) is None)
                if unknown:
                    raise DataError(f"unknown word {unknown[0]!r}: the vocabulary has whole words only") from None
            raise DataError(f"the tokenizer refused it: {error}") from None


def _of_library(error: BaseException) -> bool:
    """Whether an error is the tokenizers library's: panics of its Rust code are no Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _overlaps(content: list[tuple[int, int]], start: int, end: int) -> bool:
    """Whether a span has characters of content in it. `content`: in order and disjoint."""
    before = bisect_left(content, (end,))
    return before > 0 and content[before - 1][1] > start


@dataclass
class Work:
    """Texts on their way through the library. `known` has what words seen before make of the safe stretches, then of
    the windows, and None where it is the library that encodes them: `strings`."""

    texts: list[Rendered]
    spans: list[list[tuple[int, int]]]  # of each text, its stretches
    stretches: list[tuple[Rendered, int, int]]
    pieces: list[str]  # the same as text
    anchors: list[str]
    forged: list[list[tuple[int, int]]]
    windows: list[tuple[int, str, int]]
    known: list[Starts | None]
    strings: list[str]
    allowed: int  # control strings in content that are left as they are


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    """No truncation, padding or post-processor: offsets stay true and nothing is added."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    return tokenizer


def _pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any of the tokens, the longest first."""
    ordered = sorted(set(tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
