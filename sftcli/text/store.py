"""Tokenizers and templates kept by their hash, so that a later stage can name tokens and save the template."""

import os
from pathlib import Path

import msgspec

from sftcli.artifacts import fingerprint
from sftcli.text.tokenizer import Codec


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
    except (OSError, ValueError):  # a name comes out of a file: it may hold anything
        return None


def recall_codec(tokenizer_hash: str | None) -> Codec | None:
    """The tokenizer with this hash, if this machine has tokenised with it."""
    data = _definition(tokenizer_hash)
    return Codec(data, str(tokenizer_hash)) if data else None


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool


class _Definition(msgspec.Struct):
    added_tokens: list[_Added] | None = None


def recall_specials(tokenizer_hash: str | None) -> dict[int, str] | None:
    """Ids and texts of the special tokens alone: to load the tokenizer takes as long as masking a thousand rows."""
    data = _definition(tokenizer_hash)
    added = msgspec.json.decode(data, type=_Definition).added_tokens or [] if data else None
    return None if added is None else {token.id: token.content for token in added if token.special}


def _definition(tokenizer_hash: str | None) -> bytes | None:
    data = recall(f"{tokenizer_hash}.tokenizer.json") if tokenizer_hash else None
    return data if data and fingerprint(data) == tokenizer_hash else None
