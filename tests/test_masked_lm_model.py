"""Masked LM in a model: who sees whom, the two losses, what a decoder-only base gets, and the commands around it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_lines
from model_fixtures import (
    CPU,
    PRESETS,
    assert_equal_gradients,
    gradients,
    make_row,
    model_folder,
    model_of,
    random_ids,
    randomised,
    read_jsonl,
    row_logits,
    save_weights,
)
from test_loss import z
from test_loss_options import TOGETHER, formula

from sftcli.model.attention import Group, Prefixed, RowAttention, Sight, Tokens, visible
from sftcli.model.batches import make_batch
from sftcli.model.checkpoint import add_masked_lm, load_model, open_folder, save_model
from sftcli.model.gpt import GPT
from sftcli.model.loss import projected_loss
from sftcli.model.scoring import total_score
from sftcli.model.tensorfile import EXTRA, WEIGHTS
from sftcli.model.training import accumulate
from sftcli.recipe import Loss
from sftcli.rows import IGNORE, encode_row
from sftcli.text.folder import load_codec


def pair(length, label, seed=0, labelled=(2, 3), **columns):
    """A row of masked LM: its second half begins at its middle."""
    ids, half = random_ids(length, seed), length // 2
    labels = [token + 1 if t in labelled else IGNORE for t, token in enumerate(ids)]
    types = [0] * half + [1] * (length - half)
    columns = {"order": [0] * length, "token_type_ids": types, "next_sentence_label": label} | columns
    return make_row(ids, labels, f"r{seed}", align="same", objective="bert", **columns)


ROWS = [
    pair(8, 0),
    pair(5, 1, 1, labelled=(1,)),
    pair(8, 1, 2, labelled=(0, 3, 7)),
    pair(11, 0, 3, labelled=range(1, 6)),
]


@pytest.fixture(params=[*PRESETS, "bert"])
def model(request, tmp_path):
    return made(tmp_path / "m", request.param)


def made(path, preset) -> GPT:
    """A model with token types and a next-sentence head that matter: of a decoder-only base, or with BERT's blocks."""
    folder = open_folder(model_folder(path, "gpt2" if preset == "bert" else preset))
    add_masked_lm(folder, pairs=True)
    if preset != "bert":
        return randomised(load_model(folder)).eval()
    config = replace(folder.config, placement="sum", embedding_norm=True, head_transform=True, head_bias=True)
    return randomised(GPT(config)).eval()


@torch.no_grad()
def logits_of(model, *rows):
    """Logits of each row, in the order given."""
    batch = make_batch(rows)
    logits = model.logits(model.hidden(batch.ids, batch.positions, batch.attention, types=batch.types))
    pieces = dict(zip(map(id, batch.rows), logits.split([len(r.input_ids) for r in batch.rows]), strict=True))
    return [pieces[id(row)] for row in rows]


# ---- the vectors


class Given(torch.nn.Module):
    """In place of a model: the logits Z of each row and given ones of its pair, through the loss that training uses."""

    def __init__(self, *pairs, shift=0):
        super().__init__()
        self.pairs, self.shift = torch.tensor(pairs, requires_grad=True), shift

    def forward(self, batch, loss, noise):
        logits = torch.cat([z(0, len(row.input_ids)) for row in batch.rows])
        found = projected_loss(
            torch.eye(len(logits))[batch.scored - self.shift], logits.T, None, batch.targets, batch.weights
        )
        weights = torch.ones(len(batch.pairs))
        return {"mlm": found, "nsp": projected_loss(self.pairs, torch.eye(2), None, batch.pairs, weights)}


def row_of_bt_2(label):
    labels = [IGNORE, IGNORE, 7, IGNORE, IGNORE, IGNORE, 9, IGNORE, IGNORE, IGNORE]
    return make_row([1, 4, 0, 5, 6, 8, 0, 10, 11, 3], labels, align="same", order=[0] * 10, next_sentence_label=label)


def test_bt_2_the_loss_is_the_sum_of_two_means():
    found = accumulate(Given([2.0, -1.0]), [row_of_bt_2(0)], 99, CPU)
    assert found.losses == pytest.approx({"mlm": 2.4467832, "nsp": 0.0485874}, abs=1e-6)
    assert found.loss == pytest.approx(2.4953705, abs=1e-6)
    shifted = accumulate(Given([2.0, -1.0], shift=1), [row_of_bt_2(0)], 99, CPU)
    assert shifted.losses["mlm"] == pytest.approx(2.7512794, abs=1e-6)
    assert accumulate(Given([2.0, -1.0]), [row_of_bt_2(1)], 99, CPU).losses["nsp"] == pytest.approx(3.0485874, abs=1e-6)


