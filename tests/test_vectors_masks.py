"""The test vectors of masks: GPT-NeoX's loss_mask, Hugging Face's labels and MiniMind's ranges, through the CLI."""

import pytest

WORDS = ("--tokenizer", "whitespace", "--template-text", "<bos> {question} <sep> {answer} <eos>")
QUESTION = {"question": "where is the capital of China", "answer": "The capital is Beijing"}
HF2_IDS = [1, 4, 5, 6, 7, 8, 9, 3, 10, 7, 5, 11, 2]
HF2_LABELS = [-100] * 8 + [10, 7, 5, 11, 2]
MINIMIND = [
    1, 832, 311, 234, 107, 108, 2, 234,
    1, 1388, 570, 811, 234, 4301, 2, 234,
    1, 832, 311, 234, 108, 2, 234,
    1, 1388, 570, 811, 234, 107, 108, 2, 234,
    0, 0,
]  # fmt: skip
MARKERS = ("--train-on", "between:1,1388,570,811,234:2,234")


def trained_places(row):
    return [i for i, label in enumerate(row["labels"]) if label != -100]


def test_hf2_ids_and_labels_come_out_of_the_pipe(sft, lines):
    tokens = sft("tokenize", lines(QUESTION), *WORDS)
    assert tokens.code == 0, tokens.err
    (row,) = sft("mask", stdin=tokens.out).rows
    assert row["input_ids"] == HF2_IDS
    assert row["labels"] == HF2_LABELS
    assert row["align"] == "next"  # unshifted: the shift happens when a batch is built


def test_hf2_table_says_what_the_model_must_say_where(sft, lines):
    tokens = sft("tokenize", lines(QUESTION), *WORDS)
    shown = sft("mask", "--show", 1, stdin=tokens.out).err
    arrows = [line.split()[1:] for line in shown.splitlines() if "->" in line]
    assert arrows == [
        ["<sep>", "->", "The"],
        ["The", "->", "capital"],
        ["capital", "->", "is"],
        ["is", "->", "Beijing"],
        ["Beijing", "->", "<eos>"],
    ]
    assert sum("(not trained)" in line for line in shown.splitlines()) == 7  # 12 targets in all


def test_hf2_stop_token_is_trained_once(sft, lines):
    tokens = sft("tokenize", lines(QUESTION), *WORDS)
    err = sft("mask", stdin=tokens.out).err
    assert "1 rows in, 1 kept, 0 cut, 0 dropped; 5 of 13 tokens trained" in err
    assert "stop token <eos> (2) is trained 1 times in 1 turns" in err


def test_nx2_what_follows_an_end_of_document_is_not_trained(sft, lines):
    data = lines({"input_ids": [5, 6, 0, 7, 8, 9, 0, 4, 5]})
    (row,) = sft("mask", data, "--train-on", "all", "--eod-mask-loss", 0, "--format", "neox", "--seq-len", 8).rows
    assert row["tokens"] == [5, 6, 0, 7, 8, 9, 0, 4]
    assert row["labels"] == [6, 0, 7, 8, 9, 0, 4, 5]
    assert row["loss_mask"] == [1, 1, 0, 1, 1, 1, 0, 1]


def test_nx2_stopping_is_still_learnt(sft, lines):
    data = lines({"input_ids": [5, 6, 0, 7, 8, 9, 0, 4, 5]})
    (row,) = sft("mask", data, "--train-on", "all", "--eod-mask-loss", 0).rows
    assert row["labels"] == [5, 6, 0, -100, 8, 9, 0, -100, 5]  # the 0s are trained, what comes after them is not


@pytest.mark.parametrize(
    "ids, pattern, labels",
    [
        ([9, 9, 4, 5, 4, 5, 7], "4,5", [-100, -100, -100, -100, 4, 5, 7]),
        ([9, 4, 4, 5, 7], "4,5", [-100, -100, -100, -100, 7]),
        ([9, 9, 4, 5], "8", [9, 9, 4, 5]),
    ],
)
def test_nx3_everything_up_to_the_first_pattern_is_masked(sft, lines, ids, pattern, labels):
    result = sft("mask", lines({"input_ids": ids}), "--train-on", f"after:{pattern}", "--no-match", "train")
    assert result.rows[0]["labels"] == labels


def test_nx3_no_match_is_dropped_and_counted_unless_asked_otherwise(sft, lines):
    data = lines({"input_ids": [9, 9, 4, 5]}, {"input_ids": [8, 1, 2]})
    dropped = sft("mask", data, "--train-on", "after:8")
    assert [row["id"] for row in dropped.rows] == ["2"]
    assert f"2 rows in, 1 kept, 0 cut, 1 dropped (1 no match, first {data}:1)" in dropped.err
    refused = sft("mask", data, "--train-on", "after:8", "--no-match", "error")
    assert refused.code == 3
    assert "data.jsonl:1: nothing matches train_on after:8" in refused.err


def test_nx4_rows_of_seq_len_as_gpt_neox_reads_them(sft, lines):
    data = lines({"input_ids": [9, 9, 4, 5, 4, 5, 7]})
    (row,) = sft("mask", data, "--train-on", "after:4,5", "--format", "neox", "--seq-len", 8).rows
    assert row["text"] == [9, 9, 4, 5, 4, 5, 7, 0, 0]
    assert row["label"] == [-100, -100, -100, -100, 4, 5, 7, -100, -100]
    assert row["tokens"] == [9, 9, 4, 5, 4, 5, 7, 0]
    assert row["labels"] == [0, 0, 0, 4, 5, 7, 0, 0]
    assert row["loss_mask"] == [0, 0, 0, 1, 1, 1, 0, 0]


def test_nx4_output_read_back_gives_the_same_labels(sft, lines):
    """GPT-NeoX's mask belongs to the targets; read as `loss_mask` of the text it is our labels again."""
    data = lines({"input_ids": [9, 9, 4, 5, 4, 5, 7]})
    rule = ("--train-on", "after:4,5")
    (theirs,) = sft("mask", data, *rule, "--format", "neox", "--seq-len", 8).rows
    again = lines({"input_ids": theirs["text"], "loss_mask": theirs["loss_mask"]}, name="again.jsonl")
    assert sft("mask", again).rows[0]["labels"][:7] == sft("mask", data, *rule).rows[0]["labels"]


def test_mm1_answers_are_trained_with_their_end_marker(sft, lines):
    (row,) = sft("mask", lines({"input_ids": MINIMIND}), *MARKERS).rows
    assert trained_places(row) == [13, 14, 15, 28, 29, 30, 31]
    assert [row["input_ids"][i] for i in (13, 14, 15)] == [4301, 2, 234]
    assert [row["labels"][i] for i in range(28, 32)] == [107, 108, 2, 234]


def test_mm2_an_answer_that_was_cut_off_is_trained_to_the_end(sft, lines):
    (row,) = sft("mask", lines({"input_ids": MINIMIND[:30]}), *MARKERS).rows
    assert trained_places(row) == [13, 14, 15, 28, 29]
