"""A tokenizer whose control tokens go by other names, so that a text can spell control strings and stay text.

The new names are of the old lengths, so offsets stay true; ids are mapped back.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

PRIVATE = 0x100000  # the first of 65,534 characters that no text uses: each names one control token


class Renamed:
    """`names`: control string -> its name here. `ids`: an added token's id here -> its own."""

    def __init__(self, definition: dict[str, Any], controls: Iterable[str]):
        self.names = {token: chr(PRIVATE + n) * len(token) for n, token in enumerate(sorted(controls))}
        self.taken = re.compile(f"[{chr(PRIVATE)}-{chr(PRIVATE + max(len(self.names) - 1, 0))}]")
        added = definition.get("added_tokens") or []
        new = [{**token, "content": self.names.get(token["content"], token["content"])} for token in added]
        changed = {"added_tokens": new, "model": self._model(definition["model"]), "post_processor": None}
        self.tokenizer = Tokenizer.from_str(json.dumps({**definition, **changed, "truncation": None, "padding": None}))
        self.ids = {self.tokenizer.token_to_id(n["content"]): token["id"] for n, token in zip(new, added, strict=True)}

    def _model(self, model: dict[str, Any]) -> dict[str, Any]:
        """The model with the new names in its vocabulary, but for a BPE's: its merges name what they make."""
        if model.get("type") == "Unigram":
            return {**model, "vocab": [[self.names.get(piece, piece), score] for piece, score in model["vocab"]]}
        if model.get("type") not in ("WordLevel", "WordPiece"):
            return model
        vocabulary = {self.names.get(word, word): i for word, i in model["vocab"].items()}
        return {**model, "vocab": vocabulary, "unk_token": self.names.get(model["unk_token"], model["unk_token"])}