def test_bt_3_label_0_is_the_first_class():
    rows = [row_of_bt_2(0), row_of_bt_2(1)]
    given = Given([2.0, -1.0], [0.5, 1.5])
    assert accumulate(given, rows, 99, CPU).losses["nsp"] == pytest.approx(0.1809245, abs=1e-6)
    flipped = [row_of_bt_2(1), row_of_bt_2(0)]
    assert accumulate(given, flipped, 99, CPU).losses["nsp"] == pytest.approx(2.1809245, abs=1e-6)


# ---- who sees whom


def test_every_token_sees_every_other_of_its_row_and_none_of_another(model):
    row, other = ROWS[0], ROWS[2]
    before = logits_of(model, row, other)
    for j in range(len(row.input_ids)):
        changed = pair(8, 0)
        changed.input_ids[j] = 299 - row.input_ids[j]
        mine, theirs = logits_of(model, changed, other)
        assert (mine - before[0]).abs().amax(1).min() > 1e-4, j
        assert torch.equal(theirs, before[1])


def test_rows_laid_end_to_end_equal_rows_one_by_one(model):
    causal = make_row(random_ids(8, 9))
    rows = [ROWS[3], causal, *ROWS]
    for row, together in zip(rows, logits_of(model, *rows), strict=True):
        torch.testing.assert_close(together, logits_of(model, row)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(model, causal)[0], row_logits(model, causal.input_ids), atol=1e-5, rtol=1e-5)
    for name, whole in model(make_batch(ROWS)).items():
        apart = [float(model(make_batch([row]))[name].total.detach()) for row in ROWS]
        assert float(whole.total.detach()) == pytest.approx(sum(apart), rel=1e-5)


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("prefix", [0, 4])
def test_attention_without_a_mask_equals_the_visibility_rule(window, cap, prefix):
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(14, heads, 8, generator=draw) for heads in (4, 2, 2))  # two rows of 7
    order = torch.zeros(2, 7, dtype=torch.long)
    attention = RowAttention([Group(2, 7, order)])
    before = torch.randn(1, 2, 2, prefix, 8, generator=draw)
    whole = Prefixed(attention, before) if prefix else attention
    found = whole(Sight(0, 0.3, window, cap), q, k, v).unflatten(0, (2, 7))
    assert (attention.groups[0].seen(window, q.device) is None) == (window != 3)
    index = torch.arange(7)
    tokens = Tokens(torch.zeros_like(index), torch.zeros_like(index), index)
    seen = F.pad(visible(tokens, tokens, window), (prefix, 0), value=True)
    for row in range(2):
        mine, keys, values = (t.unflatten(0, (2, 7))[row].transpose(0, 1) for t in (q, k, v))  # (heads, 7, 8)
        keys, values = (
            torch.cat([b, t], 1).repeat_interleave(2, 0) for b, t in zip(before[0], (keys, values), strict=True)
        )
        scores = 0.3 * mine @ keys.transpose(1, 2)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        torch.testing.assert_close(found[row].transpose(0, 1), expected, atol=1e-6, rtol=1e-5)


def test_a_row_that_sees_in_order_needs_the_mask():
    assert Group(1, 3, torch.tensor([[0, 0, 1]])).seen(None, torch.device("cpu")) is not None
    assert Group(2, 2, torch.tensor([[0, 0], [0, 1]])).seen(None, torch.device("cpu")) is not None


# ---- the losses


def by_hand(model, rows, options):
    """The two means of a step: row by row, whole logits in float64, plain autograd."""
    total, weight, following = torch.zeros((), dtype=torch.float64), 0, torch.zeros((), dtype=torch.float64)
    for row in rows:
        length = len(row.input_ids)
        attention = RowAttention([Group(1, length, torch.zeros(1, length, dtype=torch.long))])
        where = torch.tensor(row.input_ids), torch.arange(length), attention
        hidden = model.hidden(*where, types=torch.tensor(row.token_type_ids))
        bias = None if model.head.bias is None else model.head.bias.double()
        logits = F.linear(model.transform(hidden).double(), model.head.weight.double(), bias)
        at = torch.tensor([t for t, label in enumerate(row.labels) if label != IGNORE])
        targets = torch.tensor(row.labels)[at]
        total = total + formula(logits[at], targets, torch.ones(len(at)).double(), options)
        weight += len(at)
        classes = model.nsp(torch.tanh(model.pooler(hidden[0]))).double()
        following = following + F.cross_entropy(classes, torch.tensor(row.next_sentence_label))
    return total / weight, following / len(rows)


