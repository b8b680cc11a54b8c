"""How GGUF's byte-level vocabularies cut text into words: `tokenizer.ggml.pre` names it, tokenizer.json spells it."""

from typing import Any

from sftcli.errors import CheckpointError

Way = tuple[str | None, list[dict[str, Any]], bool]  # normalizer, pre-tokenizers, whether a whole word needs no merges

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = {**BYTES, "use_regex": True}  # GPT-2's pattern is built in
DIGITS = {"type": "Digits", "individual_digits": True}

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTER = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_BIG, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITAL, _CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_BIG}*{_SMALL}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_BIG}+{_SMALL}*"
_TAIL_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_ENDINGS}|{_LETTER}|\p{{N}}{{1,3}}{_TAIL}"
QWEN2 = rf"{_ENDINGS}|{_LETTER}|\p{{N}}{_TAIL}"
QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = rf"{_CAPITAL}|{_CAPITALS}|\p{{N}}{_TAIL_WITH_SLASH}"
GPT4O = rf"{_CAPITAL}{_ENDINGS}?|{_CAPITALS}{_ENDINGS}?|\p{{N}}{{1,3}}{_TAIL_WITH_SLASH}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def isolated(*patterns: str) -> list[dict[str, Any]]:
    found = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return [*found, BYTES]


# The first name of a way is what an export writes. llama.cpp never normalises: NFC is what the named models' own
# tokenizer.json files do before.
WAYS: dict[tuple[str, ...], Way] = {
    ("gpt-2", "phi-2", "mpt", "jais", "exaone4", "trillion", "granite-docling"): (None, [WORDS], False),
    ("smollm", "starcoder", "refact", "codeshell", "minerva-7b"): (None, [DIGITS, WORDS], False),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"): (None, isolated(LLAMA3), True),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): (None, isolated(LLAMA3), False),
    ("qwen2",): ("NFC", isolated(QWEN2), False),
    ("deepseek-r1-qwen", "stablelm2", "megrez"): (None, isolated(QWEN2), False),
    ("qwen35",): ("NFC", isolated(QWEN35), False),
    ("olmo",): ("NFC", [WORDS], False),
    ("tekken",): (None, isolated(TEKKEN), True),
    ("gpt-4o", "llama4"): (None, isolated(GPT4O), False),
    ("default",): (None, isolated(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), False),
}
BOS_FIRST = {
    *("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"),
    "tekken",
}  # where the file says nothing


def way_of(pre: str) -> Way:
    """The way of cutting that a name stands for. Raises CheckpointError for a name that is not known."""
    for names, way in WAYS.items():
        if pre in names:
            return way
    known = ", ".join(name for names in WAYS for name in names)
    raise CheckpointError(f"tokenizer.ggml.pre {pre!r} is not known", hint=f"known: {known}")


def name_of_way(tokenizer: dict[str, Any]) -> str:
    """The name of how a byte-level tokenizer.json cuts text. Raises CheckpointError where llama.cpp has none."""
    steps = [plain(step) for step in flat(tokenizer.get("pre_tokenizer"), "pretokenizers")]
    normalizers = [step["type"] for step in flat(tokenizer.get("normalizer"), "normalizers")]
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    for names, (normalizer, expected, ignores_merges) in WAYS.items():
        same_start = normalizers == ([normalizer] if normalizer else [])
        if same_start and steps == [plain(step) for step in expected] and whole_words == ignores_merges:
            return names[0]
    told = " + ".join([*normalizers, *(step["type"] for step in steps)]) or "nothing"
    raise CheckpointError(
        f"the tokenizer cuts text in a way that has no name in GGUF ({told})",
        hint="llama.cpp's convert_hf_to_gguf.py may know the model by its name",
    )


def flat(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if step is None:
        return []
    return [part for one in step[inside] for part in flat(one, inside)] if step["type"] == "Sequence" else [step]


def plain(step: dict[str, Any]) -> dict[str, Any]:
    """A step without what changes no token: ByteLevel's trim_offsets; use_regex where it stands for its default."""
    if step["type"] != "ByteLevel":
        return step
    return {"type": "ByteLevel", "space": step.get("add_prefix_space", True), "words": step.get("use_regex", True)}
