"""Ids found by words seen before are the library's, and so is where every character lies in them."""

import json
import random
from functools import cache
from itertools import accumulate, product

import pytest
from conftest import SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from sftcli.errors import DataError
from sftcli.reading import read_objects
from sftcli.text import words
from sftcli.text.bounds import Bounds
from sftcli.text.gguf_pretokenizers import DIGITS, LLAMA3, QWEN2, QWEN35, TEKKEN, WORDS, isolated
from sftcli.text.speaker import Rendered
from sftcli.text.tokenizer import Codec
from sftcli.text.vocabulary import train_bpe

CONTROLS = ["<|end|>", "<|", "<|en", "<tool>", "\n\n\n", "'s<"]
LEARNT = [
    "the river's bank isn't where they'll go; we've 12 345 things.\n\n\tindent  two   three\r\n",
    "IT'S WE'LL x=1;\n  if (a == b) {\n    return 100000;\n  }\n!!! ... \x0b\x0c \x1c\x1f\x00",
    "<|end|> <tool> The the THE 's 't 're 've 'm 'll 'd  \n \n  a\n\n\nb",
    "café café café café éa aé été .é é. 's\u212a \u00a0é",
]
WAYS = {
    "gpt2": (None, [WORDS], False),
    "smollm": (None, [DIGITS, WORDS], False),
    "llama3": (None, isolated(LLAMA3), True),
    "qwen2": ({"type": "NFC"}, isolated(QWEN2), False),
    "qwen35": ({"type": "NFC"}, isolated(QWEN35), False),
}
KINDS = [*WAYS, "init", "lacking"]
PIECES = [
    *" \n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x00\x7f'sStTdDmMrRvVlLeEaZ019.,!<|>-_$\"",
    *("'s", "'LL", "'re", "'vE", "  ", "   ", "\r\n", "\n\n", " \n", "the", " River", "12", "1234", "...", " ?!"),
    *CONTROLS,
    *(token[:3] for token in CONTROLS),
]


@cache
def definition(kind):
    """A small tokenizer.json that cuts words in such a way."""
    if kind == "init":
        return json.loads(train_bpe(LEARNT * 3, 330, CONTROLS))
    normalizer, steps, whole_words = WAYS.get(kind, WAYS["smollm"])
    tokenizer = Tokenizer(models.BPE())
    cutting = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | cutting))
    alphabet = [] if kind == "lacking" else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LEARNT * 3, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=i % 2 == 0) for i, token in enumerate(CONTROLS)])
    made = json.loads(tokenizer.to_str()) | {"normalizer": normalizer}
    made["model"]["ignore_merges"] = whole_words
    return made


def codec_with(made):
    return Codec(json.dumps(made).encode(), "made")


@cache
def codec_of(kind):
    return codec_with(definition(kind))


@cache
def by_library(kind):
    """The same tokenizer, by the library alone."""
    codec = codec_with(definition(kind))
    codec.by_words = None
    return codec


def lacks(codec, text):
    return any(char in codec.by_words.known.lacks for char in text)


def check(codec, texts):
    """Ids and places of ASCII texts, by words and by the library."""
    encodings = codec.tokenizer.encode_batch(texts, add_special_tokens=False)
    compared = 0
    for text, encoding in zip(texts, encodings, strict=True):
        found = codec.by_words.encode(text)
        assert found is not None or lacks(codec, text), text
        if found:
            cuts = codec.tokenizer.pre_tokenizer.pre_tokenize_str(text)
            ends = list(accumulate(map(len, codec.by_words.cut(text))))
            assert ends == [end for _, (_, end) in cuts], text  # a cut that no merge crosses shows in no id
            bounds = Bounds(encoding.ids, encoding, len(text))
            assert found.ids == bounds.ids, text
            order = list(range(-1, len(text) + 2))
            random.Random(len(text)).shuffle(order)  # what was found for one character must not mislead the next
            assert [found.token_at(i) for i in order] == [bounds.token_at(i) for i in order], text
            compared += 1
    return compared