@pytest.mark.parametrize("options", [Loss(), TOGETHER], ids=["plain", "with options"])
def test_step_equals_the_plain_loop_over_rows_whatever_the_micro_batches(model, options):
    model.train()
    mlm, nsp = by_hand(model, ROWS, options)
    (mlm + nsp).backward()
    expected = gradients(model)
    for micro in (1, 16, 999):
        model.zero_grad()
        sums = accumulate(model, ROWS, micro, CPU, options)
        assert sums.losses == pytest.approx({"mlm": mlm.item(), "nsp": nsp.item()}, rel=1e-6)
        assert sums.loss == pytest.approx(mlm.item() + nsp.item(), rel=1e-6)
        assert_equal_gradients(gradients(model), expected, 1e-5)


def test_rows_without_pairs_have_one_loss(model):
    rows = [pair(8, None), pair(5, None, 1)]
    sums = accumulate(model.train(), rows, 999, CPU)
    assert list(sums.losses) == list(model(make_batch(rows))) == ["nll"]
    assert model.nsp.weight.grad is None


def test_evaluation_tells_both_losses_and_both_accuracies(model):
    found = total_score(model, ROWS, 16, CPU)
    mlm, nsp = (value.item() for value in by_hand(model, ROWS, Loss()))
    assert found.of_pairs["mlm"] == pytest.approx(mlm, rel=1e-5) and found.of_pairs["nsp"] == pytest.approx(
        nsp, rel=1e-5
    )
    assert found.loss == pytest.approx(mlm + nsp, rel=1e-5) and found.pairs == len(ROWS)
    batch = make_batch(ROWS)
    with torch.no_grad():
        hidden = model.hidden(batch.ids, batch.positions, batch.attention, types=batch.types)
        right = model.nsp(torch.tanh(model.pooler(hidden[batch.starts]))).argmax(1) == batch.pairs
    assert found.of_pairs["nsp_accuracy"] == right.float().mean()


# ---- what a decoder-only base gets


@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_table_changes_nothing_at_first_and_new_heads_can_learn(tmp_path, preset):
    path = model_folder(tmp_path / "m", preset)
    folder, ids = open_folder(path), random_ids(20, 5)
    add_masked_lm(folder, pairs=True)
    model = load_model(folder)
    assert torch.equal(row_logits(model, ids), row_logits(model_of(path), ids))
    assert not model.token_type.weight.any() and model.token_type.weight.shape == (2, 32)
    accumulate(model, ROWS, 999, CPU)
    assert model.nsp.weight.grad.any() and model.pooler.weight.grad.any() and model.token_type.weight.grad.any()


def test_a_model_from_nothing_draws_them_and_all_else_as_without_them(tmp_path):
    path = model_folder(tmp_path / "m", "gpt2")
    (path / WEIGHTS).unlink()
    folder = open_folder(path)
    without = dict(load_model(folder, seed=3).named_parameters())
    add_masked_lm(folder, pairs=True)
    found = dict(load_model(folder, seed=3).named_parameters())
    assert found.keys() - without.keys() == {
        "token_type.weight",
        "pooler.weight",
        "pooler.bias",
        "nsp.weight",
        "nsp.bias",
    }
    assert found["token_type.weight"].any() and all(torch.equal(found[name], without[name]) for name in without)


def test_they_lie_beside_weights_that_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    folder = open_folder(model_folder(tmp_path / "m", "llama"))
    add_masked_lm(folder, pairs=True)
    model = randomised(load_model(folder))
    save_model(model, folder, tmp_path / "saved")
    again = open_folder(tmp_path / "saved")
    assert again.config == folder.config and again.config.fills_masks
    assert all(torch.equal(a, b) for a, b in zip(load_model(again).parameters(), model.parameters(), strict=True))
    _, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told.values())


# ---- through the commands


