"""Which tokens are trained: every rule, every policy, every format, and the account on stderr."""

import json
from functools import partial
from itertools import pairwise

import pytest
from conftest import SAMPLES, chat

from sftcli.text.folder import load_codec

IDS = [10, 11, 12, 13, 14, 15, 16, 17]


def document(*segments, ids=IDS, **fields):
    """A line of tokens.jsonl with segments (start, end, role, own, weight)."""
    return {"id": "d", "input_ids": ids, "segments": segments, "tokenizer": None, "template": None, **fields}


TWO_TURNS = document(
    (0, 1, "template", False, 1.0),
    (1, 2, "user", False, 1.0),
    (2, 4, "assistant", True, 1.0),
    (4, 5, "user", False, 1.0),
    (5, 7, "assistant", True, 1.0),
    (7, 8, "template", False, 1.0),
)


def trained(row):
    """The positions that are trained; their labels are the ids."""
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return [i for i, label in enumerate(row["labels"]) if label != -100]


def one(sft, lines, record, *flags):
    result = sft("mask", lines(record), *flags)
    assert result.code == 0, result.err
    (row,) = result.rows
    return row


@pytest.mark.parametrize(
    "flags, places",
    [
        ((), [2, 3, 5, 6]),
        (("--train-on", "own"), [2, 3, 5, 6]),
        (("--train-on", "last"), [5, 6]),
        (("--train-on", "all"), [0, 1, 2, 3, 4, 5, 6, 7]),
        (("--train-on", "after:12"), [3, 4, 5, 6, 7]),
        (("--train-on", "after:11,12"), [3, 4, 5, 6, 7]),
        (("--train-on", "between:11:14"), [2, 3, 4]),
        (("--train-on", "between:11:99"), [2, 3, 4, 5, 6, 7]),
        (("--roles", "user"), [1, 4]),
        (("--roles", "user,assistant"), [1, 2, 3, 4, 5, 6]),
        (("--roles", "template"), [0, 7]),
        (("--train-on", "all", "--eod-mask-loss", "13"), [0, 1, 2, 3, 5, 6, 7]),
        (("--eod-mask-loss", "12"), [2, 5, 6]),
    ],
)
def test_rules_say_which_tokens_are_trained(sft, lines, flags, places):
    assert trained(one(sft, lines, TWO_TURNS, *flags)) == places


def test_turns_and_tokens_are_kept_whatever_is_trained(sft, lines):
    for flags in ((), ("--train-on", "all"), ("--roles", "user")):
        row = one(sft, lines, TWO_TURNS, *flags)
        assert row["input_ids"] == IDS
        assert row["turns"] == [[2, 4, "assistant", 0], [5, 7, "assistant", 1]]
        assert (row["align"], row["objective"], row["format"]) == ("next", "causal", "sft-rows/1")


def test_weights_are_weights_and_zero_is_not_trained(sft, lines):
    record = document(
        (0, 2, "user", False, 0.5), (2, 4, "assistant", True, 0.0), (4, 6, "assistant", True, 0.5), (6, 8, "assistant", True, 1.0)
    )  # fmt: skip
    row = one(sft, lines, record)
    assert trained(row) == [4, 5, 6, 7]
    assert row["loss_weight"] == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0]
    everything = one(sft, lines, record, "--train-on", "all")
    assert trained(everything) == [0, 1, 4, 5, 6, 7]
    assert everything["loss_weight"] == [0.5, 0.5, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0]


def test_a_row_whose_weights_are_all_one_has_no_column_of_weights(sft, lines):
    assert "loss_weight" not in one(sft, lines, TWO_TURNS)


