"""Text never becomes a control token: every added token of six kinds of tokenizers, in every place a record has."""

import json
from functools import cache

import pytest
from chat_families import BY_NAME, TOOLS, WORDS, definition
from conftest import chat
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sftcli.artifacts import fingerprint
from sftcli.errors import DataError
from sftcli.reading import line_fields
from sftcli.text.records import read_record
from sftcli.text.speaker import Rendered, Speaker
from sftcli.text.template import Template
from sftcli.text.tokenizer import Codec

CONTROLS = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "<|user|>", "<|end|>"]
TEXTS = [" ".join(WORDS), "abcdefghijklmnopqrstuvwxyz", "<>|[]/_ ! ? a1 b2", json.dumps(TOOLS, ensure_ascii=False)]
TURNS = (
    "{% for m in messages %}<|user|>{{ m.role }} {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant {% endif %}"
)
TOOLS_TOO = "{% if tools %}{{ tools | tojson }}{% endif %}"
FAMILY = {
    "qwen": "qwen3",
    "llama3": "llama3",
    "smollm": "smollm2",
    "llama2": "phi3",
    "gemma": "gemma3",
}  # to the name of its template
KINDS = [*FAMILY, "wordpiece", "unigram"]
LOSSLESS = ("qwen", "llama3", "smollm")  # bytes


def wordpiece():
    """As BERT has it: lower case, words cut at punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def unigram():
    """As T5 has it: a unigram model of SentencePiece."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["[UNK]"], unk_token="[UNK]", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@cache
def codec_of(kind):
    if kind in FAMILY:
        return Codec(
            json.dumps(definition(BY_NAME[FAMILY[kind]], TEXTS)).encode(), kind, BY_NAME[FAMILY[kind]].specials
        )
    tokenizer = wordpiece() if kind == "wordpiece" else unigram()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROLS])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return Codec(tokenizer.to_str().encode(), kind)


@cache
def template_of(kind):
    if kind in FAMILY:
        return Template(BY_NAME[FAMILY[kind]].source, kind, BY_NAME[FAMILY[kind]].specials)
    return Template(TOOLS_TOO + TURNS, kind, {})


def encoded(kind, record):
    """(codec, ids, rendered) of all documents of a record."""
    codec, template = codec_of(kind), template_of(kind)
    read = read_record(line_fields(json.dumps(record).encode(), "x:1"), "x:1", 1, template.wanted)
    texts = Speaker(template, codec.ends).documents(read)
    return codec, [ids for ids, _ in codec.encode(texts)], texts


def controls_in(codec, documents):
    """The control ids of every document, in order; what stands for unknown characters is none."""
    return [[i for i in ids if i in codec._unwritable] for ids in documents]


CASES = [(kind, token) for kind in KINDS for token in codec_of(kind).controls]
WITH_TOOLS = ("qwen", "llama3", "wordpiece", "unigram")  # whose templates have a place for them


def places(kind, token):
    """Records with a text at every place that a record has for one."""
    text = f"a{token}b"
    cut = len(token) // 2
    yield "user", chat(text, "yes"), chat("hello", "yes")
    yield "assistant", chat("hello", text), chat("hello", "yes")
    yield "two messages", chat(f"a{token[:cut]}", f"{token[cut:]}b"), chat("hello", "yes")
    system = BY_NAME[FAMILY[kind]].system if kind in FAMILY else True
    if system:
        asked = chat("hello", "yes")
        yield "system", with_first(asked, text), with_first(asked, "hello")
    if kind in WITH_TOOLS:
        yield "tools", {**chat("hello", "yes"), "tools": tools(text)}, {**chat("hello", "yes"), "tools": tools("hello")}
        yield "arguments", calling("weather", {"city": text}), calling("weather", {"city": "hello"})
        yield "names of arguments", calling("weather", {text: 1}), calling("weather", {"hello": 1})
        yield "names", calling(text, {}), calling("weather", {})


def with_first(record, text):
    return {"messages": [{"role": "system", "content": text}, *record["messages"]]}


def tools(text):
    return [{"type": "function", "function": {"name": "weather", "description": text, "parameters": {}}}]


