"""Blank infilling (GLM): the vectors through the command line, and what every drawn row must hold."""

import random
from itertools import pairwise

import pytest
from conftest import chat, write_lines

from sftcli.fieldtypes import GLM_CONTROLS
from sftcli.recipe import BlankInfilling, Mask
from sftcli.rows import IGNORE, Document
from sftcli.text.folder import load_codec
from sftcli.text.objectives.blank_infilling import Marks, blanks_of, infilled, sentences

M, S, E = 3, 4, 5
MARKS = [f"--set=objective.{name}={token}" for name, token in (("mask", M), ("sop", S), ("eop", E))]
X = [6, 7, 8, 9, 10, 11]  # x1..x6


def columns(row):
    """(ids, labels, pos, block): trained labels of part B only."""
    size = row["order"].count(0)
    assert row["align"] == "same" and row["objective"] == "glm"
    assert row["labels"][:size] == [IGNORE] * size and IGNORE not in row["labels"][size:]
    assert row["order"] == [0] * size + list(range(1, len(row["input_ids"]) - size + 1))
    return row["input_ids"], row["labels"][size:], row["position_ids"], row["block_position_ids"]


@pytest.fixture
def glm(sft, tmp_path):
    """The only row of some ids under `sft mask --objective glm FLAGS`, and what was shown of it."""

    def made(ids, *flags):
        result = sft("mask", write_lines(tmp_path / "d.jsonl", {"input_ids": ids}), "--objective", "glm", *flags)
        assert result.code == 0, result.err
        (row,) = result.rows
        return row, result.err

    return made


# ---- the vectors


def test_glm_1_two_blanks_in_both_orders(glm):
    row, _ = glm(X, "--spans", "2:3,4:6", "--order", "1,0", *MARKS)
    assert columns(row) == (
        [6, 7, M, 9, M, S, 10, 11, S, 8],
        [10, 11, E, 8, E],
        [0, 1, 2, 3, 4, 4, 4, 4, 2, 2],
        [0, 0, 0, 0, 0, 1, 2, 3, 1, 2],
    )
    row, _ = glm(X, "--spans", "2:3,4:6", "--order", "0,1", *MARKS)
    assert columns(row) == (
        [6, 7, M, 9, M, S, 8, S, 10, 11],
        [8, E, 10, 11, E],
        [0, 1, 2, 3, 4, 2, 2, 4, 4, 4],
        [0, 0, 0, 0, 0, 1, 2, 1, 2, 3],
    )


def test_glm_1_is_shown_with_its_attention_grid(glm):
    _, shown = glm(X, "--spans", "2:3,4:6", "--order", "1,0", "--show", 1, *MARKS)
    grid = [line.split()[-1] for line in shown.split("sees\n")[1].splitlines()]
    assert grid[:10] == ["1111100000"] * 5 + ["1111110000", "1111111000", "1111111100", "1111111110", "1111111111"]


def test_glm_2_text_after_a_blank_counts_it_as_one(glm):
    row, _ = glm(list(range(100, 111)), "--spans", "2:5,7:8", "--order", "1,0", *MARKS)
    assert columns(row) == (
        [100, 101, M, 105, 106, M, 108, 109, 110, S, 107, S, 102, 103, 104],
        [107, E, 102, 103, 104, E],
        [*range(9), 5, 5, 2, 2, 2, 2],
        [*[0] * 9, 1, 2, 1, 2, 3, 4],
    )


@pytest.mark.parametrize(
    "lengths, places, spans",
    [("3,1", "0,0", [(1, 4), (5, 6)]), ("3,1", "5,5", [(6, 9), (10, 11)]), ("1,3", "2,4", [(3, 4), (7, 10)])],
)
def test_glm_3_places_count_the_free_tokens_before_each_blank(glm, lengths, places, spans):
    ids = list(range(100, 112))  # 10 tokens that may be blanked between the first and the last
    row, _ = glm(ids, "--lengths", lengths, "--places", places, "--order", "0,1", *MARKS)
    said = [[*ids[a:b], E] for a, b in spans]
    assert columns(row)[1] == said[0] + said[1]
    assert row["input_ids"].count(M) == 2 and restored(row, Marks(M, S, E)) == ids


def test_glm_3_a_place_that_does_not_exist_is_refused(sft, lines):
    data = lines({"input_ids": list(range(100, 112))})
    result = sft("mask", data, "--objective", "glm", "--lengths", "3,1", "--places", "6,6", *MARKS)
    assert result.code == 3 and f"{data}:1" in result.err and "do not fit" in result.err