def test_train_and_weight_of_messages_arrive_in_the_rows(sft, lines, base):
    record = chat("q", "one", "q", "two", "q", "three")
    record["messages"][1]["train"] = False
    record["messages"][3]["weight"] = 0.25
    tokens = sft("tokenize", lines(record), "-m", base)
    (row,) = sft("mask", stdin=tokens.out).rows
    codec = load_codec(base)
    of_turn = [
        {(row["labels"][t] != -100, row["loss_weight"][t]) for t in range(start, end)}
        for start, end, _, _ in row["turns"]
    ]
    assert of_turn == [{(False, 1.0)}, {(True, 0.25)}, {(True, 1.0)}]
    assert (
        codec.decode([row["input_ids"][t] for t in trained(row)], keep_special=True) == "two<|im_end|>three<|im_end|>"
    )


def test_the_end_of_turn_token_is_trained_and_what_follows_is_not(sft, lines, base):
    tokens = sft("tokenize", lines(chat("hi", "hello", "bye", "ciao")), "-m", base)
    (row,) = sft("mask", stdin=tokens.out).rows
    codec = load_codec(base)
    words = codec.decode([row["input_ids"][t] for t in trained(row)], keep_special=True)
    assert words == "hello<|im_end|>ciao<|im_end|>"
    end = codec.added["<|im_end|>"]
    assert [label for label, token in zip(row["labels"], row["input_ids"], strict=True) if token == end] == [
        -100,
        end,
        -100,
        end,
    ]


def test_rules_that_are_none_are_usage_errors(sft, lines):
    for flags, told in [
        (("--train-on", "mine"), "train_on 'mine' is unknown"),
        (("--train-on", "after:"), "train_on 'after:' is unknown"),
        (("--train-on", "after:x"), "expected ids such as 4,5, got 'x'"),
        (("--train-on", "between:1"), "train_on 'between:1' is unknown"),
        (("--train-on", "last", "--roles", "user"), "give one of them"),
        (("--format", "neox"), "--format neox needs --seq-len N"),
        (("--no-match", "keep"), "mask.no_match"),
        (("--max-length", "0"), "mask.max_length"),
    ]:
        result = sft("mask", lines(TWO_TURNS), *flags)
        assert (result.code, told in result.err) == (2, True), (flags, result.err)
        assert all("sft_error" in row for row in result.rows)


# ---- too long

LONG = document(
    (0, 3, "user", False, 1.0),
    (3, 6, "assistant", True, 1.0),
    (6, 7, "user", False, 1.0),
    (7, 8, "assistant", True, 1.0),
)


def test_rows_that_are_too_long_are_dropped_by_default(sft, lines):
    data = lines(LONG, {**TWO_TURNS, "input_ids": IDS[:7], "segments": TWO_TURNS["segments"][:5]})
    result = sft("mask", data, "--max-length", 7)
    assert [len(row["input_ids"]) for row in result.rows] == [7]
    assert f"2 rows in, 1 kept, 0 cut, 1 dropped (1 too long, first {data}:1)" in result.err


def test_truncate_keeps_the_beginning_and_invents_no_end(sft, lines):
    row = one(sft, lines, LONG, "--max-length", 5, "--too-long", "truncate")
    assert row["input_ids"] == IDS[:5]
    assert trained(row) == [3, 4]
    assert row["turns"] == [[3, 5, "assistant", 0]]


def test_truncate_prompt_cuts_at_the_front_and_keeps_every_word_of_the_model(sft, lines):
    row = one(sft, lines, LONG, "--max-length", 6, "--too-long", "truncate-prompt")
    assert row["input_ids"] == IDS[2:]
    assert trained(row) == [1, 2, 3, 5]
    assert row["turns"] == [[1, 4, "assistant", 0], [5, 6, "assistant", 1]]


def test_truncate_prompt_drops_a_row_whose_answer_alone_is_too_long(sft, lines):
    data = lines(LONG, TWO_TURNS)
    result = sft("mask", data, "--max-length", 5, "--too-long", "truncate-prompt")
    assert result.code == 3 and [list(row) for row in result.rows] == [["sft_error"]]
    result = sft("mask", data, "--max-length", 6, "--too-long", "truncate-prompt")
    assert [row["input_ids"] for row in result.rows] == [IDS[2:]]  # TWO_TURNS would lose its first answer
    assert "2 rows in, 1 kept, 1 cut, 1 dropped (1 too long" in result.err