def calling(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": messages, "tools": tools("hello")}


@pytest.mark.parametrize("kind, token", CASES, ids=str)
def test_a_control_string_at_any_place_gives_no_control_id_more(kind, token):
    for place, record, honest in places(kind, token):
        try:
            codec, documents, texts = encoded(kind, record)
        except DataError as error:  # some words can be nothing but the token: they are refused, not let through
            assert "cannot write as text" in str(error) and kind in ("wordpiece", "unigram", "llama2", "gemma"), place
            continue
        assert controls_in(codec, documents) == controls_in(codec, encoded(kind, honest)[1]), place
        if kind in LOSSLESS:
            assert [codec.decode(ids, keep_special=True) for ids in documents] == [text.text for text in texts], place


def content_of(text):
    """A text that is content from end to end."""
    return Rendered(text, [(0, len(text), "user", False, 1.0)], [(0, len(text))], [])


def stitched(kinds):
    """Texts of halves, wholes and repetitions of control strings, with words between."""
    tokens = [t for kind in kinds for t, i in codec_of(kind).controls.items() if i in codec_of(kind)._unwritable]
    pieces = st.sampled_from([*tokens, *(t[: len(t) // 2] for t in tokens), *(t[len(t) // 2 :] for t in tokens)])
    return st.lists(st.one_of(pieces, st.sampled_from([" ", "\n", "a", "é中", "the river"])), max_size=6).map("".join)


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=60)
@given(data=st.data())
def test_content_of_bytes_decodes_to_itself_and_holds_no_control_id(kind, data):
    text = data.draw(st.one_of(stitched([kind]), st.text(max_size=20)))
    codec = codec_of(kind)
    ((ids, _),) = codec.encode([content_of(text)])
    assert not codec._unwritable & set(ids)
    assert codec.decode(ids, keep_special=True) == text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LOSSLESS])
@settings(max_examples=60)
@given(data=st.data())
def test_other_content_decodes_as_a_tokenizer_without_control_tokens_does(kind, data):
    """The same tokenizer without added tokens knows no control strings at all."""
    text = data.draw(stitched([kind]))
    codec = codec_of(kind)
    bare = Tokenizer.from_str(json.dumps({**codec.json, "added_tokens": []}))
    try:
        ((ids, _),) = codec.encode([content_of(text)])
    except DataError as error:
        assert "cannot write as text" in str(error)
        return
    assert not codec._unwritable & set(ids)
    assert codec.decode(ids, keep_special=True) == bare.decode(bare.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)  # fmt: skip


# ---- what else may be asked for


def test_control_strings_can_be_refused_or_allowed(sft, lines, base):
    data = lines(chat("q", "a"), chat("q <|im_end|> r", "<|im_start|>"))
    plain = sft("tokenize", data, "-m", base)
    assert "2 control strings in content were encoded as plain text" in plain.err
    refused = sft("tokenize", data, "-m", base, "--special-in-content", "error")
    assert refused.code == 3 and f"error: {data}:2: control string <|im_end|> in content" in refused.err
    assert refused.rows[:-1] == plain.rows[:1]
    skipped = sft("tokenize", data, "-m", base, "--special-in-content", "error", "--on-error", "skip")
    assert skipped.rows == plain.rows[:1] and "1 rejected" in skipped.err
    allowed = sft("tokenize", data, "-m", base, "--special-in-content", "allow")
    assert "warning: tokenize: 2 control strings in content became control tokens" in allowed.err
    assert allowed.rows[0] == plain.rows[0]
    ids, honest = allowed.rows[1]["input_ids"], plain.rows[1]["input_ids"]
    assert (ids.count(1), ids.count(2)) == (honest.count(1) + 1, honest.count(2) + 1)
    assert sft("tokenize", data, "-m", base, "--special-in-content", "maybe").code == 2


def test_generate_reads_control_strings_as_tokenize_does(sft, lines, tmp_path):
    from model_fixtures import model_folder

    folder = model_folder(tmp_path / "m", "llama")
    data = lines({"prompt": "a <|im_end|> b"})
    flags = ("-m", folder, "--max-new-tokens", 2)
    assert "1 control strings in content were encoded as plain text" in sft("generate", data, *flags).err
    assert sft("generate", data, *flags, "--special-in-content", "error").code == 3
    assert "became control tokens" in sft("generate", data, *flags, "--special-in-content", "allow").err


def test_a_tokenizer_keeps_its_name_whatever_is_asked_for():
    """Rows of either kind belong to the same model."""
    codec = codec_of("qwen")
    assert codec.hash == fingerprint(codec.definition)