def test_glm_4_the_end_of_a_document_needs_no_end_of_piece(glm):
    row, _ = glm(
        [20, 21, 22, 23, 24, 25, 26, 2], "--level", "document", "--lengths", 4, "--set", "objective.suffix=1", *MARKS
    )
    assert columns(row) == (
        [20, 21, 22, 23, M, S, 24, 25, 26],
        [24, 25, 26, 2],
        [0, 1, 2, 3, 4, 4, 4, 4, 4],
        [0, 0, 0, 0, 0, 1, 2, 3, 4],
    )


@pytest.fixture
def words(sft, tmp_path):
    """A vocabulary of words with GLM's control tokens, and the tokens of GLM-5."""
    data = write_lines(
        tmp_path / "qa.jsonl", {"question": "where is the capital of China", "answer": "The capital is Beijing"}
    )
    result = sft(
        "init", data, "-o", tmp_path / "words", "--tokenizer", "whitespace", "--set", "controls=glm",
        "--template-text", "<cls> {question} {answer}",
    )  # fmt: skip
    assert result.code == 0, result.err
    return tmp_path / "words", sft("tokenize", data, "-m", tmp_path / "words").out


def test_glm_5_the_answer_is_the_blank_behind_its_prompt(sft, words):
    folder, tokens = words
    (row,) = sft("mask", "--objective", "glm", "--level", "sft", stdin=tokens).rows
    codec = load_codec(folder)
    ids, labels, positions, blocks = columns(row)
    assert codec.decode(ids, keep_special=True) == (
        "<cls> where is the capital of China [gMASK] <|startofpiece|> The capital is Beijing"
    )
    assert codec.decode(labels, keep_special=True) == "The capital is Beijing <|endofpiece|>"
    assert positions == [*range(8), 7, 7, 7, 7, 7] and blocks == [0] * 8 + [1, 2, 3, 4, 5]


def test_every_turn_of_the_model_is_a_row_that_ends_with_it(sft, lines, base, tmp_path):
    record = chat("hi", "one", "and", "two", "so", "three")
    record["messages"][1]["weight"] = 0.5
    record["messages"][3]["train"] = False
    tokens = sft("tokenize", lines(record), "-m", base).out
    marks = ["--set=objective.mask=301", "--set=objective.sop=302", "--set=objective.eop=303"]
    first, last = sft("mask", "--objective", "glm", "--level", "sft", *marks, stdin=tokens).rows
    codec = load_codec(base)
    assert [codec.decode(columns(row)[1][:-1]) for row in (first, last)] == ["one", "three"]
    assert set(first["loss_weight"]) == {0.5, 1.0} and "loss_weight" not in last
    assert first["input_ids"].index(301) < last["input_ids"].index(301)  # what comes later is not there yet
    only = sft("mask", "--objective", "glm", "--level", "sft", "--train-on", "last", *marks, stdin=tokens).rows
    assert only == [last]


# ---- what is drawn


def restored(row, marks):
    """The text of a row: each blank's filling put back where its position says."""
    ids, labels, positions = row["input_ids"], row["labels"], row["position_ids"]
    size = row["order"].count(0)
    fills = {}
    for label, position in zip(labels[size:], positions[size:], strict=True):
        fills.setdefault(position, []).append(label)
    text = []
    for place, token in enumerate(ids[:size]):
        text += [t for t in fills[place] if t != marks.eop] if place in fills else [token]
    return text


def spans_in(row):
    """Where the blanks lie in the text, from part A and the lengths of the fillings."""
    size = row["order"].count(0)
    filled = row["position_ids"][size:]
    found, at = [], 0
    for place in range(size):
        length = filled.count(place) - 1 if place in filled else 1
        if place in filled:
            found.append((at, at + length))
        at += length
    return found


MASK, SOP, EOP = 9001, 9002, 9003
DRAWN = [f"--set=objective.{name}={t}" for name, t in (("mask", MASK), ("sop", SOP), ("eop", EOP))]
SIZES = [20, 21, 33, 40, 64, 100, 100, 257, 400]


@pytest.fixture
def texts(lines):
    return lines(*({"input_ids": list(range(10, 10 + size))} for size in SIZES))


def test_drawn_blanks_keep_every_promise(sft, texts):
    for seed in range(5):
        result = sft("mask", texts, "--objective", "glm", "--seed", seed, *DRAWN)
        for row, size in zip(result.rows, SIZES, strict=True):
            spans, ids = spans_in(row), row["input_ids"]
            blanked = sum(b - a for a, b in spans)
            assert restored(row, Marks(MASK, SOP, EOP)) == list(range(10, 10 + size))
            assert max(1, int(0.15 * size)) <= blanked < int(0.15 * size) + 39
            assert all(a[1] < b[0] for a, b in pairwise(spans))
            assert spans[0][0] > 0 and spans[-1][1] < size
            assert ids.count(MASK) == ids.count(SOP) == row["labels"].count(EOP) == len(spans)
            assert EOP not in ids
            assert sum(label != IGNORE for label in row["labels"]) == blanked + len(spans)