def test_a_cut_that_leaves_nothing_to_train_drops_the_row(sft, lines):
    data = lines(LONG, TWO_TURNS)
    result = sft("mask", data, "--max-length", 3, "--too-long", "truncate")
    assert [trained(row) for row in result.rows] == [[2]]
    assert f"1 dropped (1 too long: the cut left nothing to train, first {data}:1)" in result.err


def test_too_long_error_names_the_row(sft, lines):
    data = lines(TWO_TURNS, LONG)
    result = sft("mask", data, "--max-length", 7, "--too-long", "error")
    assert result.code == 3
    assert f"error: {data}:1: 8 tokens, more than 7 at $.input_ids" in result.err


def test_weights_are_cut_with_their_tokens(sft, lines):
    record = document((0, 4, "user", False, 1.0), (4, 6, "assistant", True, 0.5), (6, 8, "assistant", True, 1.0))
    row = one(sft, lines, record, "--max-length", 6, "--too-long", "truncate-prompt")
    assert row["loss_weight"] == [1.0, 1.0, 0.5, 0.5, 1.0, 1.0]


# ---- no match, nothing trained, rejects


def test_no_match_is_dropped_refused_or_trained(sft, lines):
    data = lines(TWO_TURNS, {**TWO_TURNS, "input_ids": [1, 2, 3, 4, 5, 6, 7, 8]})
    for rule in ("after:12", "between:12:13"):
        run = partial(sft, "mask", data, "--train-on", rule, "--no-match")
        assert len(run("drop").rows) == 1
        assert trained(run("train").rows[1]) == list(range(8))
        refused = run("error")
        assert refused.code == 3 and f"{data}:2: nothing matches train_on {rule}" in refused.err
        assert [list(row)[0] for row in refused.rows] == ["id", "sft_error"]  # the good row came before


def test_a_document_with_no_turn_of_the_model_is_dropped(sft, lines):
    data = lines(document((0, 8, "user", False, 1.0)), TWO_TURNS)
    for flags, reason in [((), "no turn of the model"), (("--train-on", "last"), "no match")]:
        result = sft("mask", data, *flags)
        assert f"1 dropped (1 {reason}, first {data}:1)" in result.err
        assert len(result.rows) == 1


def test_what_is_masked_from_end_to_end_or_weighs_nothing_is_dropped_by_reason(sft, lines):
    masked = {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}
    unheard = document((0, 8, "assistant", True, 0.0))  # train: false
    result = sft("mask", lines(masked, unheard, {**masked, "loss_mask": [0, 0, 0]}, *[TWO_TURNS] * 7))
    assert len(result.rows) == 7
    assert "3 dropped (3 nothing trained" in result.err and "warning: mask: 30% of the rows were dropped" in result.err


def test_a_label_on_the_first_token_alone_trains_nothing(sft, lines):
    data = lines(document((0, 1, "assistant", True, 1.0), (1, 8, "user", False, 1.0)), TWO_TURNS)
    assert "1 dropped (1 nothing trained" in sft("mask", data).err  # no position predicts it


def test_when_every_row_is_dropped_the_stage_fails_and_the_next_one_knows(sft, lines, tmp_path):
    data = lines(document((0, 8, "user", False, 1.0)))
    result = sft("mask", data)
    assert result.code == 3
    assert f"nothing is left to train: all 1 rows were dropped (1 no turn of the model, first {data}:1)" in result.err
    assert [list(row) for row in result.rows] == [["sft_error"]]
    assert "1 rows in, 0 kept, 0 cut, 1 dropped" in result.err
    assert sft("mask", data, "-o", tmp_path / "rows.safetensors").code == 3
    assert not (tmp_path / "rows.safetensors").exists()


