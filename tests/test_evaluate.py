"""sft evaluate: the loss that others compute, its parts, and scores of completions by hand."""

import json
import math

import pytest
import torch
from model_fixtures import (
    empty_folder,
    make_row,
    make_rows,
    model_folder,
    model_of,
    random_ids,
    read_jsonl,
    row_logits,
    tokenizer_hash,
    write_jsonl,
)

from sftcli.cli import app
from sftcli.errors import CheckpointError, DataError, UsageError
from sftcli.model import scoring
from sftcli.recipe import Evaluate
from sftcli.recipefile import parse
from sftcli.rowfile import write_rows
from sftcli.stages.evaluate import evaluate_completions, evaluate_rows, token_f1
from sftcli.text.folder import load_codec


@pytest.fixture(params=["llama", "gpt2"])
def folder(request, tmp_path):
    return model_folder(tmp_path / "m", request.param)


def test_loss_equals_the_plain_loss_of_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here: pip install '.[test]'")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = make_rows([12, 7, 20, 9, 2], prompt=3) + make_rows([6], prompt=0, seed=5)
    rows[2].labels[10:13] = [-100] * 3
    total = count = 0
    for row in rows:
        trained = row.trained()
        if trained:
            with torch.no_grad():
                loss = theirs(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
            total, count = total + float(loss) * trained, count + trained
    found = evaluate_rows(write_jsonl(tmp_path / "rows.jsonl", rows), str(folder), None)
    assert (found["rows"], found["tokens"]) == (6, count)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_parts_of_every_row_sum_to_the_whole(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "WINDOW_TOKENS", 30)  # several windows
    rows = make_rows([12, 7, 20, 9, 30, 5], prompt=2)
    rows[1].loss_weight = [0.25] * 7
    rows[3].loss_weight = [0.0] * 4 + [2.0] * 5
    write_rows(tmp_path / "rows.safetensors", iter(rows))
    found = evaluate_rows(str(tmp_path / "rows.safetensors"), str(folder), str(tmp_path / "parts.jsonl"))
    parts = read_jsonl(tmp_path / "parts.jsonl")
    assert [part["id"] for part in parts] == [row.id for row in rows]
    model = model_of(folder)
    for row, part in zip(rows, parts, strict=True):
        logits = row_logits(model, row.input_ids)[1:-1]
        assert part["labels"] == row.labels[2:]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[2:]), reduction="none")
        assert part["nll"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert part["correct"] == (logits.argmax(-1) == torch.tensor(row.labels[2:])).tolist()
        assert part["weight"] == (row.loss_weight or [1.0] * len(row.labels))[2:]
    weight = sum(sum(part["weight"]) for part in parts)
    weighted = sum(n * w for part in parts for n, w in zip(part["nll"], part["weight"], strict=True))
    assert found["loss"] == pytest.approx(weighted / weight, rel=1e-9)
    correct = [c for part in parts for c in part["correct"]]
    assert found["token_accuracy"] == sum(correct) / len(correct)
    assert found["tokens"] == len(correct) == sum(len(row.labels) - 2 for row in rows)


def test_bits_per_byte_count_text_and_leave_control_tokens_out(folder, tmp_path):
    codec = load_codec(folder)
    end = codec.added["<|im_end|>"]
    texts = ["There are 12 rivers.", "The Danube, 2850 km - größer."]
    rows = [make_row([10, *codec.tokenizer.encode(text).ids, end], id=text) for text in texts]
    parts = tmp_path / "parts.jsonl"
    found = evaluate_rows(write_jsonl(tmp_path / "rows.jsonl", rows), str(folder), str(parts))
    nats = sum(sum(part["nll"][:-1]) for part in read_jsonl(parts))
    size = sum(len(text.encode()) for text in texts)
    assert size > sum(map(len, texts))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-9)


