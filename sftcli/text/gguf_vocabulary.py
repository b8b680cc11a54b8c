"""GGUF's vocabulary fields -> tokenizer.json and its configs, and back. Fields are plain values under their keys.

Two kinds: byte-level BPE ("gpt2": tokens and merges) and SentencePiece's BPE ("llama": tokens and scores, where the
pair whose joint token scores highest merges first).
"""

import re
from typing import Any

from sftcli.console import warn
from sftcli.errors import CheckpointError
from sftcli.text.gguf_pretokenizers import BOS_FIRST, flat, name_of_way, way_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPECIALS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
STOPS = ("eos", "eot", "eom")
KEY = "tokenizer.ggml."
SPACE = "▁"  # SentencePiece's


def read_tokenizer(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) of a file's fields. Raises CheckpointError."""
    kind = _field(fields, KEY + "model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"tokenizer.ggml.model {kind!r} is not supported", hint="gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    tokens, types = _tokens(fields)
    add_bos = fields.get(KEY + "add_bos_token", kind == "llama" or fields.get(KEY + "pre") in BOS_FIRST)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(add_bos),
        "add_eos_token": bool(fields.get(KEY + "add_eos_token", False)),
    }
    for name, key in SPECIALS.items():
        token = fields.get(f"{KEY}{key}_token_id")
        if token is not None and 0 <= token < len(tokens):
            config[name] = tokens[token]
    tokenizer = _byte_level(fields, tokens) if kind == "gpt2" else _sentencepiece(fields, tokens, types)
    tokenizer["added_tokens"] = [
        _added(i, tokens[i], types[i] != USER_DEFINED)
        for i in range(len(tokens))
        if types[i] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    tokenizer["post_processor"] = _post_processor(config, tokens)
    return tokenizer, config


def stop_tokens(fields: dict[str, Any]) -> list[int]:
    """The ids that end a turn: end of sequence, and of turn and of message where the file has them."""
    found = [fields.get(f"{KEY}{name}_token_id") for name in STOPS]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def _field(fields: dict[str, Any], key: str) -> Any:
    if key not in fields:
        raise CheckpointError(f"the file has no {key}")
    return fields[key]


def _tokens(fields: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and their types, without the placeholders at the end that only fill up the embedding.

    Gemma's runs of spaces, which llama.cpp matches whole, are merged from single ones in its tokenizer.json.
    """
    tokens: list[str] = _field(fields, KEY + "tokens")
    types: list[int] = fields.get(KEY + "token_type") or [NORMAL] * len(tokens)
    if not isinstance(tokens, list) or len(types) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens and tokenizer.ggml.token_type do not fit together")
    count = len(tokens)
    while count and types[count - 1] == UNUSED and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    tokens, types = tokens[:count], list(types[:count])
    if _is_gemma(fields.get("general.architecture")):
        runs = [i for i in range(count) if types[i] == USER_DEFINED and not tokens[i].strip(" ")]
        tokens = [SPACE * len(token) if not token.strip(" ") else token for token in tokens]
        types = [NORMAL if i in set(runs) else kind for i, kind in enumerate(types)]
    if len(set(tokens)) != count:
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise CheckpointError(f"tokenizer.ggml.tokens has {twice!r} twice")
    return tokens, types


def _is_gemma(architecture: str | None) -> bool:
    return str(architecture).startswith("gemma")


def _byte_level(fields: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    normalizer, steps, whole_words = way_of(fields.get(KEY + "pre", "default"))
    merges = [merge.split(" ", 1) for merge in _field(fields, KEY + "merges")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": normalizer} if normalizer else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, merges, ignore_merges=whole_words),
    }


def _sentencepiece(fields: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    prefix = bool(fields.get(KEY + "add_space_prefix", True))
    unknown = fields.get(KEY + "unknown_token_id", types.index(UNKNOWN) if UNKNOWN in types else None)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    scores = _scores(fields, len(tokens))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(
            tokens,
            merges_of_scores(tokens, types, scores),
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=BYTE in types,
        ),
    }


def _scores(fields: dict[str, Any], count: int) -> list[float]:
    """Gemma's scores do not say its merge order; the order of its tokens does."""
    if _is_gemma(fields.get("general.architecture")):
        return [-float(i) for i in range(count)]
    scores: list[float] = _field(fields, KEY + "scores")
    if len(scores) < count:
        raise CheckpointError(f"tokenizer.ggml.scores has {len(scores)} numbers for {count} tokens")
    return scores


def merges_of_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every pair that makes a token, the highest score of the joint token first."""
    mergeable = _mergeable(tokens, types)
    found: list[tuple[float, int, list[str]]] = []
    for token, score in zip(tokens, scores, strict=False):
        if token in mergeable:
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in mergeable and right in mergeable:
                    found.append((-score, -cut, [left, right]))
    found.sort(key=lambda merge: merge[:2])
    return [pair for _, _, pair in found]


def _mergeable(tokens: list[str], types: list[int]) -> set[str]:
    return {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}


def _bpe(tokens: list[str], merges: list[list[str]], **switches: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **switches,
        "vocab": {token: i for i, token in enumerate(tokens)},  # added tokens too: nothing else pins their ids
        "merges": merges,
    }


def _added(token: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token, "content": content, **flags}


def _post_processor(config: dict[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """What transformers' tokenizers add around a text (`sft` adds nothing: templates write it)."""
    first = config.get("bos_token") if config["add_bos_token"] else None
    last = config.get("eos_token") if config["add_eos_token"] else None
    if first is None and last is None:
        return None
    ids = {token: tokens.index(token) for token in (first, last) if token is not None}

    def around(*sequences: str) -> list[dict[str, Any]]:
        steps = []
        for number, sequence in enumerate(sequences):
            inner: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": number}}]
            before = [{"SpecialToken": {"id": first, "type_id": number}}] if first is not None else []
            after = [{"SpecialToken": {"id": last, "type_id": number}}] if last is not None else []
            steps += [*before, *inner, *after]
        return steps

    specials = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ids.items()}
    return {"type": "TemplateProcessing", "single": around("A"), "pair": around("A", "B"), "special_tokens": specials}


# ---- back


def write_tokenizer(
    tokenizer: dict[str, Any], config: dict[str, Any], stops: list[int], rows: int, architecture: str
) -> dict[str, Any]:
    """A file's vocabulary fields of tokenizer.json and its config; `rows`: of the embedding. Raises CheckpointError."""
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(f"a tokenizer of type {model.get('type')} has no place in GGUF", hint="BPE has")
    tokens, types = _listed(tokenizer, rows, architecture)
    fields: dict[str, Any] = {KEY + "tokens": tokens, KEY + "token_type": types}
    if _is_byte_level(tokenizer):
        fields |= {KEY + "model": "gpt2", KEY + "pre": name_of_way(tokenizer)}
        fields[KEY + "merges"] = [" ".join(_pair(merge)) for merge in model["merges"]]
    else:
        fields |= {KEY + "model": "llama", KEY + "pre": "default"}
        fields[KEY + "add_space_prefix"] = _space_prefix(tokenizer)
        fields[KEY + "scores"] = _scores_of_merges(tokenizer, tokens, types, architecture)
    ids = {token: i for i, token in enumerate(tokens)}
    for name, key in SPECIALS.items():
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            fields[f"{KEY}{key}_token_id"] = ids[token]
    fields |= _stop_fields(stops, fields.get(KEY + "eos_token_id"))
    fields[KEY + "add_bos_token"] = _adds(tokenizer, config, "bos_token", first=True)
    fields[KEY + "add_eos_token"] = _adds(tokenizer, config, "eos_token", first=False)
    return fields


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else merge


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether words are spelled in GPT-2's alphabet of bytes."""
    return any(step["type"] == "ByteLevel" for step in flat(tokenizer.get("pre_tokenizer"), "pretokenizers"))


def _listed(tokenizer: dict[str, Any], rows: int, architecture: str) -> tuple[list[str], list[int]]:
    """Tokens by id with their types; ids without a token are placeholders."""
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    added = {token["id"]: token for token in tokenizer.get("added_tokens") or []}
    by_id = {i: token for token, i in vocab.items()} | {i: token["content"] for i, token in added.items()}
    if max(by_id, default=-1) >= rows:
        raise CheckpointError(f"the tokenizer has id {max(by_id)}, but the embedding has only {rows} rows")
    unknown = vocab.get(tokenizer["model"].get("unk_token") or "")
    tokens, types = [], []
    for i in range(rows):
        token = by_id.get(i)
        if token is None:
            token, kind = f"[PAD{i}]", UNUSED
        elif i == unknown:
            kind = UNKNOWN
        elif i in added and not (_is_gemma(architecture) and not token.strip(SPACE)):
            kind = CONTROL if added[i]["special"] else USER_DEFINED
        else:
            kind = BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) and not _is_byte_level(tokenizer) else NORMAL
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _space_prefix(tokenizer: dict[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer writes a space before a text. Raises CheckpointError for others."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = flat(tokenizer.get("normalizer"), "normalizers")
    cuts = flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if not cuts or [cut.get("pattern") for cut in cuts] == [replace["pattern"]]:  # Gemma's: no space is left to cut at
        if steps == [{"type": "Prepend", "prepend": SPACE}, replace]:
            return True
        if steps == [replace]:
            return False
    if not steps and [cut["type"] for cut in cuts] == ["Metaspace"] and not cuts[0].get("split", True):
        scheme = cuts[0].get("prepend_scheme", "always")
        if scheme == "first":
            warn(
                "the tokenizer writes a space before a whole text only, the GGUF file never (chats have a token there)"
            )
        return bool(scheme == "always")
    raise CheckpointError(
        "the tokenizer cuts text in a way that has no name in GGUF (neither byte-level nor SentencePiece's)",
        hint="llama.cpp's convert_hf_to_gguf.py may know the model by its name",
    )


def _scores_of_merges(tokenizer: dict[str, Any], tokens: list[str], types: list[int], architecture: str) -> list[float]:
    """Scores in the order of merges. Raises CheckpointError where they would not give back the merges."""
    rank: dict[str, int] = {}
    mergeable = _mergeable(tokens, types)
    merges = [_pair(merge) for merge in tokenizer["model"]["merges"]]
    merges = [[left, right] for left, right in merges if {left, right, left + right} <= mergeable]
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    scores = [-float(rank.get(token, len(rank) + i)) for i, token in enumerate(tokens)]
    ordered = _scores({"general.architecture": architecture, KEY + "scores": scores}, len(tokens))
    again = merges_of_scores(tokens, types, ordered)
    if sorted(again) != sorted(merges) or [a + b for a, b in again] != [a + b for a, b in merges]:
        raise CheckpointError(
            "the tokenizer's merges do not follow from scores of its tokens, as GGUF's SentencePiece kind needs",
            hint="a byte-level tokenizer can be exported with any merges",
        )
    return scores


def _stop_fields(stops: list[int], eos: int | None) -> dict[str, int]:
    """End of sequence (the tokenizer's own, where it stops a turn), end of turn, end of message."""
    ordered = sorted(dict.fromkeys(stops), key=lambda token: token != eos) or ([eos] if eos is not None else [])
    return {f"{KEY}{name}_token_id": token for name, token in zip(STOPS, ordered, strict=False)}


def _adds(tokenizer: dict[str, Any], config: dict[str, Any], name: str, first: bool) -> bool:
    """Whether the tokenizer itself puts its begin (or end) token around a text."""
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    processor = tokenizer.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing":
            edge = step["single"][0 if first else -1]
            return token is not None and edge.get("SpecialToken", {}).get("id") == token
    return False