def test_dropped_lines_go_to_the_rejects_with_their_reasons(sft, lines, tmp_path):
    data = lines(TWO_TURNS, document((0, 8, "user", False, 1.0)), LONG)
    rejects = tmp_path / "rejects.jsonl"
    result = sft("mask", data, "--max-length", 7, "--train-on", "own", "--rejects", rejects)
    assert result.code == 3
    result = sft("mask", data, "--max-length", 8, "--rejects", rejects)
    (told,) = [json.loads(line) for line in rejects.read_bytes().splitlines()]
    assert (told["file"], told["line"], told["reason"]) == (str(data), 2, "no turn of the model")


@pytest.mark.parametrize(
    "flags", [(), ("--max-length", "90"), ("--max-length", "60", "--too-long", "truncate"), ("--train-on", "last")]
)
def test_rows_in_are_rows_kept_and_dropped(sft, base, flags):
    tokens = sft("tokenize", SAMPLES / "chats.jsonl", "-m", base)
    result = sft("mask", *flags, stdin=tokens.out)
    account = next(line for line in result.err.splitlines() if " rows in, " in line)
    counts = [int(word.replace(",", "")) for word in account.split() if word.replace(",", "").isdigit()]
    rows_in, kept, cut, dropped = counts[:4]
    assert rows_in == 120 == kept + dropped
    assert kept == len(result.rows)
    long = {row["id"] for row in tokens.rows if len(row["input_ids"]) > 60}
    assert cut == (len(long & {row["id"] for row in result.rows}) if "truncate" in flags else 0)
    tokens_trained = sum(len(trained(row)) for row in result.rows)
    all_tokens = sum(len(row["input_ids"]) for row in result.rows)
    assert f"{tokens_trained:,} of {all_tokens:,} tokens trained" in account


def test_many_dropped_rows_are_a_warning(sft, lines):
    data = lines(*[TWO_TURNS] * 8, *[document((0, 8, "user", False, 1.0))] * 2)
    assert "warning: mask: 20% of the rows were dropped" in sft("mask", data).err
    data = lines(*[TWO_TURNS] * 9, document((0, 8, "user", False, 1.0)))
    assert "warning: mask: 10%" not in sft("mask", data).err


# ---- duplicates


def test_rows_that_train_the_same_are_dropped_on_request_and_counted(sft, lines, tmp_path):
    data = lines(
        TWO_TURNS,
        {**TWO_TURNS, "id": "again", "source": "elsewhere"},
        {**TWO_TURNS, "input_ids": [*IDS[:7], 18]},  # another token
        document((2, 4, "assistant", True, 1.0)),  # the same ids, other labels
        document((2, 4, "assistant", True, 0.5)),  # the same labels, other weights
        document((2, 4, "assistant", True, 1.0), (4, 6, "user", False, 1.0)),  # other segments, the same labels
    )
    assert len(sft("mask", data).rows) == 6
    rejects = tmp_path / "rejects.jsonl"
    result = sft("mask", data, "--drop-duplicates", "--rejects", rejects)
    everything = sft("mask", data).out.splitlines()
    assert result.out.splitlines() == [everything[i] for i in (0, 2, 3, 4)]
    assert f"6 rows in, 4 kept, 0 cut, 2 dropped (2 duplicate, first {data}:2)" in result.err
    assert [json.loads(line)["line"] for line in rejects.read_bytes().splitlines()] == [2, 6]
    one_of_each = sft(
        "mask", data, "--drop-duplicates", "--train-on", "all", "--max-length", 7, "--too-long", "truncate"
    )
    assert "6 rows in, 2 kept, 2 cut, 4 dropped (4 duplicate" in one_of_each.err  # after the cut they are the same


# ---- stop tokens