def test_command_prints_one_json_object_and_takes_a_run(folder, tmp_path, capsysbinary):
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows([9, 5]))
    with pytest.raises(SystemExit) as left:
        app(["evaluate", rows, "-m", str(run)])
    assert left.value.code == 0
    out = capsysbinary.readouterr().out
    assert json.loads(out) == evaluate_rows(rows, str(run), None)
    with pytest.raises(SystemExit):
        app(["evaluate", rows, "-m", str(run), "--per-row", "-"])
    assert [json.loads(line)["id"] for line in capsysbinary.readouterr().out.splitlines()] == ["r0", "r1"]


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([], DataError, "nothing to evaluate"),
        ([make_row([10, 11], [-100, -100])], DataError, "nothing to evaluate"),
        ([make_row([10, 11], loss_weight=[0.0, 0.0])], DataError, "nothing to evaluate"),
        ([make_row([10] * 65, id="x")], DataError, "'x' has 65 tokens, the model's context is 64"),
        ([make_row([10, 999], [-100, 11], id="x")], DataError, "'x' has id 999"),
        ([make_row([10, 11], [-100, 999], id="x")], DataError, "'x' has label 999"),
        ([make_row([10, 11], tokenizer="0123456789ab")], UsageError, "0123456789ab"),
    ],
    ids=["no row", "no label", "weight 0", "too long", "id", "label", "tokenizer"],
)
@pytest.mark.parametrize("ending", ["jsonl", "safetensors"])
def test_rows_that_cannot_be_evaluated_are_refused(tmp_path, rows, error, words, ending):
    folder = model_folder(tmp_path / "m", "llama")
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        write_jsonl(path, rows)
    else:
        write_rows(path, iter(rows))
    with pytest.raises(error, match=words):
        evaluate_rows(str(path), str(folder), None)


def test_model_without_weights_is_not_evaluated_as_if_it_had_some(tmp_path):
    empty = empty_folder(tmp_path / "m", "llama")
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows([5], tokenizer=tokenizer_hash(empty)))
    with pytest.raises(CheckpointError, match="no weights"):
        evaluate_rows(rows, str(empty), None)


# ---- completions


def scores(tmp_path, pairs, **options):
    lines = [{"completion": given, "reference": wanted} for given, wanted in pairs]
    return evaluate_completions(Evaluate(**options), write_jsonl(tmp_path / "c.jsonl", lines))


def test_exact_match_ignores_space_around_the_answer_only(tmp_path):
    pairs = [("4", "4"), (" 4\n", "4"), ("4.", "4"), ("a  b", "a b"), ("A", "a"), ("", "")]
    assert scores(tmp_path, pairs, metrics=["exact_match"]) == {"completions": 6, "exact_match": 3 / 6}


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat", 1.0),
        ("the cat", "the cat sat down", 2 * 1.0 * 0.5 / 1.5),
        ("cat cat cat", "cat", 2 * (1 / 3) * 1 / (4 / 3)),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1_is_the_harmonic_mean_written_by_hand(given, wanted, expected):
    assert token_f1(given, wanted) == pytest.approx(expected)


def test_regex_match_compares_the_last_first_group(tmp_path):
    pairs = [
        ("first #### 3 then #### 42", "so #### 42"),
        ("#### 41", "#### 42"),
        ("no answer", "#### 42"),
        ("no answer", "none either"),
    ]
    found = scores(tmp_path, pairs, metrics=["regex_match"], regex=r"#### (\d+)")
    assert found["regex_match"] == 1 / 4
    whole = scores(tmp_path, [("x 12", "12"), ("13", "12")], metrics=["regex_match"], regex=r"\d+")
    assert whole["regex_match"] == 1 / 2


def test_completions_without_reference_are_left_out_and_told(tmp_path, capsys):
    path = write_jsonl(tmp_path / "c.jsonl", [{"completion": "4", "reference": "4"}, {"completion": "5"}])
    assert evaluate_completions(Evaluate(), path)["completions"] == 1
    assert "1 completions have no reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "options", "error", "words"),
    [
        ([], {}, DataError, "no completion with a reference"),
        ([{"completion": "4"}], {}, DataError, "no completion with a reference"),
        ([{"prompt": "4"}], {}, DataError, "c.jsonl:1: no completion"),
        ([{"completion": 4, "reference": "4"}], {}, DataError, "c.jsonl:1"),
        ([{"completion": "4", "reference": "4"}], {"metrics": ["regex_match"]}, UsageError, "needs a regex"),
        ([{"completion": "4", "reference": "4"}], {"metrics": ["regex_match"], "regex": "("}, UsageError, "regex"),
        ([{"sft_error": {"code": 3, "message": "broken"}}], {}, DataError, "broken"),
    ],
    ids=str,
)
def test_completions_that_cannot_be_scored_are_refused(tmp_path, lines, options, error, words):
    with pytest.raises(error, match=words):
        evaluate_completions(parse(Evaluate, options), write_jsonl(tmp_path / "c.jsonl", lines))


def test_random_rows_are_no_better_than_chance(tmp_path):
    folder = model_folder(tmp_path / "m", "llama")
    rows = [make_row(random_ids(40, i), id=str(i)) for i in range(5)]
    found = evaluate_rows(write_jsonl(tmp_path / "rows.jsonl", rows), str(folder), None)
    assert found["loss"] > math.log(300)
    assert found["token_accuracy"] < 0.1