def test_a_draw_that_does_not_fit_is_drawn_again_and_never_shortened(sft, lines):
    data = lines(*({"input_ids": list(range(10, 10 + size))} for size in range(4, 14) for _ in range(10)))
    rows = sft("mask", data, "--objective", "glm", "--set", "objective.rate=0.5", *DRAWN).rows
    assert len(rows) > 90
    for row in rows:
        spans, text = spans_in(row), restored(row, Marks(MASK, SOP, EOP))
        assert text == list(range(10, 10 + len(text)))
        assert sum(b - a for a, b in spans) >= len(text) // 2
        assert spans[0][0] > 0 and spans[-1][1] < len(text)


def test_a_row_is_drawn_from_the_seed_and_its_id_alone(sft, lines, texts):
    drawn = sft("mask", texts, "--objective", "glm", "--seed", 0, *DRAWN)
    assert drawn.out == sft("mask", texts, "--objective", "glm", *DRAWN).out
    other = sft("mask", texts, "--objective", "glm", "--seed", 1, *DRAWN)
    assert all(a["input_ids"] != b["input_ids"] for a, b in zip(drawn.rows, other.rows, strict=True))
    alone = lines({"id": "6", "input_ids": list(range(10, 110))}, name="alone.jsonl")
    (row,) = sft("mask", alone, "--objective", "glm", *DRAWN).rows
    assert row == drawn.rows[5]
    assert row["input_ids"] != drawn.rows[6]["input_ids"]  # the same text under another id


def test_lengths_and_orders_of_ten_thousand_spans():
    options, marks = BlankInfilling(), Marks(MASK, SOP, EOP)
    lengths, firsts, rows = [], 0, 0
    for number in range(2200):
        blanks = blanks_of(list(range(100)), options, random.Random(f"{number}"), None)
        lengths += [b - a for a, b in blanks.spans]
        if len(blanks.spans) > 1:
            rows, firsts = rows + 1, firsts + (blanks.order[0] == 0) * len(blanks.spans)
        assert infilled(Document(id="", input_ids=list(range(100)), segments=[]), blanks, marks)
    assert len(lengths) > 10000
    assert abs(sum(lengths) / len(lengths) - 3.16) < 0.1
    assert set(range(1, 9)) <= set(lengths) and 0 not in lengths
    assert firsts / rows == pytest.approx(1, abs=0.1)  # each blank is the first as often as any other


def test_a_document_is_cut_at_its_end_or_anywhere(sft, texts):
    suffixes = 0
    for seed in range(10):
        for row, size in zip(
            sft("mask", texts, "--objective", "glm", "--level", "document", "--seed", seed, *DRAWN).rows,
            SIZES,
            strict=True,
        ):
            length = row["labels"][row["order"].count(0) :].index(EOP) if EOP in row["labels"] else None
            suffixes += length is None
            blanked = length or sum(label != IGNORE for label in row["labels"])
            assert size // 2 <= blanked <= size - 2
            assert row["input_ids"].count(MASK) == row["input_ids"].count(SOP) == 1
            assert restored(row, Marks(MASK, SOP, EOP)) == list(range(10, 10 + size))
    assert 25 < suffixes < 65  # of 90, half expected


def test_sentences_are_blanked_whole(sft, lines, base, tmp_path):
    text = "One is here. Is two? Three, four and five! Six: seven; eight\nNine. Ten and eleven. Twelve"
    tokens = sft("tokenize", lines(*({"text": text, "id": str(n)} for n in range(20))), "-m", base).out
    codec = load_codec(base)
    blanks = set()
    for row in sft("mask", "--objective", "glm", "--level", "sentence", *DRAWN, stdin=tokens).rows:
        spans, ids = spans_in(row), restored(row, Marks(MASK, SOP, EOP))
        assert codec.decode(ids) == text and all(a[1] < b[0] for a, b in pairwise(spans))
        assert sum(b - a for a, b in spans) >= int(0.15 * len(ids))
        for start, end in spans:
            assert start == 1 or codec.decode(ids[:start])[-1] in ".?!;:\n"
            assert end == len(ids) - 1 or codec.decode(ids[:end])[-1] in ".?!;:\n"
            blanks.add(codec.decode(ids[start:end]))
    assert {" Is two?", " Three, four and five!", " Ten and eleven.", " Twelve"} <= blanks
    assert all(sum(map(blank[:-1].count, ".?!;:\n")) == 0 for blank in blanks)  # one sentence a blank