def test_each_stop_token_is_named_with_how_often_it_is_trained(sft, base):
    tokens = sft("tokenize", SAMPLES / "chats.jsonl", "-m", base)
    err = sft("mask", stdin=tokens.out).err
    records = [json.loads(line) for line in (SAMPLES / "chats.jsonl").read_text(encoding="utf-8").splitlines()]
    turns = [message for record in records for message in record["messages"] if message["role"] == "assistant"]
    spoken = sum(message.get("train", True) for message in turns)
    end = load_codec(base).added["<|im_end|>"]
    assert f"stop token <|im_end|> ({end}) is trained {spoken:,} times in {len(turns):,} turns" in err
    assert "warning" not in err
    assert sft("mask", "-m", base, stdin=tokens.out).err == err


def test_a_stop_token_that_is_never_trained_is_a_loud_warning(sft, lines, base):
    tokens = sft("tokenize", lines(chat("q", "a")), "-m", base)
    err = sft("mask", "--roles", "user", stdin=tokens.out).err
    assert "warning: mask: the stop token <|im_end|> is never trained: the model will not learn to stop" in err


def test_turns_without_a_stop_token_are_a_warning(sft, lines, base):
    tokens = sft(
        "tokenize", lines({"prompt": "q", "completion": "a"}), "-m", base, "--template-text", "{prompt} {completion}"
    )
    assert "warning: mask: no turn of the model ends with a special token" in sft("mask", stdin=tokens.out).err


# ---- formats


def test_hf_format_is_what_collators_take(sft, lines):
    row = one(sft, lines, TWO_TURNS, "--format", "hf")
    assert list(row) == ["id", "input_ids", "labels", "attention_mask"]
    assert row["attention_mask"] == [1] * 8
    assert row["labels"] == [-100, -100, 12, 13, -100, 15, 16, -100]


def test_neox_format_masks_targets_and_pads_to_seq_len(sft, lines):
    row = one(sft, lines, TWO_TURNS, "--format", "neox", "--seq-len", 9)
    assert (len(row["text"]), len(row["label"]), len(row["tokens"]), len(row["loss_mask"])) == (10, 10, 9, 9)
    assert row["text"] == [*IDS, 0, 0]
    assert [i for i, m in enumerate(row["loss_mask"]) if m] == [1, 2, 4, 5]  # at the token before each trained one
    assert [label for label, m in zip(row["labels"], row["loss_mask"], strict=True) if m] == [12, 13, 15, 16]


def test_neox_rows_are_never_longer_than_seq_len(sft, lines):
    """Even where --max-length would allow more."""
    data = lines(TWO_TURNS, {**TWO_TURNS, "input_ids": IDS[:7], "segments": TWO_TURNS["segments"][:5]})
    for flags in ((), ("--max-length", 100)):
        result = sft("mask", data, "--format", "neox", "--seq-len", 6, *flags)
        assert [len(row["text"]) for row in result.rows] == [7]
        assert "1 too long" in result.err


def test_other_formats_are_not_written_as_safetensors(sft, lines, tmp_path):
    result = sft("mask", lines(TWO_TURNS), "--format", "hf", "-o", tmp_path / "rows.safetensors")
    assert result.code == 2 and "--format hf is written as JSON lines" in result.err


# ---- rows that came tokenised


def test_labels_and_loss_masks_are_taken_as_they_are(sft, lines):
    labels = [-100, -100, 12, 13, -100, 15, -100, -100]
    assert one(sft, lines, {"input_ids": IDS, "labels": labels})["labels"] == labels
    mask = [0, 0, 1, 1, 0, 1, 0, 0]
    assert one(sft, lines, {"input_ids": IDS, "loss_mask": mask})["labels"] == labels
    assert one(sft, lines, {"input_ids": IDS, "loss_mask": mask[1:]})["labels"] == labels  # GPT-NeoX: of the targets
    row = one(sft, lines, {"input_ids": IDS, "loss_mask": [0, 0, 0.5, 1, 0, 1, 0, 0]})
    assert row["labels"] == labels and row["loss_weight"][2] == 0.5


