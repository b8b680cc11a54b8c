"""ASCII text into the ids of a byte-level BPE by words seen before: the library's ids, in a fraction of its time.

What a word (pre-token) becomes depends on nothing beside it, so the library's model is asked once a word. Which words
a text has is written here a second time, for `re`; what is not known to cut alike goes through the library.
"""

import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

from sftcli.text.gguf_pretokenizers import DIGITS, LLAMA3, QWEN2, QWEN35, WORDS, flat, isolated, plain

MAX_WORDS = 1 << 17  # then all are forgotten
MAX_WORD = 64  # characters of a word that is kept
SPELLING = {b: chr(256 + n) for n, b in enumerate([*range(33), 127])}  # the other ASCII characters stand for themselves

# In ASCII, with re.ASCII: \p{L} is [A-Za-z], \p{N} is [0-9], \p{M} is nothing; \s is as in the library's engine, which
# counts \x1c-\x1f no more than re.ASCII does.
_ENDINGS = "'(?:s|t|re|ve|m|ll|d)"
_ANY_ENDINGS, _LETTERS = "'(?i:s|t|re|ve|m|ll|d)", r"[^\r\nA-Za-z0-9]?[A-Za-z]+"
_TAIL = r" ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = rf"{_ANY_ENDINGS}|{_LETTERS}|[0-9]|{_TAIL}"
_WAYS: list[tuple[list[dict[str, Any]], str]] = [
    ([WORDS], rf"{_ENDINGS}| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"),
    # digits are cut out first: a run of spaces before one ends its text
    ([DIGITS, WORDS], rf"{_ENDINGS}| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+"),
    (isolated(LLAMA3), rf"{_ANY_ENDINGS}|{_LETTERS}|[0-9]{{1,3}}|{_TAIL}"),
    (isolated(QWEN2), _QWEN),
    (isolated(QWEN35), _QWEN),
]


def words_of(tokenizer: Tokenizer, definition: dict[str, Any]) -> "Words | None":
    """What finds the ids of ASCII texts by their words; None where they might not be the tokenizer's."""
    model, added = definition["model"], definition.get("added_tokens") or []
    steps = [plain(step) for step in flat(definition.get("pre_tokenizer"), "pretokenizers")]
    pattern = next((found for way, found in _WAYS if steps == [plain(step) for step in way]), None)
    if pattern is None or not _normalizes_nothing(definition) or model.get("type") != "BPE" or model.get("dropout"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):  # tokens would be longer than texts
        return None
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return None
    vocabulary = model["vocab"] | {token["content"]: token["id"] for token in added}
    if len(set(vocabulary.values())) < len(vocabulary):  # an id would not tell how long its token is
        return None
    if any(tokenizer.token_to_id(token["content"]) != token["id"] for token in added):
        return None
    lacks = {chr(b) for b in range(128) if chr(b).translate(SPELLING) not in model["vocab"]}
    return Words(tokenizer, pattern, {token["content"]: token["id"] for token in added}, lacks)


def _normalizes_nothing(definition: dict[str, Any]) -> bool:
    """Whether ASCII text stays as it is, and added tokens are looked for once and as they are written."""
    normalized = {token["normalized"] for token in definition.get("added_tokens") or []}
    normalizer = definition.get("normalizer")
    if normalizer is None:
        return len(normalized) < 2  # those of one kind go before all of the other
    return bool(normalizer == {"type": "NFC"} and True not in normalized)  # NFC makes ASCII of some other characters


@dataclass
class Starts:
    """Ids of a text, and where its characters lie in them. At character chars[i] begins token tokens[i]."""

    ids: list[int]
    length: int
    chars: list[int]
    tokens: list[int]
    size: Callable[[int], int]  # of a token, in characters

    def token_at(self, char: int) -> int:
        """The first token that starts at or after a character: a token belongs where its first character does."""
        if char <= 0:
            return 0
        if char >= self.length:
            return len(self.ids)
        near = bisect_right(self.chars, char) - 1
        at, token = self.chars[near], self.tokens[near]
        while at < char:
            at += self.size(self.ids[token])
            token += 1
        if token > self.tokens[near]:  # the next one may lie behind it
            self.chars.insert(near + 1, at)
            self.tokens.insert(near + 1, token)
        return token


class Words:
    """The words of ASCII texts, and their ids. `pattern`: matches the words one after another. `lacks`: characters
    without a token, of which the model makes nothing or something unknown."""

    def __init__(self, tokenizer: Tokenizer, pattern: str, added: dict[str, int], lacks: set[str]):
        self.cut = re.compile(pattern, re.ASCII).findall
        self.added = added
        longest_first = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
        self.split = re.compile(f"({longest_first})").split if added else None
        self.known = _Known(tokenizer.model, lacks)
        self.size = cache(lambda token: len(str(tokenizer.id_to_token(token))))

    def encode(self, text: str) -> Starts | None:
        """Ids of a text; None where it is not ASCII, or has characters without a token."""
        if not text.isascii():
            return None
        ids, chars, tokens, char = list[int](), [0], [0], 0
        pieces, known = self.split(text) if self.split else [text], self.known.__getitem__
        try:
            for number, piece in enumerate(pieces):
                if number % 2:
                    ids.append(self.added[piece])
                elif piece:
                    ids += chain.from_iterable(map(known, self.cut(piece)))
                char += len(piece)
                chars.append(char)
                tokens.append(len(ids))
        except _Lacking:
            return None
        return Starts(ids, len(text), chars, tokens, self.size)


class _Lacking(Exception):
    """A word has a character without a token."""


class _Known(dict[str, tuple[int, ...]]):
    """Words to ids; the model is asked for new ones."""

    def __init__(self, model: Any, lacks: set[str]):
        super().__init__()
        self.model, self.lacks = model, lacks

    def __missing__(self, word: str) -> tuple[int, ...]:
        if not self.lacks.isdisjoint(word):
            raise _Lacking
        ids = tuple([token.id for token in self.model.tokenize(word.translate(SPELLING))])
        if len(word) <= MAX_WORD:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids
