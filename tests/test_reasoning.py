"""Reasoning: which part of a turn it is, and what --train-on own-final and own-reasoning train of it."""

import json

import pytest
from chat_families import BY_NAME, conversation
from conftest import SAMPLES, chat
from test_template import documents, only, record_of, speaker_of

from sftcli.rows import REASONING, Segment, own_turns
from sftcli.text.folder import load_codec

START = "<|im_start|>assistant\n"
NAMED = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content %}{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{- m.content + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)
OPENED = NAMED.replace("{{- '<|im_start|>assistant\n' }}", "{{- '<|im_start|>assistant\n<think>\n' }}")
CHANNELS = (  # reasoning in a message of its own, closed by a special token
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.thinking %}{{- 'analysis: ' + m.thinking + '<|im_end|>' + '<|im_start|>' + m.role + '\nfinal: ' }}{% endif %}"
    "{{- m.content + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)


def said(content, **fields):
    return {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": content, **fields}]}


def own(template, record):
    """The own segments of a conversation's only document."""
    return [piece for piece in only(template, record) if piece[1].isupper()]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_the_message_names_ends_with_what_the_template_closes_it_with(field):
    template = NAMED.replace("reasoning_content", field)
    assert own(template, said("four", **{field: "two twos"})) == [
        ("<think>\ntwo twos\n</think>", "REASONING"),
        ("\n\nfour<|im_end|>", "ASSISTANT"),
    ]


def test_named_reasoning_is_a_fact_of_rendering_and_not_searched_for():
    """It holds the closing tag itself, and the answer holds a whole block of its own."""
    record = said("write <think>x</think> so", reasoning_content="they ask for </think> tags")
    assert own(NAMED, record) == [
        ("<think>\nthey ask for </think> tags\n</think>", "REASONING"),
        ("\n\nwrite <think>x</think> so<|im_end|>", "ASSISTANT"),
    ]


def test_reasoning_in_a_message_of_its_own_ends_with_its_special_token():
    assert own(CHANNELS, said("four", thinking="two twos")) == [
        ("analysis: two twos<|im_end|>", "REASONING"),
        (START + "final: four<|im_end|>", "ASSISTANT"),
    ]


def test_reasoning_inside_the_content_stands_between_tags_at_its_beginning():
    assert own(NAMED, said("\n<think>two twos</think>\nfour")) == [
        ("\n<think>two twos</think>", "REASONING"),
        ("\nfour<|im_end|>", "ASSISTANT"),
    ]


@pytest.mark.parametrize(
    "content",
    ["four", "so <think>two twos</think> four", "<think>\n\n</think>\n\nfour", "<think>two", "</think>four", ""],
)
def test_turns_without_reasoning_are_one_segment(content):
    assert own(NAMED, said(content)) == [(content + "<|im_end|>", "ASSISTANT")]
    assert own(NAMED, said(content, reasoning_content="")) == [(content + "<|im_end|>", "ASSISTANT")]


def test_reasoning_that_the_prompt_opens_begins_with_the_models_words():
    found = only(OPENED, said("four", reasoning_content="two twos"))
    assert found[2:5] == [
        ("<|im_end|>\n<|im_start|>assistant\n<think>\n", "template"),
        ("two twos\n</think>", "REASONING"),
        ("\n\nfour<|im_end|>", "ASSISTANT"),
    ]
    inline = OPENED.replace("m.content +", "(m.content if m.role == 'user' else '<think>\n' + m.content) +")
    assert only(inline, said("two twos</think>four"))[3:5] == [
        ("two twos</think>", "REASONING"),
        ("four<|im_end|>", "ASSISTANT"),
    ]


def test_reasoning_of_turns_that_are_only_shown_is_not_the_models():
    """A template that drops old reasoning: each document trains the reasoning of its own turn."""
    record = chat("a", "one", "b", "two", "c", "three")
    for message, why in zip(record["messages"][1::2], ("because", "thus", "hence"), strict=True):
        message["reasoning_content"] = why
    dropping = NAMED.replace("m.reasoning_content %}", "m.reasoning_content and (loop.last or loop.index0 > 1) %}")
    found = documents(dropping, record)
    trained = [[piece for piece in document if piece[1].isupper()] for document in found]
    assert [[text for text, _ in document] for document in trained] == [
        ["<think>\nbecause\n</think>", "\n\none<|im_end|>"],
        ["<think>\nthus\n</think>", "\n\ntwo<|im_end|>"],
        ["<think>\nhence\n</think>", "\n\nthree<|im_end|>"],
    ]
    assert ("<think>\nthus\n</think>\n\ntwo<|im_end|>", "assistant") in found[2]  # shown as it was spoken


def test_a_turn_is_one_whether_or_not_it_reasons():
    parts = [(0, 2, "user", False), (2, 5, REASONING, True), (5, 7, "assistant", True), (7, 9, "assistant", True)]
    parts += [(9, 10, REASONING, True), (10, 11, "user", False), (11, 12, "assistant", True)]
    turns = own_turns([Segment(*part, 1.0) for part in parts])
    assert [(t.start, t.end, t.role) for t in turns] == [
        (2, 7, "assistant"), (7, 9, "assistant"), (9, 10, REASONING), (11, 12, "assistant")
    ]  # fmt: skip


def test_reasoning_in_several_pieces_is_one_turn_with_what_follows():
    parts = [(3, 7, REASONING), (7, 9, REASONING), (9, 15, "assistant")]
    (turn,) = own_turns([Segment(start, end, role, True, 1.0) for start, end, role in parts])
    assert (turn.start, turn.end, turn.role) == (3, 15, "assistant")


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_segments_of_real_templates_are_those_of_tags_in_the_text(name):
    """The template splits and strips the content; what it writes is searched here, plainly."""
    family = BY_NAME[name]
    speaker, seen = speaker_of(family.source, family.specials), 0
    for number in range(40):
        record = record_of(conversation(family, number, reasoning=True))
        for document in speaker.documents(record):
            for start, end, role, mine, _ in document.segments:
                text = document.text[start:end]
                if mine and role == REASONING:
                    seen += 1
                    assert text.startswith("<think>") and text.endswith("</think>") and text.count("</think>") == 1
                elif mine and "</think>" in text:
                    assert not text.partition("</think>")[0].removeprefix("<think>").strip()
    assert seen > 10


# ---- through the pipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An empty model whose template writes reasoning."""
    from conftest import run_in_process

    folder = tmp_path_factory.mktemp("reasoning")
    (folder / "t.jinja").write_text(NAMED)
    done = run_in_process(
        "init", SAMPLES / "chats.jsonl", "-o", folder / "base", "--template", folder / "t.jinja", "--vocab-size", 400,
        "--set", "layers=1", "--set", "heads=2", "--set", "width=16",
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder / "base"


@pytest.fixture
def tokens(sft, lines, base):
    records = [
        said("four", reasoning_content="two twos"),
        said("<think>threes</think> six", reasoning_content=None),
        said("plain"),
        chat("a", "<think>one</think>b", "c", "d"),
    ]
    made = sft("tokenize", lines(*records), "-m", base)
    assert made.code == 0, made.err
    return made.out


def words(base, row):
    """The trained text of a row."""
    ids = [label for label in row["labels"] if label != -100]
    return load_codec(base).decode(ids, keep_special=True)


def test_final_and_reasoning_are_the_two_parts_of_own(sft, base, tokens):
    def texts(rule):
        return {row["id"]: words(base, row) for row in sft("mask", "--train-on", rule, stdin=tokens).rows}

    assert texts("own") == {
        "1": "<think>\ntwo twos\n</think>\n\nfour<|im_end|>",
        "2": "<think>threes</think> six<|im_end|>",
        "3": "plain<|im_end|>",
        "4": "<think>one</think>b<|im_end|>d<|im_end|>",
    }
    assert texts("own-final") == {
        "1": "\n\nfour<|im_end|>",
        "2": " six<|im_end|>",
        "3": "plain<|im_end|>",
        "4": "b<|im_end|>d<|im_end|>",
    }
    assert texts("own-reasoning") == {
        "1": "<think>\ntwo twos\n</think>",
        "2": "<think>threes</think>",
        "4": "<think>one</think>",
    }
    assert texts("last") == texts("own") | {"4": "d<|im_end|>"}


def test_documents_without_reasoning_are_dropped_by_their_own_reason(sft, tokens):
    result = sft("mask", "--train-on", "own-reasoning", stdin=tokens)
    assert "4 rows in, 3 kept, 0 cut, 1 dropped (1 no reasoning, first <stdin>:3)" in result.err
    assert "the stop token <|im_end|> is never trained" in result.err
    assert "is trained 5 times in 5 turns" in sft("mask", "--train-on", "own-final", stdin=tokens).err


def test_turns_of_rows_and_roles_do_not_change_with_reasoning(sft, tokens):
    own = sft("mask", stdin=tokens)
    assert [len(row["turns"]) for row in own.rows] == [1, 1, 1, 2]
    assert [row["labels"] for row in sft("mask", "--roles", "assistant", stdin=tokens).rows] == [
        row["labels"] for row in own.rows
    ]
    for row, document in zip(own.rows, map(json.loads, tokens.splitlines()), strict=True):
        begin, end = row["turns"][0][:2]
        assert row["turns"][0][2:] == ["assistant", 0]
        parts = [part for part in document["segments"] if part[3] and begin <= part[0] < end]
        assert (parts[0][0], parts[-1][1], len(parts)) == (begin, end, 1 + (row["id"] != "3"))
    reasoning = sft("mask", "--train-on", "own-reasoning", stdin=tokens).rows
    assert [row["labels"] for row in sft("mask", "--roles", "reasoning", stdin=tokens).rows] == [
        row["labels"] for row in reasoning
    ]
    assert [len(row["turns"]) for row in reasoning] == [1, 1, 2]


def test_reasoning_that_the_template_leaves_out_is_a_warning(sft, lines, base):
    data = lines(said("four", reasoning_content="two twos"), said("<think>x</think>five"), said("six"))
    told = "warning: tokenize: the template leaves out the reasoning of 1 turns"
    assert told in sft("tokenize", data, "-m", base, "--template", "chatml").err
    assert "leaves out" not in sft("tokenize", data, "-m", base).err


def test_parts_need_segments(sft, lines):
    for rule in ("own-final", "own-reasoning"):
        result = sft("mask", lines({"input_ids": [5, 6]}), "--train-on", rule)
        assert result.code == 3 and "input_ids with neither segments nor labels nor loss_mask" in result.err