def test_the_weight_of_a_record_that_came_tokenised_counts(sft, lines, base):
    records = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weight": 0.5}]
    records += [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 2], "weight": 0.5}]
    tokens = sft("tokenize", lines(*records), "-m", base)
    rows = sft("mask", stdin=tokens.out).rows
    assert [row["loss_weight"] for row in rows] == [[1.0, 0.5, 0.5], [1.0, 0.5, 1.0]]
    assert not any("weight" in row for row in rows)
    everything = one(sft, lines, {"input_ids": [5, 6, 7], "weight": 0.5}, "--train-on", "all")
    assert everything["loss_weight"] == [0.5, 0.5, 0.5]


def test_rules_by_ids_work_on_rows_that_came_tokenised(sft, lines):
    assert trained(one(sft, lines, {"input_ids": IDS}, "--train-on", "after:13")) == [4, 5, 6, 7]
    assert trained(one(sft, lines, {"input_ids": IDS}, "--train-on", "all")) == list(range(8))


@pytest.mark.parametrize(
    "record, told",
    [
        ({"input_ids": IDS}, "input_ids with neither segments nor labels nor loss_mask"),
        ({"input_ids": []}, "no tokens at $.input_ids"),
        ({"input_ids": IDS, "labels": [1]}, "1 values for 8 input_ids at $.labels"),
        ({"input_ids": IDS, "loss_mask": [1]}, "1 values for 8 input_ids at $.loss_mask"),
        ({"input_ids": IDS, "loss_mask": [-1] * 8}, "a weight must be 0 or more at $.loss_mask"),
        ({"input_ids": [1, "x"]}, "Expected `int`, got `str` at $.input_ids[1]"),
        ({"input_ids": [1, -2], "labels": [-100, -2]}, "Expected `int` >= 0 at $.input_ids[1]"),
        ({"input_ids": [1, 2**31], "labels": [-100, 2**31]}, "Expected `int` <= 2147483647 at $.input_ids[1]"),
        (document((0, 9, "user", True, 1.0)), "segment out of order or outside of the ids at $.segments[0]"),
        (document((0, 2, "user", True, 1.0), (1, 3, "user", True, 1.0)), "at $.segments[1]"),
        (document((0, 2, "user", True, -1.0)), "at $.segments[0]"),
        (document((0, 2, "user", 5)), "Expected `bool`, got `int` at $.segments[0][3]"),
        ({"id": "x", "hello": 1}, "not a document: the line has id, hello"),
    ],
)
def test_what_is_not_a_row_is_refused_with_its_place(sft, lines, record, told):
    data = lines(TWO_TURNS, record)
    result = sft("mask", data)
    assert result.code == 3
    assert f"error: {data}:2: " in result.err and told in result.err
    assert [list(row)[0] for row in result.rows] == ["id", "sft_error"]


def test_labels_that_were_shifted_already_are_recognised(sft, lines):
    shifted = [*IDS[1:], -100]
    result = sft("mask", lines({"input_ids": IDS, "labels": shifted}))
    assert result.code == 3
    assert "label 11 under token 10 at $.labels[0]; hint: these labels are shifted already" in result.err


def test_rows_of_two_tokenizers_in_one_input_are_refused(sft, lines):
    data = lines({**TWO_TURNS, "tokenizer": "aaaaaaaaaaaa"}, {**TWO_TURNS, "tokenizer": "bbbbbbbbbbbb"})
    result = sft("mask", data)
    assert result.code == 3
    assert f"error: {data}:2: rows of two tokenizers in one input: aaaaaaaaaaaa and bbbbbbbbbbbb" in result.err