# ---- the same ids, the same places


EXAMPLES = pytest.mark.parametrize("examples", [40, pytest.param(400, marks=pytest.mark.slow)])


def tried(strategy, examples, work):
    """work(drawn) for that many examples."""
    settings(max_examples=examples)(given(strategy)(work))()


@pytest.mark.parametrize("kind", KINDS)
def test_short_texts_of_all_that_the_patterns_tell_apart_have_the_librarys_ids(kind):
    ascii_, pairs = [chr(b) for b in range(128)], " \n\t\r\x0b\x0c\x1c\x1f\x00\x7f'sStTdDmMrRvVlLeEaZ09.,!<|>-_$"
    texts = [
        "",
        *ascii_,
        *map("".join, product(pairs, repeat=2)),
        *map("".join, product(" \n\t\r'sl1.\x1c<a", repeat=3)),
    ]
    texts += [
        "".join(cut) for cut in product(("a", " ", ".", "1"), (" ", "  ", "\n", " \n", "\t"), (*CONTROLS, "1", "b"))
    ]
    assert check(codec_of(kind), texts) > (len(texts) if kind != "lacking" else 1000) - 1


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
def test_texts_have_the_librarys_ids_and_places(kind, examples):
    def work(texts):
        check(codec_of(kind), texts)

    text = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
    tried(st.lists(text, min_size=1, max_size=8), examples, work)


spans = st.lists(
    st.tuples(
        st.lists(st.sampled_from([*PIECES, *"éaé.", "\u212a", "\u00a0"]), max_size=6).map("".join),
        st.sampled_from(["user", "template", "tool", "ASSISTANT"]),
    ),
    max_size=8,
)


def rendered(pieces):
    """A text of (text, role) pieces; a role in capitals begins the model's own words, 'template' is no content."""
    text, segments, content = "", [], []
    for piece, role in pieces:
        if piece:
            segments.append((len(text), len(text) + len(piece), role.lower(), role.isupper(), 1.0))
            content += [(len(text), len(text) + len(piece))] if role != "template" else []
            text += piece
    return Rendered(text, segments, content, [start for start, _, _, own, _ in segments if own])


def outcome(codec, text):
    codec.counts.__init__()
    try:
        return codec.encode([text]), codec.counts
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
def test_documents_are_those_of_the_library_alone(kind, examples):
    """With hard cuts, control strings in content and characters beyond ASCII, and counted alike."""

    def work(pieces):
        text = rendered(pieces)
        assert outcome(codec_of(kind), text) == outcome(by_library(kind), text)

    tried(spans, examples, work)


def test_a_cut_before_a_character_beyond_ascii_is_the_librarys():
    text = rendered([("caf", "user"), ("é", "ASSISTANT")])
    found, counts = outcome(codec_of("smollm"), text)
    assert (found, counts) == outcome(by_library("smollm"), text)
    assert counts.merges_cut == 1


def test_words_that_were_forgotten_are_found_again(monkeypatch):
    monkeypatch.setattr(words, "MAX_WORDS", 5)
    monkeypatch.setattr(words, "MAX_WORD", 4)
    codec = codec_with(definition("gpt2"))
    check(codec, ["the river isn't where they'll go " * 3] * 2)
    assert len(codec.by_words.known) <= 5
    assert max(map(len, codec.by_words.known)) <= 4


def test_the_library_is_not_asked_for_words_seen_before(monkeypatch):
    codec = codec_with(definition("smollm"))
    text = rendered([("the river", "user"), ("isn't 12\n", "ASSISTANT")])
    monkeypatch.setattr(codec, "_batch", None)
    (first,) = codec.encode([text])
    codec.by_words.known.model = None
    assert codec.encode([text]) == [first]


