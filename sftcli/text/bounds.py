"""Where the characters of a text lie in what the tokenizers library made of it."""

from dataclasses import dataclass
from typing import Any

from sftcli.text.words import Starts


@dataclass
class Bounds:
    """Ids of a text, and where its characters lie in them. The encoding has `chars` and `tokens` of an anchor before
    the text."""

    ids: list[int]
    encoding: Any
    length: int
    chars: int = 0
    tokens: int = 0

    def token_at(self, char: int) -> int:
        """The first token that starts at or after a character: a token belongs where its first character does."""
        if char <= 0:
            return 0
        if char >= self.length:
            return len(self.ids)
        encoding, first = self.encoding, char + self.chars
        for at in range(first, self.length + self.chars):
            token = encoding.char_to_token(at)
            if token is None:
                continue  # a character that left no token of its own (normalised away)
            begins_before = encoding.token_to_chars(token)[0] < first
            while begins_before and token < len(encoding) and encoding.token_to_chars(token)[0] < first:
                token += 1
            return int(token) - self.tokens
        return len(self.ids)


Placed = Bounds | Starts


def merged(joint: Placed, cut: int, before: list[int], after: list[int]) -> bool:
    """Whether the text around a cut, encoded in one, has other tokens beside the cut than its two sides have."""
    at = joint.token_at(cut)
    beside = joint.ids[max(at - 1, 0) : at + 1]
    return bool(beside != before[-1:] + after[:1])
