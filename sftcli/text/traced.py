"""Strings that remember which of their characters came out of a message, through everything a template does to them.

    "<|im_start|>user\\n" + Traced("hello", message 0) + "<|im_end|>"   ->   characters 17..22 came from message 0

So the mask is a fact of rendering: nothing is searched for afterwards. Operations that are not tracked return plain
text, which then counts as the template's own.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

CONVERSION = re.compile(r"(%(?:\((\w+)\))?[#0 +-]*\d*(?:\.\d+)?[a-zA-Z%])")  # of `%` formatting
MAX_TEXT = 16 << 20  # characters of any text that a template makes
Span = tuple[int, int, int]  # start, end, number of the message
REASONING = 1 << 30  # added to the number of a message: the text is its reasoning


class Traced(str):
    """Text with the spans of it that came from messages, in order and disjoint."""

    spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: tuple[Span, ...]) -> "Traced":
        self = super().__new__(cls, text)
        self.spans = spans
        return self

    def __str__(self) -> str:
        return self  # Jinja writes every output as str(value): keep the trace

    def __add__(self, other: str) -> "Traced":
        return join_traced((self, other))

    def __radd__(self, other: str) -> "Traced":
        return join_traced((other, self))

    def __mul__(self, count: Any) -> "Traced":
        return join_traced([self] * count)

    __rmul__ = __mul__

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: Any) -> "Traced":
        text, size = str.__getitem__(self, key), len(self)
        start, stop, step = key.indices(size) if isinstance(key, slice) else (key % size, key % size + 1, 1)
        if step != 1:
            return self._whole(text)
        return Traced(text, _window(self.spans, start, max(start, stop)))

    def strip(self, chars: str | None = None) -> "Traced":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> "Traced":
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> "Traced":
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> "Traced":
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> "Traced":
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: int = -1) -> list[str]:  # type: ignore[override]
        return self._located(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: int = -1) -> list[str]:  # type: ignore[override]
        return self._located(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._located(str.splitlines(self, keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return tuple(self._located(str.partition(self, sep)))  # type: ignore[return-value]

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return tuple(self._located(str.rpartition(self, sep)))  # type: ignore[return-value]

    def join(self, pieces: Iterable[str], /) -> "Traced":
        if isinstance(pieces, Sized):
            refuse_longer(len(self) * (len(pieces) - 1))
        return join_traced([part for piece in pieces for part in (self, piece)][1:])

    def _located(self, pieces: Iterable[str], gap: int = 0) -> list[str]:
        """Pieces that follow each other in this text, `gap` characters apart, each with its own part of the trace."""
        found: list[str] = []
        at = 0
        for piece in pieces:
            at = str.find(self, piece, at)
            found.append(self[at : at + len(piece)])
            at += len(piece) + gap
        return found

    def replace(self, old: str, new: str, count: int = -1, /) -> "Traced":  # type: ignore[override]
        if not old:
            return self._whole(str.replace(self, old, new, count))
        found = str.count(self, old)
        refuse_longer(len(new) * (found if count < 0 else min(found, count)))
        pieces = self.split(old, count)
        between = [piece for kept in pieces for piece in (new, kept)][1:]
        return join_traced(between)

    def lower(self) -> "Traced":
        return self._same_length(str.lower(self))

    def upper(self) -> "Traced":
        return self._same_length(str.upper(self))

    def title(self) -> "Traced":
        return self._same_length(str.title(self))

    def capitalize(self) -> "Traced":
        return self._same_length(str.capitalize(self))

    def _same_length(self, text: str) -> "Traced":
        """Case changes keep the trace; the few characters whose length changes make all of it content."""
        return Traced(text, self.spans) if len(text) == len(self) else self._whole(text)

    def _whole(self, text: str) -> "Traced":
        """A text that was made of this one and whose characters are not followed: all of it counts as content."""
        return Traced(text, ((0, len(text), self.spans[0][2]),) if text and self.spans else ())


def _unfollowed(name: str) -> Callable[..., Traced]:
    made = getattr(str, name)
    return lambda self, *given: self._whole(made(self, *given))


for _name in ("center", "ljust", "rjust", "zfill", "expandtabs", "swapcase", "casefold", "translate"):
    setattr(Traced, _name, _unfollowed(_name))


def _window(spans: tuple[Span, ...], start: int, stop: int) -> tuple[Span, ...]:
    cut = ((max(a, start), min(b, stop), message) for a, b, message in spans)
    return tuple((a - start, b - start, message) for a, b, message in cut if a < b)


def refuse_longer(characters: int) -> None:
    if characters > MAX_TEXT:
        raise OverflowError(f"a text of more than {MAX_TEXT} characters")


def join_traced(pieces: Iterable[str]) -> Traced:
    """Concatenate; touching spans of one message become one."""
    spans: list[Span] = []
    texts, at = [], 0
    for piece in pieces:
        for a, b, message in getattr(piece, "spans", ()):
            if spans and spans[-1][1] == at + a and spans[-1][2] == message:
                spans[-1] = (spans[-1][0], at + b, message)
            else:
                spans.append((at + a, at + b, message))
        texts.append(piece)
        at += len(piece)
        refuse_longer(at)
    return Traced("".join(texts), tuple(spans))


def concat(pieces: Iterable[str]) -> str:
    """What Jinja joins output with: traced if any piece is."""
    joined = join_traced(pieces)
    return joined if joined.spans else str.__str__(joined)


def formatted(pattern: str, given: Any) -> str:
    """pattern % given, keeping the trace: a text at %s stays itself, in other conversions it counts as content."""
    if str.__mod__(pattern, given) == pattern:  # nothing is put in; Python's error where values and places differ
        return pattern
    values = iter(given if isinstance(given, tuple) else (given,))
    found: list[str] = []
    # (text before, conversion, name in it), ..., text behind
    texts = CONVERSION.split(pattern)
    for text, conversion, name in zip(texts[0::3], texts[1::3], texts[2::3], strict=False):
        if conversion == "%%":
            found += (text, "%")
            continue
        value = given[name] if name else next(values)
        made = str.__mod__(conversion, {name: value} if name else (value,))
        plain = conversion.endswith("s") and made == value
        found += (text, value if plain else value._whole(made) if isinstance(value, Traced) else made)
    return join_traced([*found, texts[-1]])


def trace(value: Any, message: int) -> Any:
    """A JSON value with every text in it (the keys of objects too: templates write them) traced to `message`."""
    if isinstance(value, str):
        return Traced(value, ((0, len(value), message),) if value else ())
    if isinstance(value, list):
        return [trace(item, message) for item in value]
    if isinstance(value, dict):
        return {trace(key, message): trace(item, message) for key, item in value.items()}
    return value


def traced_message(value: Any) -> int | None:
    """The message that the first traced text in a JSON value came from."""
    if isinstance(value, Traced):
        return value.spans[0][2] if value.spans else None
    items = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((message for item in items if (message := traced_message(item)) is not None), None)