TEXTS = [
    f"The {thing} is in the {place}.\nWe like the {thing}.\nThe {place} is big."
    for thing in ("dog", "cat", "bird", "fish")
    for place in ("house", "river", "garden")
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with `base`, `rows.jsonl` and `run`, trained on TEXTS."""
    from conftest import run_in_process as sft

    path = tmp_path_factory.mktemp("masked")
    data = write_lines(path / "texts.jsonl", *({"text": text} for text in TEXTS))
    sizes = [f"--set={size}" for size in ("layers=2", "heads=2", "width=32", "context=64")]
    assert sft("init", data, "-o", path / "base", "--set", "controls=bert", "--vocab-size", 330, *sizes).code == 0
    tokens = sft("tokenize", data, "-m", path / "base").out
    flags = ("--objective", "bert", "--set", "objective.copies=4")
    assert sft("mask", *flags, "-o", path / "rows.jsonl", "-m", path / "base", stdin=tokens).code == 0
    done = sft("train", path / "rows.jsonl", "-m", path / "base", "-o", path / "run", *TRAIN)
    assert done.code == 0, done.err
    assert "no stop token" not in done.err
    return path


TRAIN = (
    "--max-steps",
    40,
    "--lr",
    "1e-2",
    "--eval-share",
    0.1,
    "--set",
    "batch_rows=8",
    "--set",
    "checkpoint_every=20",
)


def test_training_logs_both_losses_and_their_sum(work, sft):
    lines = read_jsonl(work / "run" / "metrics.jsonl")
    for line in lines:
        assert line["loss"] == pytest.approx(line["losses"]["mlm"] + line["losses"]["nsp"], rel=1e-6)
    assert lines[-1]["eval_loss"] == pytest.approx(lines[-1]["eval_mlm"] + lines[-1]["eval_nsp"])
    assert lines[-1]["eval_mlm"] < lines[3]["eval_mlm"] and 0 <= lines[-1]["eval_nsp_accuracy"] <= 1
    assert {path.name for path in (work / "run" / "model").glob("*.safetensors")} == {WEIGHTS, EXTRA}
    (scores,) = sft("evaluate", work / "rows.jsonl", "-m", work / "run").rows
    assert scores["loss"] == pytest.approx(scores["mlm"] + scores["nsp"]) and "nsp_accuracy" in scores
    assert sft("show", work / "rows.jsonl", "-n", 2).out.count(b", B ") == 2


def test_a_resumed_run_ends_in_the_same_bytes(work, sft, tmp_path):
    parts = shutil.copytree(work / "run", tmp_path / "parts")
    shutil.rmtree(parts / "checkpoints" / "step-000040")
    shutil.rmtree(parts / "model")
    done = sft("train", work / "rows.jsonl", "-m", work / "base", "-o", parts, "--resume", *TRAIN)
    assert done.code == 0, done.err
    for name in (EXTRA, WEIGHTS):
        assert (parts / "model" / name).read_bytes() == (work / "run" / "model" / name).read_bytes()


def test_an_adapter_needs_a_base_that_has_learned_it(work, sft, tmp_path):
    few = ("--max-steps", 2, "--adapter", "lora", "--set", "sample_rows=0")
    weighty = model_folder(tmp_path / "m", "llama")
    shutil.copy(work / "base" / "tokenizer.json", weighty)
    config = json.loads((weighty / "config.json").read_text()) | {"vocab_size": 330}
    (weighty / "config.json").write_text(json.dumps(config))
    (weighty / WEIGHTS).unlink()
    save_weights(weighty, randomised(load_model(open_folder(weighty))))
    refused = sft("train", work / "rows.jsonl", "-m", weighty, "-o", tmp_path / "a", *few)
    assert refused.code == 2 and "what masked LM adds to a model, which the base lacks" in refused.err, refused.err
    adapted = sft("train", work / "rows.jsonl", "-m", work / "run", "-o", tmp_path / "b", *few)
    assert adapted.code == 0, adapted.err
    assert sft("evaluate", work / "rows.jsonl", "-m", tmp_path / "b").code == 0


def test_rows_that_do_not_fit_are_refused_by_name(work, sft, tmp_path):
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    cases = [
        ({"next_sentence_label": 2}, 3, "2 is neither 0 (is next) nor 1 (random)"),
        ({"token_type_ids": [2] * len(rows[0]["input_ids"])}, 3, "has token type 2 of 2"),
        ({"next_sentence_label": None}, 2, "rows with and without next-sentence labels"),
    ]
    for number, (change, code, told) in enumerate(cases):
        data = write_lines(tmp_path / "bad.jsonl", rows[0] | change, *rows[1:])
        result = sft("train", data, "-m", work / "base", "-o", tmp_path / f"run{number}", "--max-steps", 1)
        assert result.code == code and told in result.err, result.err
    plain = model_folder(tmp_path / "plain", "llama")
    row = pair(6, None, token_type_ids=[0] * 3 + [1] * 3)
    lacking = sft("evaluate", "-", "-m", plain, stdin=encode_row(row, {}))
    assert lacking.code == 3 and "needs a table of token types, which the model lacks" in lacking.err
    lacking = sft("evaluate", "-", "-m", plain, stdin=encode_row(pair(6, 1, token_type_ids=None), {}))
    assert lacking.code == 3 and "needs a head for next sentences, which the model lacks" in lacking.err


def test_a_damaged_extra_file_is_named(work, sft, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(work / "run" / "model", tmp_path / "m")
    tensors = load_file(folder / EXTRA)
    save_file({name: t for name, t in tensors.items() if name != "nsp.bias"}, folder / EXTRA)
    result = sft("evaluate", work / "rows.jsonl", "-m", folder)
    assert result.code == 5 and "nsp.bias is missing" in result.err


# ---- filling masks


PROMPTS = [
    {"text": "The [MASK] is in the house."},
    {"text": "We like the[MASK][MASK] The river [MASK] big."},
    {"prompt": "[MASK]", "id": "x"},
    {"text": "We like the dog.[MASK]" * 6},
]


def test_masks_are_filled_by_what_the_model_finds_most_likely(work, sft, lines):
    result = sft("generate", lines(*PROMPTS), "-m", work / "run")
    assert result.code == 0, result.err
    assert [len(row["completion_ids"]) for row in result.rows] == [1, 3, 1, 6]
    codec, model = load_codec(work / "base"), model_of(work / "run" / "model").eval()
    cls, sep, mask = (codec.added[name] for name in ("[CLS]", "[SEP]", "[MASK]"))
    encode = codec.tokenizer.encode
    ids = [cls, *encode("The").ids, mask, *encode(" is in the house.").ids, sep]
    with torch.no_grad():
        attention = RowAttention([Group(1, len(ids), torch.zeros(1, len(ids), dtype=torch.long))])
        logits = model.logits(model.hidden(torch.tensor(ids), torch.arange(len(ids)), attention))
    best = int(logits[ids.index(mask)].argmax())
    first = result.rows[0]
    assert first["completion_ids"] == [best] and first["finish_reason"] == "stop" and "fills" not in first
    assert first["completion"] == f"The{codec.decode([best])} is in the house."
    assert len(result.rows[1]["fills"]) == 3 and "4 prompts, 11 masks filled" in result.err


@pytest.mark.parametrize("flags", [(), ("--temperature", 1, "--top-k", 9, "--n", 3), ("--repetition-penalty", 2)])
def test_batched_fills_equal_one_by_one(work, sft, lines, flags):
    data = lines(*PROMPTS)
    one = sft("generate", data, "-m", work / "run", "--batch-size", 1, *flags)
    assert one.code == 0 and sft("generate", data, "-m", work / "run", "--batch-size", 3, *flags).out == one.out
    alone = sft("generate", lines(PROMPTS[2], name="one.jsonl"), "-m", work / "run", *flags)
    assert alone.rows == [row for row in one.rows if row.get("id") == "x"]  # its stream is its own


def test_prompts_that_cannot_be_filled_are_named(work, sft, lines):
    data = lines(PROMPTS[0], {"text": "no mask"})
    result = sft("generate", data, "-m", work / "run")
    assert result.code == 3 and f"{data}:2" in result.err and "no [MASK] to fill" in result.err
    assert len(result.rows) == 2  # the answer before it, and the line that tells the next stage
    long = sft("generate", lines({"text": "The [MASK] " * 40}), "-m", work / "run")
    assert long.rows[0]["completion_ids"] == [] and long.rows[0]["finish_reason"] == "length"
    chat = sft("chat", work / "run", stdin=b"hi\n")
    assert chat.code == 2 and "does not chat" in chat.err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_recipe_tells_words_and_next_sentences_that_an_untrained_model_does_not(sft, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = sft("run", "recipes/bert.yaml", "-o", tmp_path / "run", "--set", "train.epochs=2")
    assert done.code == 0, done.err
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["accuracy"] < 0.2  # tokens that stay as they are
    assert lines[-1]["eval_accuracy"] > 0.7 and lines[-1]["eval_nsp_accuracy"] > 0.65
