"""tokenizer.json: load one, train one, and encode rendered text into ids with segments."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as decoders_

from sftcli.artifacts import fingerprint, read_bytes, read_json
from sftcli.errors import CheckpointError, DataError, UsageError
from sftcli.rows import Segment
from sftcli.text.template import Rendered

W12 = ("where", "is", "the", "capital", "of", "China", "The", "Beijing")  # ids 4..11 of `--tokenizer whitespace`
W12_CONTROLS = ("<pad>", "<bos>", "<eos>", "<sep>")
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
NEAR = 8  # characters behind a hard cut that a pre-tokenizer may look at
MAX_LEFT_WORDS = 1024
WINDOW = 32  # characters on each side of a hard cut that decide whether the tokenizer would merge across it

Encoded = tuple[list[int], list[Segment]]


@dataclass
class Counts:
    """What encoding did that a reader should know."""

    merges_cut: int = 0  # cuts across which the tokenizer would have merged
    defused: int = 0  # control strings inside content, encoded as plain text


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
        self.special_ids = {token["id"] for token in added if token["special"]}
        # some tokenizers keep runs of spaces as added tokens: those control nothing
        self.control = _pattern(token["content"] for token in added if token["special"] or token["content"].strip())
        self.ends = _pattern(token["content"] for token in added if token["special"])
        self.counts = Counts()
        self.words = None if self.tokenizer.normalizer else self.tokenizer.pre_tokenizer
        self.left_words: dict[str, Any] = {}
        self._plain: Tokenizer | None = None

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def words_only(self) -> bool:
        """A vocabulary of whole words without an unknown token: other words are errors."""
        model = self.json["model"]
        return model.get("type") == "WordLevel" and model.get("unk_token") not in model["vocab"]

    @property
    def plain(self) -> Tokenizer:
        """The same tokenizer without added tokens: it cannot produce a control id from text."""
        if self._plain is None:
            bare = {**self.json, "added_tokens": [], "post_processor": None}
            if self.json["model"].get("type") == "WordLevel":
                words = {w: i for w, i in self.json["model"]["vocab"].items() if w not in self.added}
                bare["model"] = {**self.json["model"], "vocab": words}
            self._plain = Tokenizer.from_str(json.dumps(bare))
        return self._plain

    def decode(self, ids: list[int], keep_special: bool = False) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=not keep_special))

    def token_text(self, token: int) -> str:
        """The text of one token, for people: whole characters where it has them, else the vocabulary's spelling."""
        text = self.decode([token], keep_special=True)
        return text if "\ufffd" not in text else str(self.tokenizer.id_to_token(token))

    def encode(self, texts: list[Rendered]) -> list[Encoded]:
        """Ids and token segments of rendered texts. A hard cut lies where the model's own words begin."""
        stretches = [(text, start, end) for text in texts for start, end in _between_cuts(text)]
        encodings = iter(self._encode_stretches(stretches))
        return [self._assemble(text, encodings) for text in texts]

    def _assemble(self, text: Rendered, encodings: Iterator[tuple[list[int], "_Bounds"]]) -> Encoded:
        ids: list[int] = []
        segments: list[Segment] = []
        remaining = iter(text.segments)
        for start, end in _between_cuts(text):
            piece, bounds = next(encodings)
            base = len(ids)
            ids += piece
            first = base
            for _, b, role, own, weight in remaining:
                last = base + bounds.token_at(b - start)
                if first < last:
                    segments.append(Segment(first, last, role, own, weight))
                first = last
                if b == end:
                    break
        return ids, segments

    def _encode_stretches(self, stretches: list[tuple[Rendered, int, int]]) -> Iterator[tuple[list[int], "_Bounds"]]:
        """Encode whole stretches at once (the library's threads); those with control strings in content go apart."""
        texts = [text.text[start:end] for text, start, end in stretches]
        anchors = [self._anchor(text, start) for text, start, _ in stretches]
        forged = [self._forged(text, start, end) for text, start, end in stretches]
        windows = self._windows(stretches)
        safe = [anchor + piece for anchor, piece, found in zip(anchors, texts, forged, strict=True) if not found]
        encoded = iter(self._batch(self.tokenizer, safe + [text for _, text, _ in windows]))
        results = [
            self._taken_off(next(encoded), anchor, piece) if not found else None
            for anchor, piece, found in zip(anchors, texts, forged, strict=True)
        ]
        for right, text, cut in windows:
            joint, before, after = next(encoded), results[right - 1], results[right]
            if before is not None and after is not None:
                self.counts.merges_cut += _merged(joint, cut, len(text), before[0], after[0])
        for piece, found, result in zip(texts, forged, results, strict=True):
            if result is None:
                result = self._encode_defused(piece, found)
                self.counts.defused += len(found)
            yield result

    @cached_property
    def _writes_a_space_first(self) -> bool:
        """Whether a text begins with a space that is not in it (Llama 2): one that goes on must not."""
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
        return next((token for token in self.added if before.endswith(token)), "\n")

    def _taken_off(self, encoding: Any, anchor: str, piece: str) -> tuple[list[int], "_Bounds"]:
        """Ids of a piece, and where its characters lie in them, of the encoding of anchor + piece."""
        ids, size = encoding.ids, len(anchor)
        if not anchor:
            return ids, _Bounds([(0, 0, encoding)], len(piece), len(ids))
        before = [end for start, end in encoding.offsets if start < size]
        if max(before, default=0) > size:  # the anchor became one token with what follows
            return self._taken_off(self._batch(self.tokenizer, [piece])[0], "", piece)
        return ids[len(before) :], _Bounds([(-size, -len(before), encoding)], len(piece), len(ids) - len(before))

    def _windows(self, stretches: list[tuple[Rendered, int, int]]) -> list[tuple[int, str, int]]:
        """(number of the stretch that a hard cut begins, the text around the cut, the cut's place in it)."""
        found: list[tuple[int, str, int]] = []
        if self.words_only:  # nothing merges, and a window may cut a word in two
            return found
        for number, (text, start, end) in enumerate(stretches):
            if start > 0:
                left = text.text[max(0, start - WINDOW) : start]
                if self.control and (last := list(self.control.finditer(left))):
                    left = left[last[-1].end() :]
                right = text.text[start : min(end, start + WINDOW)]
                if left and self._may_merge(left, right[:NEAR]):
                    found.append((number, left + right, len(left)))
        return found

    def _may_merge(self, left: str, right: str) -> bool:
        """False where the pre-tokenizer cuts between the two sides and cuts the left one as it does alone."""
        if self.words is None:
            return True
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
        found = [(m.start() + start, m.end() + start) for m in self.control.finditer(text.text[start:end])]
        return [(a - start, b - start) for a, b in found if any(c < b and d > a for c, d in text.content)]

    def _encode_defused(self, text: str, forged: list[tuple[int, int]]) -> tuple[list[int], "_Bounds"]:
        """Encode the text between genuine control tokens with the tokenizer that knows none."""
        assert self.control
        ids: list[int] = []
        parts = []
        at = 0
        genuine = [m.span() for m in self.control.finditer(text) if m.span() not in forged]
        for a, b in [*genuine, (len(text), len(text))]:
            for start, end, tokenizer in ((at, a, self.plain), (a, b, self.tokenizer)):
                if start == end:
                    continue
                encoding = self._batch(tokenizer, [text[start:end]])[0]
                if tokenizer is self.plain and set(encoding.ids) & set(self.added.values()):
                    raise DataError("content spells a control token that this tokenizer cannot write as text")
                parts.append((start, len(ids), encoding))
                ids += encoding.ids
            at = b
        return ids, _Bounds(parts, len(text), len(ids))

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