@pytest.mark.real
def test_a_real_model_has_the_librarys_ids_and_places(smollm2):
    codec = Codec((smollm2 / "tokenizer.json").read_bytes(), "real")
    lines = [line.decode() for _, line, _ in read_objects(str(SAMPLES / "train.jsonl"))]
    draw = random.Random(0)
    pieces = [*PIECES, *codec.added]
    lines += ["".join(draw.choices(pieces, k=40)) for _ in range(3000)]
    assert check(codec, [line for line in lines if line.isascii()]) > 2000


# ---- who is not served


def changed(kind="smollm", **fields):
    made = json.loads(json.dumps(definition(kind)))
    for name, value in fields.items():
        if name in ("normalizer", "pre_tokenizer"):
            made[name] = value
        elif name in made["added_tokens"][0]:
            made["added_tokens"][0][name] = value
        else:
            made["model"][name] = value
    return made


def steps(*found):
    return {"type": "Sequence", "pretokenizers": list(found)}


SPACE_FIRST = {**WORDS, "add_prefix_space": True}
(SPLIT, BYTES) = isolated(LLAMA3)
OTHERS = {
    "lstrip": {"lstrip": True},
    "rstrip": {"rstrip": True},
    "single word": {"single_word": True},
    "a normalized token beside others": {"normalized": True},
    "a normalized token under NFC": {"kind": "qwen2", "normalized": True},
    "lower case": {"normalizer": {"type": "Lowercase"}},
    "NFKC": {"normalizer": {"type": "NFKC"}},
    "dropout": {"dropout": 0.1},
    "a prefix": {"continuing_subword_prefix": "##", "merges": []},
    "a suffix": {"end_of_word_suffix": "</w>"},
    "a space first": {"pre_tokenizer": SPACE_FIRST},
    "digits together": {"pre_tokenizer": steps({**DIGITS, "individual_digits": False}, WORDS)},
    "digits last": {"pre_tokenizer": steps(WORDS, DIGITS)},
    "no words": {"pre_tokenizer": BYTES},
    "no pre-tokenizer": {"pre_tokenizer": None},
    "another pattern": {"pre_tokenizer": steps(*isolated(TEKKEN))},
    "merged with what follows": {"pre_tokenizer": steps({**SPLIT, "behavior": "MergedWithNext"}, BYTES)},
    "inverted": {"pre_tokenizer": steps({**SPLIT, "invert": True}, BYTES)},
    "metaspace": {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_tokenizer_that_might_cut_otherwise_is_left_to_the_library(name):
    assert codec_with(changed()).by_words is not None
    assert codec_with(changed(**OTHERS[name])).by_words is None


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel"])
def test_other_models_are_left_to_the_library(kind):
    vocabulary = {"a": 0, "b": 1}
    model = {
        "WordPiece": models.WordPiece(vocabulary, unk_token="a"),
        "WordLevel": models.WordLevel(vocabulary, unk_token="a"),
        "Unigram": models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0),
    }[kind]
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert Codec(tokenizer.to_str().encode(), kind).by_words is None


def test_two_tokens_of_one_id_are_left_to_the_library():
    made = changed()
    first, second, *_ = made["model"]["vocab"]
    made["model"]["vocab"][first] = made["model"]["vocab"][second]
    assert codec_with(made).by_words is None


def test_an_added_token_that_the_library_gives_another_id_leaves_all_to_the_library():
    made = changed()
    made["added_tokens"][-1]["id"] += 50
    assert codec_with(made).by_words is None


def test_an_unknown_token_for_characters_without_one_is_the_librarys():
    made = changed("lacking", unk_token="the")
    codec, alone = codec_with(made), codec_with(made)
    alone.by_words = None
    text = rendered([("the \x05 river\x06", "user"), ("it\x07s", "ASSISTANT")])
    assert codec.by_words.encode(text.text) is None
    assert outcome(codec, text) == outcome(alone, text)
