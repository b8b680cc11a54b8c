"""Chat templates of real families, each with a small tokenizer of its kind, and conversations for them."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEMPLATES = Path(__file__).parent / "chat_templates"
GPT4_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACES = ["\n\n", "\n\n\n", "  ", "   "]  # what Gemma and others keep as added tokens: they control nothing


@dataclass
class Family:
    """A template, the kind of tokenizer that its models have, and what it has a place for."""

    name: str
    kind: str  # gpt2, gpt4: byte-level BPE; llama2, first, gemma: of SentencePiece's manner
    controls: tuple[str, ...]  # special added tokens
    tags: tuple[str, ...] = ()  # added tokens that are not special
    bos: str | None = None
    eos: str | None = None
    system: bool = True
    calls: int = 0  # how many tool calls a turn may hold
    swallows: bool = False  # its control tokens take the space behind them

    @property
    def source(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8")

    @property
    def specials(self) -> dict[str, str]:
        return {k: v for k, v in (("bos_token", self.bos), ("eos_token", self.eos)) if v}


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TURNS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")  # fmt: skip
GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
PHI3 = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
GRANITE = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
BOTH = {"bos": "<s>", "eos": "</s>"}
FAMILIES = [
    Family("chatml", "gpt4", IM, eos="<|im_end|>"),
    Family("llama3", "gpt4", LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>", calls=1),
    Family("mistral", "first", ("<s>", "</s>", *MISTRAL), **BOTH, calls=2, system=False),
    Family("qwen2_5", "gpt4", IM, CALLS[:2], eos="<|im_end|>", calls=2),
    Family("qwen3", "gpt4", IM, (*CALLS, "<think>", "</think>"), eos="<|im_end|>", calls=2),
    Family("qwen3_coder", "gpt4", IM, CALLS, eos="<|im_end|>", calls=2),
    Family("gemma2", "gemma", TURNS, bos="<bos>", eos="<eos>", system=False),
    Family("gemma3", "gemma", (*TURNS, "<start_of_image>"), bos="<bos>", eos="<eos>"),
    Family("glm4", "gpt4", GLM, eos="<|endoftext|>", calls=1),
    Family("phi3", "llama2", ("<s>", *PHI3), bos="<s>", eos="<|endoftext|>", swallows=True),
    Family("smollm2", "gpt2", IM, bos="<|im_start|>", eos="<|im_end|>"),
    Family("smollm3", "gpt4", IM, ("<think>", "</think>"), eos="<|im_end|>"),
    Family("zephyr", "llama2", ("<s>", "</s>"), **BOTH),
    Family("olmo2", "gpt4", ("<|endoftext|>", "<|pad|>"), bos="<|endoftext|>", eos="<|endoftext|>"),
    Family("granite", "gpt2", GRANITE, bos="<|end_of_text|>", eos="<|end_of_text|>", calls=2),
    Family("deepseek_r1", "gpt4", DEEPSEEK, ("<think>", "</think>"), bos=DEEPSEEK[0], eos=DEEPSEEK[1]),
]
BY_NAME = {family.name: family for family in FAMILIES}


# ---- conversations

STARTS = ("", "", "", " ", "  ", "\n", "\n\n", "\t", "7", "42 ", "...", '"', "(", "- ", "é", "中", "🙂 ", "'s ", "<")
WORDS = (
    "the",
    "capital",
    "of",
    "China",
    "is",
    "Beijing",
    "where",
    "two",
    "3",
    "+",
    "4",
    "=",
    "7",
    ";",
    "«ça»",
    "中文",
    "it's",
    "ok",
    ".",
    "Oslo",
)
ENDS = ("", "", ".", "!", " ", "\n", "  \n")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Is it "wet" <there>? Où & quand',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Oslo", "São Paulo"]},
                    "days": {"type": "integer", "minimum": 1},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "add", "description": "Sum.", "parameters": {"type": "object", "properties": {}}},
    },
]


def words(chance: random.Random, reasoning: bool = False) -> str:
    """Some words; they begin with spaces, newlines, digits or punctuation as often as not."""
    text = " ".join(chance.choices(WORDS, k=chance.randint(1, 8)))
    text = chance.choice(STARTS) + text + chance.choice(ENDS)
    return f"<think>\n{' '.join(chance.choices(WORDS, k=3))}\n</think>\n\n{text}" if reasoning else text


def conversation(family: Family, number: int, reasoning: bool = False) -> dict[str, Any]:
    """A record with or without system, tools, calls and a last answer. Arguments are objects or JSON text."""
    chance = random.Random(f"{family.name} {number}")
    messages: list[dict[str, Any]] = []
    record: dict[str, Any] = {"messages": messages}
    if family.system and chance.random() < 0.5:
        messages.append({"role": "system", "content": words(chance)})
    if with_tools := family.calls and chance.random() < 0.5:
        record["tools"] = TOOLS
    for _ in range(chance.randint(1, 3)):
        messages.append({"role": "user", "content": words(chance)})
        if with_tools and chance.random() < 0.5:
            messages += _called(family, chance)
        messages.append({"role": "assistant", "content": words(chance, reasoning and chance.random() < 0.6)})
    if chance.random() < 0.2:
        messages.pop()
    return record


def _called(family: Family, chance: random.Random) -> list[dict[str, Any]]:
    """A turn that calls functions, and their results."""
    calls, results = [], []
    for i in range(chance.randint(1, family.calls)):
        arguments = chance.choice(
            [{"city": "Oslo", "days": 2}, {"b": 1.5, "a": [None, True, "é\n<x>"]}, {"city": "中"}]
        )
        key = f"call{chance.randint(10000, 99999)}"
        written = json.dumps(arguments) if chance.random() < 0.5 else arguments
        name = chance.choice(["weather", "add"])
        calls.append({"id": key, "type": "function", "function": {"name": name, "arguments": written}})
        results.append({"role": "tool", "name": name, "tool_call_id": key, "content": f"{i}: {words(chance)}"})
    content = words(chance) if family.name in ("qwen2_5", "qwen3", "qwen3_coder") and chance.random() < 0.5 else ""
    return [{"role": "assistant", "content": content, "tool_calls": calls}, *results]


# ---- tokenizers


def definition(family: Family, texts: list[str]) -> dict[str, Any]:
    """A tokenizer.json of the family's kind: a BPE trained on texts, and its control tokens."""
    spaced = family.kind in ("llama2", "first", "gemma")
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True) if spaced else models.BPE()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _words(family.kind) if not spaced else _spaced_words()
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if spaced else []
    alphabet = [] if spaced else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=first, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    for token in (*family.controls, *family.tags):
        texts = [text.replace(token, "\n") for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] == "<unk>"]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    if spaced:
        _spaced(tokenizer, family.kind)
    else:
        tokenizer.decoder = decoders.ByteLevel()
    rstrip = family.swallows
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=rstrip and t != "<s>") for t in family.controls])  # fmt: skip
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.tags])
    if family.kind in ("gemma", "gpt2"):
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in SPACES])
    return json.loads(tokenizer.to_str())


def _words(kind: str) -> Any:
    """GPT-2's pattern, or GPT-4's and Llama 3's."""
    if kind == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(GPT4_WORDS), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _spaced_words() -> Any:
    """No token of SentencePiece's holds a newline beside a letter."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")])  # fmt: skip


def _spaced(tokenizer: Tokenizer, kind: str) -> None:
    """Spaces are written ▁: one before every stretch (llama2), before the text (first) or nowhere (gemma)."""
    if kind == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), replace]) if kind == "llama2" else replace
        )
        tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