@dataclass
class _Bounds:
    """Where characters of a stretch lie in its tokens; parts: (first character, first token, encoding)."""

    parts: list[tuple[int, int, Any]]
    length: int
    count: int

    def token_at(self, char: int) -> int:
        """The first token that starts at or after a character: a token belongs where its first character does."""
        if char <= 0:
            return 0
        if char >= self.length:
            return self.count
        part = next(p for p in reversed(self.parts) if p[0] <= char)
        encoding = part[2]
        for at in range(char - part[0], self._end_of(part) - part[0]):
            token = encoding.char_to_token(at)
            if token is None:
                continue  # a character that left no token of its own (normalised away)
            begins_before = encoding.token_to_chars(token)[0] < char - part[0]
            while begins_before and token < len(encoding.ids) and encoding.token_to_chars(token)[0] < char - part[0]:
                token += 1
            return part[1] + int(token)
        return part[1] + len(encoding.ids)

    def _end_of(self, part: tuple[int, int, Any]) -> int:
        following = [p[0] for p in self.parts if p[0] > part[0]]
        return following[0] if following else self.length


def _merged(joint: Any, cut: int, length: int, before: list[int], after: list[int]) -> bool:
    """Whether the text around a cut, encoded in one, has other tokens beside the cut than its two sides have."""
    at = _Bounds([(0, 0, joint)], length, len(joint.ids)).token_at(cut)
    beside = joint.ids[max(at - 1, 0) : at + 1]
    return bool(beside != before[-1:] + after[:1])