@pytest.mark.parametrize("name", ["\0", "../../etc/passwd", "x" * 5000])
def test_a_tokenizer_of_any_name_is_one_that_is_not_known(sft, lines, name):
    data = lines({**TWO_TURNS, "tokenizer": name})
    result = sft("mask", data, "--show", 1)
    assert result.code == 0 and len(result.rows) == 1, result.err
    assert sft("show", data).code == 0


def test_rows_that_came_tokenised_go_through_tokenize_in_their_place(sft, lines, base):
    records = [
        chat("q", "a", id="first"),
        {"id": 2, "input_ids": [5, 6], "labels": [-100, 6]},
        chat("r", "b", id="third"),
    ]
    records += [{"input_ids": [7, 8], "loss_mask": [0, 1]}]
    tokens = sft("tokenize", lines(*records), "-m", base)
    assert "4 rows in (2 messages, 2 tokens), 4 documents, 0 rejected" in tokens.err
    rows = sft("mask", stdin=tokens.out).rows
    assert [row["id"] for row in rows] == ["first", "2", "third", "4"]
    assert rows[1]["labels"] == [-100, 6] and rows[3]["labels"] == [-100, 8]
    assert len({row["tokenizer"] for row in rows}) == 1


def test_ids_beyond_the_vocabulary_and_of_another_tokenizer_are_refused(sft, lines, base):
    result = sft("tokenize", lines({"input_ids": [5, 400], "labels": [-100, 400]}), "-m", base)
    assert result.code == 3 and "id 400 is beyond the vocabulary of 400 at $.input_ids" in result.err
    result = sft("tokenize", lines({"input_ids": [5, 6], "tokenizer": "0123456789ab"}), "-m", base)
    assert result.code == 3 and "tokenised with 0123456789ab, not with " in result.err


# ---- what passes through


def test_unknown_fields_pass_through_byte_for_byte(sft, lines, base):
    line = (
        b'{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}],'
        b'"score":0.10000000000000000555,"n":123456789012345678901234567890,"nested":{"b": [1,  2],"a":"\\u00e9"}}\n'
    )
    tokens = sft("tokenize", lines(line), "-m", base)
    rows = sft("mask", stdin=tokens.out)
    for output in (tokens.out, rows.out):
        for part in (
            b'"score":0.10000000000000000555',
            b'"n":123456789012345678901234567890',
            b'"nested":{"b": [1,  2],"a":"\\u00e9"}',
        ):
            assert part in output


@pytest.mark.parametrize(
    "name", ["labels", "segments", "order", "turns", "format", "objective", "align", "position_ids", "loss_weight"]
)
def test_a_field_of_the_data_is_never_taken_for_a_column_of_ours(sft, lines, base, name):
    honest = sft("mask", stdin=sft("tokenize", lines(chat("q", "a")), "-m", base).out)
    tokens = sft("tokenize", lines(chat("q", "a", **{name: "positive"})), "-m", base)
    assert tokens.code == 0
    assert f"warning: tokenize: fields left out, as tokens and rows have such columns: {name}" in tokens.err
    assert sft("mask", stdin=tokens.out).out == honest.out


def test_source_and_id_reach_the_rows(sft, lines, base):
    tokens = sft("tokenize", lines(chat("q", "a", id="x", source="web")), "-m", base)
    (row,) = sft("mask", stdin=tokens.out).rows
    assert (row["id"], row["source"]) == ("x", "web")


def test_fields_that_only_json_lines_of_rows_can_hold_are_named_once(sft, lines, base, tmp_path):
    tokens = sft("tokenize", lines(*[chat("q", "a", topic="x", score=1)] * 3), "-m", base)
    for flags in (
        ["-o", "rows.safetensors"],
        ["-o", "rows.bin", "--format", "neox"],
        ["-o", "hf.jsonl", "--format", "hf"],
    ):
        err = sft("mask", "-o", tmp_path / flags[1], *flags[2:], stdin=tokens.out).err
        assert err.count("mask: not kept: score, topic (rows in JSON lines keep such fields: -o ROWS.jsonl)") == 1
    assert "not kept" not in sft("mask", "-o", tmp_path / "rows.jsonl", stdin=tokens.out).err