def test_a_control_token_belongs_to_no_sentence():
    text = {1: "a", 2: ".", 3: "b", 4: "<s>", 5: "c"}
    assert sentences([1, 3, 2, 3, 4, 4, 3, 5], text.__getitem__, {4}) == [(1, 3), (3, 4), (6, 7)]
    assert sentences([1, 2], text.__getitem__, {4}) == []
    assert sentences([1], text.__getitem__, {4}) == []


# ---- what is dropped, and refused


def test_a_turn_that_makes_no_row_takes_no_other_row_with_it(sft, lines):
    own, asked = ["assistant", True, 1.0], ["user", False, 1.0]
    first = {"input_ids": [5, 6, 7, 8, 9], "segments": [[0, 2, *own], [2, 3, *asked], [3, 5, *own]]}
    long = {"input_ids": list(range(5, 15)), "segments": [[1, 2, *own], [4, 5, *own], [8, 10, *own]]}
    data = lines(*({"id": str(i), "tokenizer": None, "template": None} | d for i, d in enumerate((first, long))))
    result = sft("mask", data, "--objective", "glm", "--level", "sft", *MARKS, "--max-length", 7)
    assert [row["id"] for row in result.rows] == ["0", "1", "1"]
    assert "2 rows in, 3 kept, 0 cut, 1 dropped (1 too long" in result.err
    assert "25% of the rows were dropped" in result.err
    nothing = lines({"id": "x", "tokenizer": None, "template": None} | first | {"segments": [[0, 5, *own]]})
    assert "nothing before the answer" in sft("mask", nothing, "--objective", "glm", "--level", "sft", *MARKS).err


def test_texts_that_are_too_short_are_dropped_and_counted(sft, lines):
    data = lines({"input_ids": [6, 7]}, {"input_ids": list(range(20, 40))})
    result = sft("mask", data, "--objective", "glm", *MARKS)
    assert len(result.rows) == 1 and "1 dropped (1 too short for blanks" in result.err


@pytest.mark.parametrize(
    "flags, told",
    [
        (("--spans", "3:2"), "spans are start:end"),
        (("--spans", "2:4,3:5"), "spans are start:end"),
        (("--spans", "2:3", "--lengths", "1"), "give one of them"),
        (("--spans", "2:3", "--order", "1"), "order must name the blanks 0..0"),
        (("--places", "1"), "places need as many lengths"),
        (("--set", "objective.spans=2:3"), "put it in quotes"),
        (("--level", "word"), "objective.level"),
        (("--set", "objective.rat=0.1"), "did you mean rate"),
        (("--train-on", "all"), "objective glm has no train_on all"),
        (("--format", "hf"), "objective glm has no format hf"),
        (("--roles", "user"), "no roles"),
        (("--eod-mask-loss", "0"), "no eod_mask_loss"),
        (("--max-length", "4", "--too-long", "truncate"), "objective glm has no too_long truncate"),
    ],
)
def test_flags_that_do_not_fit_are_named(sft, lines, flags, told):
    result = sft("mask", lines({"input_ids": X}), "--objective", "glm", *MARKS, *flags)
    assert result.code == 2 and told in result.err, result.err


def test_flags_of_the_objective_need_the_objective(sft, lines):
    result = sft("mask", lines({"input_ids": X}), "--level", "sentence")
    assert result.code == 2 and "objective.level: unknown key" in result.err


def test_control_tokens_come_from_the_tokenizer_or_are_asked_for(sft, lines, base, tmp_path):
    nowhere = sft("mask", lines({"input_ids": X}), "--objective", "glm")
    assert nowhere.code == 2 and "the tokenizer of these documents is not known here" in nowhere.err
    lacking = sft("mask", lines({"input_ids": X}), "--objective", "glm", "-m", base)
    assert lacking.code == 2 and "[MASK], which the tokenizer lacks" in lacking.err and "controls=glm" in lacking.err
    same = sft("mask", lines({"input_ids": X}), "--objective", "glm", *MARKS, "--set", "objective.eop=3")
    assert same.code == 2 and "three ids" in same.err


def test_init_teaches_a_model_the_control_tokens_and_keeps_its_template(sft, tmp_path):
    from model_fixtures import model_folder

    old = model_folder(tmp_path / "old", "llama", layers=1)
    result = sft("init", "--base", old, "--set", "controls=glm", "-o", tmp_path / "new")
    assert result.code == 0, result.err
    before, after = load_codec(old), load_codec(tmp_path / "new")
    assert [after.added[token] for token in GLM_CONTROLS] == list(range(before.size, before.size + 5))
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "new" / name).read_bytes().split() == (old / name).read_bytes().split()


def test_options_of_an_objective_without_its_kind_are_the_causal_ones():
    assert Mask(objective={}).objective == Mask(objective="causal").objective == Mask().objective