def _between_cuts(text: Rendered) -> list[tuple[int, int]]:
    """The stretches of a text between hard cuts, empty ones left out."""
    cuts = [0, *text.cuts, len(text.text)]
    return [(a, b) for a, b in pairwise(cuts) if a < b]


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


# ---- loading


def load_codec(folder: Path) -> Codec:
    """The tokenizer of a model folder. Raises CheckpointError where it has none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"model folder {folder} has no tokenizer.json", hint="copy it from the model's base")
    return Codec(read_bytes(path), str(path), _specials(folder))


def load_tokenizer_file(name: str) -> Codec:
    """`--tokenizer`: `whitespace` (the twelve words of the test vectors) or a tokenizer.json."""
    if name == "whitespace":
        specials = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "sep_token": "<sep>"}
        return Codec(whitespace_tokenizer(W12_CONTROLS, W12), "whitespace", specials)
    if not Path(name).is_file():
        raise UsageError(f"no tokenizer file {name}", hint="a tokenizer.json, or `whitespace`")
    return Codec(read_bytes(Path(name)), name, _specials(Path(name).parent))


def _specials(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, ... of a folder: tokenizer_config.json, else special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
            for key in SPECIAL_NAMES:
                value = config.get(key)
                if isinstance(value, dict):
                    value = value.get("content")
                if isinstance(value, str):
                    found[key] = value
    return found


def folder_template(folder: Path) -> str | None:
    """The chat template of a model folder: its file, else the field in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return read_bytes(path).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{path} is not UTF-8 text") from None
    if not (folder / "tokenizer_config.json").is_file():
        return None
    field = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(field, list):  # named templates
        named = {item.get("name"): item.get("template") for item in field if isinstance(item, dict)}
        field = named.get("default")
    return field if isinstance(field, str) else None


def stop_ids(folder: Path) -> list[int]:
    """The stop set of a model folder: generation_config's eos (one or a list), else config.json's."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            eos = read_json(folder / name).get("eos_token_id")
            if eos is not None:
                return [int(i) for i in eos] if isinstance(eos, list) else [int(eos)]
    return []


# ---- a store of tokenizers and templates by their hash, so that later stages can name tokens


def _store() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base, "sft")


def remember(name: str, content: bytes) -> None:
    """Keep a tokenizer or template under its hash, for `sft mask --show` and `sft train`. Best effort."""
    path = _store() / name
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{name}.{os.getpid()}")
            temporary.write_bytes(content)
            os.replace(temporary, path)
    except OSError:
        return


def recall(name: str) -> bytes | None:
    """What `remember` kept, or None."""
    try:
        return (_store() / name).read_bytes()
    except OSError:
        return None


def recall_codec(tokenizer_hash: str | None) -> Codec | None:
    """The tokenizer with this hash, if this machine has tokenised with it."""
    data = recall(f"{tokenizer_hash}.tokenizer.json") if tokenizer_hash else None
    return Codec(data, str(tokenizer_hash)) if data and fingerprint(data) == tokenizer_hash else None


# ---- making


def whitespace_tokenizer(controls: Iterable[str], words: Iterable[str]) -> bytes:
    """One word = one token; ids by first occurrence, the control tokens before all. An unknown word is an error."""
    controls = list(controls)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*controls, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(_added(controls))
    return str(tokenizer.to_str(pretty=True)).encode()


def train_bpe(texts: Iterable[str], vocab_size: int, controls: list[str]) -> bytes:
    """A byte-level BPE: digits one by one, GPT-2's word pattern, the control tokens first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(controls):
        raise UsageError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(controls)} control tokens are always there"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders_.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=_added(controls), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str(pretty=True)).encode()


def _added(controls: Iterable[str]) -> list[tokenizers.AddedToken]:
    return [tokenizers.AddedToken(text, special=True, normalized=False) for text in controls]