# ---- order, batches and rejects of tokenize


def test_output_is_in_input_order_whatever_is_rejected(sft, lines, base, tmp_path):
    """More than one batch; bad lines of every kind among good ones; the counts add up."""
    records, good = [], []
    for i in range(1300):
        if i % 97 == 0:
            records.append(b"{not json\n")
        elif i % 89 == 0:
            records.append({"messages": "wrong"})
        elif i % 83 == 0:
            records.append({"input_ids": [5, 400]})
        else:
            good.append(f"row-{i}")
            records.append({"id": f"row-{i}", "input_ids": [5, 6]} if i % 7 == 0 else chat("q", str(i), id=f"row-{i}"))
    rejects = tmp_path / "rejects.jsonl"
    data = lines(*records)
    result = sft("tokenize", data, "-m", base, "--on-error", "skip", "--rejects", rejects)
    assert [row["id"] for row in result.rows] == good
    told = [json.loads(line)["line"] for line in rejects.read_bytes().splitlines()]
    assert told == sorted(told) and len(told) == 1300 - len(good)
    assert f"1,300 rows in ({len([g for g in good if int(g[4:]) % 7]):,} messages" in result.err.replace(" tokens,", "")
    assert f"{len(good):,} documents, {1300 - len(good)} rejected" in result.err
    assert result.err.count("rejected: ") == 10  # the first ten are shown


def test_lines_that_the_tokenizer_refuses_are_rejected_alone(sft, lines, tmp_path):
    data = lines(*({"question": word, "answer": "the"} for word in ("where", "who", "is", "what", "of")))
    rejects = tmp_path / "rejects.jsonl"
    flags = (
        "--tokenizer",
        "whitespace",
        "--template-text",
        "{question} {answer}",
        "--on-error",
        "skip",
        "--rejects",
        rejects,
    )
    result = sft("tokenize", data, *flags)
    assert [row["id"] for row in result.rows] == ["1", "3", "5"]  # ids are line numbers, rejected ones counted
    assert [json.loads(line)["line"] for line in rejects.read_bytes().splitlines()] == [2, 4]
    assert "5 rows in (5 fields), 3 documents, 2 rejected" in result.err


def test_rows_before_a_bad_one_are_written_and_none_after_it(sft, lines, base):
    for bad in (
        b"nonsense\n",
        json.dumps({"messages": 1}).encode() + b"\n",
        b'{"sft_error":{"code":3,"message":"m"}}\n',
    ):
        records = [chat("q", "a", id=f"r{i}") for i in range(700)]
        result = sft("tokenize", lines(*records[:600], bad, *records[600:]), "-m", base)
        assert result.code == 3
        assert [row.get("id") for row in result.rows] == [*(f"r{i}" for i in range(600)), None]
        assert list(result.rows[-1]) == ["sft_error"]


def test_several_inputs_are_one(sft, lines, base):
    a, b = lines(chat("q", "a"), name="a.jsonl"), lines(chat("r", "b"), name="b.jsonl")
    both = sft("tokenize", a, b, "-m", base)
    piped = sft("tokenize", "-", "-m", base, stdin=a.read_bytes() + b.read_bytes())
    assert both.out == piped.out
    assert [row["id"] for row in both.rows] == ["1", "2"]


def test_lines_stand_alone(sft, base):
    """Any line of tokens.jsonl masks alone to the row it has among the others."""
    tokens = sft("tokenize", SAMPLES / "sharegpt.jsonl", "-m", base)
    rows = sft("mask", stdin=tokens.out).out.splitlines(keepends=True)
    some = tokens.out.splitlines(keepends=True)[::7]
    assert [sft("mask", stdin=line).out for line in some] == rows[::7]
    assert all(a != b for a, b in pairwise(rows))
