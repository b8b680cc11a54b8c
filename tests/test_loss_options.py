"""`train.loss`: every option, alone and together, against its formula in plain autograd; what metrics say by part."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import (
    CPU,
    assert_equal_gradients,
    gradients,
    make_row,
    make_rows,
    metrics,
    model_folder,
    model_of,
    random_ids,
    randomised,
    read_jsonl,
    save_weights,
    tokenizer_hash,
)
from test_loss import HF2, HF2_LABELS, case, z

from sftcli.errors import UsageError
from sftcli.model import loss as loss_module
from sftcli.model import training
from sftcli.model.adapters import lora
from sftcli.model.attention import Group, RowAttention
from sftcli.model.batches import make_batch, weight_of
from sftcli.model.checkpoint import load_model, open_folder
from sftcli.model.gpt import GPT
from sftcli.model.loss import LossSum, projected_loss
from sftcli.model.noise import neftune
from sftcli.model.scoring import total_score
from sftcli.model.training import accumulate
from sftcli.recipe import Lora, Loss, Train
from sftcli.recipefile import apply_settings, parse
from sftcli.rowfile import RowFile, write_rows
from sftcli.rows import IGNORE
from sftcli.stages.train import train

TOGETHER = Loss(label_smoothing=0.1, z_loss=0.05, dft=True)
OPTIONS = {
    "plain": Loss(),
    "smoothed": Loss(label_smoothing=0.3),
    "z": Loss(z_loss=0.1),
    "dft": Loss(dft=True),
    "together": TOGETHER,
}


def formula(logits, targets, weights, options):
    """The sum of the loss of logits (N, V), as it is written down; any dtype, plain autograd."""
    found = F.cross_entropy(logits, targets, label_smoothing=options.label_smoothing, reduction="none")
    found = found + options.z_loss * logits.logsumexp(-1) ** 2
    if options.dft:
        weights = weights * logits.softmax(-1).gather(1, targets[:, None]).squeeze(1).detach()
    return (weights * found).sum()


# ---- the loss function


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.6, 3.0)], ids=["as they are", "scaled and capped"])
@pytest.mark.parametrize("chunk", [1, 1 << 22], ids=["chunks of 64", "one chunk"])
def test_loss_and_gradients_equal_the_formula_in_float64(name, scale, cap, chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk)
    hidden, weight, bias, targets, weights = case(bias=True)
    found = projected_loss(hidden, weight, bias, targets, weights, scale, cap, OPTIONS[name])
    (3 * found.total).backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = scale * F.linear(*exact)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = formula(logits, targets, weights.double(), OPTIONS[name])
    (3 * expected).backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert float(found.weight) == pytest.approx(float(weights.sum()), rel=1e-6)
    for ours, reference in zip((hidden, weight, bias), exact, strict=True):
        assert float((ours.grad - reference.grad).norm() / reference.grad.norm()) < 2e-6


def test_frozen_head_leaves_the_gradient_of_hidden_states_as_it_is():
    hidden, weight, bias, targets, weights = case(bias=True)
    (full,) = torch.autograd.grad(
        projected_loss(hidden, weight, bias, targets, weights, 0.6, 3.0, TOGETHER).total, hidden
    )
    frozen = weight.detach(), bias.detach()
    projected_loss(hidden, *frozen, targets, weights, 0.6, 3.0, TOGETHER).total.backward()
    assert torch.equal(hidden.grad, full)


def test_options_change_neither_nll_nor_accuracy_nor_entropy():
    hidden, weight, bias, targets, weights = case(bias=True)
    plain = projected_loss(hidden, weight, bias, targets, weights)
    found = projected_loss(hidden, weight, bias, targets, weights, options=TOGETHER)
    assert found.total != plain.total
    for name in ("nll", "correct", "entropy", "weight"):
        assert torch.equal(getattr(found, name), getattr(plain, name))


class Given(torch.nn.Module):
    """In place of a model: the deterministic logits Z of each row, through the loss function that training uses."""

    def forward(self, batch, loss, noise):
        logits = torch.cat([z(0, len(row.input_ids)) for row in batch.rows]).requires_grad_()
        hidden = torch.eye(len(logits))[batch.scored]
        return {"nll": projected_loss(hidden, logits.T, None, batch.targets, batch.weights, options=loss)}


def test_smoothed_loss_of_the_question_and_answer_row_is_the_one_written_down():  # LR-2
    row = make_row(HF2, HF2_LABELS)
    assert accumulate(Given(), [row], 99, CPU).loss == pytest.approx(3.1521115, abs=1e-6)
    assert accumulate(Given(), [row], 99, CPU, Loss(label_smoothing=0.1)).loss == pytest.approx(3.1117782, abs=1e-6)


def test_each_loss_of_a_model_is_divided_by_its_own_weight_over_the_step(monkeypatch):
    rows = make_rows([5, 8, 11], prompt=2)
    monkeypatch.setattr(
        training, "weights_by_loss", lambda rows, reduction: {"first": weight_of(rows), "second": 10 * len(rows)}
    )
    at = torch.ones((), requires_grad=True)

    def two_losses(batch, loss, noise):
        n, r = len(batch.scored), len(batch.rows)
        first = LossSum(2 * n * at, torch.tensor(n), torch.full((n,), 2.0), torch.ones(n), torch.ones(n))
        return {"first": first, "second": LossSum(30 * r * at, torch.tensor(10 * r), *torch.zeros(3, r))}

    for micro in (1, 99):
        at.grad = None
        sums = accumulate(two_losses, rows, micro, CPU)
        assert sums.loss == pytest.approx(2 + 3)
        assert float(at.grad) == pytest.approx(2 + 3)
        assert sums.logged.tolist()[1:] == [18, 18] and sums.trained == 18  # correct, entropy: of the tokens


# ---- a model: chunks, micro-batches, reductions, weights, adapters


def turns_of(length):
    """Three turns; between the first two lies a token that is in none."""
    return [(2, 4, "assistant", 0), (5, 6, "tool", 1), (6, length, "assistant", 2)]


@pytest.fixture
def rows():
    """Rows with and without turns, with float weights, and one whose second turn is silent."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for i, length in enumerate([9, 14, 7, 12]):
        weights = torch.rand(length, generator=generator).tolist() if i != 2 else None
        found.append(make_row(random_ids(length, i), id=f"r{i}", loss_weight=weights, turns=turns_of(length)))
    found[3].loss_weight[5:6] = [0.0]
    return [*found, *make_rows([5, 13], prompt=2, seed=3), make_row(random_ids(6, 9), [IGNORE] * 6, "silent")]


def tied(path):
    return model_of(model_folder(path, "gpt2", layers=2)).train()


def capped(path):
    """An untied head with scale, soft cap and bias."""
    config = model_of(model_folder(path, "llama", layers=2)).config
    config = dataclasses.replace(config, tied=False, head_bias=True, logit_cap=4.0, logit_scale=0.5)
    return randomised(GPT(config)).train()


def adapted(path):
    """A frozen model with LoRA beside it, away from 0."""
    folder = open_folder(model_folder(path, "llama", layers=2))
    model = load_model(folder)
    lora.adapt(model, folder.family, Lora(rank=4), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return model.train()


def weights_by_hand(row, reduction):
    """The weights (T,) of a row's labels, float64."""
    weights = torch.tensor(row.loss_weight or [1.0] * len(row.labels), dtype=torch.float64)
    weights[0] = 0  # nothing comes before it
    weights[torch.tensor(row.labels) == IGNORE] = 0
    if reduction == "token":
        return weights
    group = torch.zeros(len(row.labels), dtype=torch.long)
    for i, (start, end, _, _) in enumerate(row.turns or [] if reduction == "turn" else [], 1):
        group[start:end] = i
    for i in group.unique():
        weights[group == i] /= weights[group == i].sum().clamp(min=1e-300)
    return weights


def by_hand(model, rows, options, step=(0, 0)):
    """The mean loss of a step: row by row, whole logits in float64, plain autograd."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        length = len(row.input_ids)
        noise = neftune([row], options.neftune, model.config.width, *step) if options.neftune else None
        where = torch.tensor(row.input_ids), torch.arange(length), RowAttention([Group(1, length)])
        hidden = model.hidden(*where, noise=noise).double()
        bias = None if model.head.bias is None else model.head.bias.double()
        logits = F.linear(hidden, model.head.weight.double(), bias) * model.config.logit_scale
        if (cap := model.config.logit_cap) is not None:
            logits = cap * torch.tanh(logits / cap)
        w = weights_by_hand(row, options.reduction)[1:]
        total = total + formula(logits[:-1], torch.tensor(row.labels[1:]).clamp(min=0), w, options)
        weight += float(w.sum())
    return total / weight


@pytest.mark.parametrize("make", [tied, capped, adapted])
@pytest.mark.parametrize("reduction", ["token", "example", "turn"])
@pytest.mark.parametrize("micro", [1, 30, 999])
def test_step_of_a_model_equals_the_plain_loop_over_rows(make, reduction, micro, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 1)  # chunks of 64 positions; the step has more
    options = TOGETHER.model_copy(update={"reduction": reduction, "neftune": 5.0})
    model, rows = make(tmp_path / "model"), [*rows, *make_rows([20, 21, 22], seed=7, turns=[(3, 8, "assistant", 0)])]
    sums = accumulate(model, rows, micro, CPU, options, (3, 4))
    found = gradients(model)
    model.zero_grad()
    expected = by_hand(model, rows, options, (3, 4))
    expected.backward()
    assert sums.loss == pytest.approx(expected.item(), rel=1e-6)
    assert_equal_gradients(found, gradients(model), 5e-6)


def test_by_example_the_gradient_is_the_mean_of_those_of_the_rows(rows, tmp_path):
    model, spoken = tied(tmp_path / "model"), rows[:-1]
    sums = accumulate(model, rows, 30, CPU, Loss(reduction="example"))
    found, losses = gradients(model), []
    model.zero_grad()
    for row in spoken:  # gradients add up
        losses.append(accumulate(model, [row], 999, CPU).loss)
    assert sums.weight == pytest.approx(len(spoken))  # the silent row does not count
    assert sums.loss == pytest.approx(sum(losses) / len(spoken), rel=1e-6)
    assert_equal_gradients(found, {name: g / len(spoken) for name, g in gradients(model).items()}, 1e-5)


def only(row, keep):
    """The row, trained only where `keep` (a set of positions) says."""
    labels = [label if t in keep else IGNORE for t, label in enumerate(row.labels)]
    return make_row(row.input_ids, labels, row.id, loss_weight=row.loss_weight)


def test_by_turn_the_gradient_is_the_mean_of_those_of_the_turns(rows, tmp_path):
    model, parts = tied(tmp_path / "model"), []
    for row in rows:
        spans = [set(range(start, end)) for start, end, _, _ in row.turns or ()]
        parts += [only(row, keep) for keep in [*spans, set(range(1, len(row.labels))).difference(*spans)]]
    parts = [part for part in parts if weight_of([part])]
    sums = accumulate(model, rows, 30, CPU, Loss(reduction="turn"))
    found, losses = gradients(model), []
    model.zero_grad()
    for part in parts:
        losses.append(accumulate(model, [part], 999, CPU).loss)
    assert sums.weight == pytest.approx(len(parts)) == 4 * 4 - 1 + 2  # one turn is silent
    assert sums.loss == pytest.approx(sum(losses) / len(parts), rel=1e-6)
    assert_equal_gradients(found, {name: g / len(parts) for name, g in gradients(model).items()}, 1e-5)


def test_labels_that_are_not_shifted_keep_their_turns():
    row = make_row([7, 8, 9, 6], [7, IGNORE, 9, 6], align="same", turns=[(0, 1, "a", 0), (2, 4, "b", 1)])
    assert make_batch([row], "turn").weights.tolist() == [1, 0.5, 0.5]
    assert make_batch([row], "example").weights.tolist() == pytest.approx([1 / 3] * 3)
    assert weight_of([row], "turn") == 2


# ---- NEFTune


def test_noise_of_a_row_is_uniform_and_scaled_by_its_own_length_and_the_width():
    long, short = make_rows([300, 30], seed=1)
    noise = neftune([long, short], 5.0, 64, 0, 0)
    for part, length in zip(noise.split([300, 30]), (300, 30), strict=True):
        bound = 5 / math.sqrt(length * 64)
        assert 0.98 * bound < float(part.abs().max()) <= bound
        assert float(part.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(float(part.mean())) < 0.05 * bound


def test_noise_is_a_function_of_seed_step_and_row():
    a, b = make_rows([8, 8])
    both = neftune([a, b], 5.0, 16, 1, 2)
    assert torch.equal(both, torch.cat([neftune([row], 5.0, 16, 1, 2) for row in (a, b)]))
    assert not torch.equal(both[:8], both[8:])
    for seed, step in ((1, 3), (2, 2), (2, 1)):
        assert not torch.equal(both, neftune([a, b], 5.0, 16, seed, step))


def test_noise_is_added_to_the_rows_of_the_embedding_before_they_are_scaled(tmp_path):
    config = dataclasses.replace(tied(tmp_path / "model").config, embedding_scale=3.0, tied=False)
    model, (row,) = randomised(GPT(config)), make_rows([9])
    assert len(set(row.input_ids)) == 9
    noise = neftune([row], 5.0, config.width, 0, 0)
    where = torch.tensor(row.input_ids), torch.arange(9), RowAttention([Group(1, 9)])
    noisy = model.hidden(*where, noise=noise)
    with torch.no_grad():
        model.embedding.weight[where[0]] += noise
    torch.testing.assert_close(noisy, model.hidden(*where))


# ---- a run: metrics, evaluation, resume, refusals


def options_of(*settings):
    given = ["batch_rows=99", "epochs=2", "optimizer.lr=3e-3", "sample_rows=0", *settings]
    return parse(Train, apply_settings({}, given), section="train")


EVERYTHING = (
    "loss.label_smoothing=0.1",
    "loss.z_loss=1e-3",
    "loss.dft=true",
    "loss.reduction=turn",
    "loss.neftune=5",
)


@pytest.fixture
def base(tmp_path):
    return model_folder(tmp_path / "base", "llama", layers=2)


@pytest.fixture
def saved(tmp_path, base, rows):
    """A file of the rows, two of three from a source."""
    for i, row in enumerate(rows):
        row.tokenizer, row.source = tokenizer_hash(base), (None, "web", "books")[i % 3]
    write_rows(tmp_path / "rows.safetensors", iter(rows))
    return str(tmp_path / "rows.safetensors")


def test_metrics_tell_the_plain_loss_by_role_source_and_turn(base, saved, tmp_path):
    run, some, model = tmp_path / "run", list(RowFile(saved)), model_of(base)
    train(options_of("micro_batch_tokens=20"), saved, str(base), str(run))
    first = read_jsonl(run / "metrics.jsonl")[0]

    def loss_where(wanted):
        """Of the tokens whose turn - (role, number) or None - is wanted."""
        parts = []
        for row in (row for row in some if row.turns):
            turn_at = {t: (role, number) for a, b, role, number in row.turns for t in range(a, b)}
            parts.append(only(row, {t for t in range(len(row.labels)) if wanted(turn_at.get(t))}))
        return pytest.approx(total_score(model, parts, 999, CPU).loss, rel=1e-5)

    sources = {name: total_score(model, [row for row in some if row.source == name], 999, CPU).loss for name in
               ("books", "web")}  # fmt: skip
    assert first["loss_by_source"] == pytest.approx(sources, rel=1e-5)
    assert first["loss_by_role"] == {
        "assistant": loss_where(lambda turn: turn and turn[0] == "assistant"),
        "other": loss_where(lambda turn: turn is None),
        "tool": loss_where(lambda turn: turn and turn[0] == "tool"),
    }
    assert first["loss_by_turn"] == {str(n): loss_where(lambda turn, n=n: turn and turn[1] == n) for n in range(3)}
    assert first["loss"] == pytest.approx(total_score(model, some, 999, CPU).loss, rel=1e-5)


def test_metrics_name_no_parts_where_rows_name_none(base, tmp_path):
    plain = make_rows([6, 9], tokenizer=tokenizer_hash(base))
    write_rows(tmp_path / "rows.safetensors", iter(plain))
    train(options_of(), str(tmp_path / "rows.safetensors"), str(base), str(tmp_path / "run"))
    for line in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert not {"loss_by_role", "loss_by_source", "loss_by_turn"} & set(line)


def test_losses_of_a_run_are_those_of_the_formula_and_its_eval_loss_the_plain_one(base, saved, tmp_path):
    run, some, model = tmp_path / "run", list(RowFile(saved)), model_of(base)
    still = ("optimizer.lr=1e-12", "seed=6", "micro_batch_tokens=20", f"eval_data={saved}")
    options = options_of(*EVERYTHING, *still)
    outcome = train(options, saved, str(base), str(run))
    losses = [line["loss"] for line in read_jsonl(run / "metrics.jsonl")]
    expected = [by_hand(model, some, options.loss, (6, step)).item() for step in range(2)]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert abs(expected[0] / expected[1] - 1) > 1e-4  # by the noise alone
    assert outcome.eval_loss == pytest.approx(by_hand(model, some, Loss()).item(), rel=1e-6)


def test_run_with_every_option_resumes_to_the_same_weights(base, saved, tmp_path):
    options = options_of(*EVERYTHING, "batch_rows=2", "dropout=0.1", "checkpoint_every=1", "keep=99")
    whole, run = tmp_path / "whole", tmp_path / "run"
    expected = train(options, saved, str(base), str(whole))
    whole.rename(run)
    lines = metrics(run)
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > 3:
            folder.rename(folder.with_name(f".tmp-{folder.name}-abcd"))
    assert train(options, saved, str(base), str(run), resumed=True).sha256 == expected.sha256
    assert metrics(run) == lines


@pytest.mark.parametrize("setting", EVERYTHING)
def test_resume_with_another_loss_exits_2(base, saved, tmp_path, setting):
    train(options_of(), saved, str(base), str(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"cannot resume .*: loss\.\w+ was .*, is"):
        train(options_of(setting), saved, str(base), str(tmp_path / "run"), resumed=True)


@pytest.mark.parametrize("settings", [(s,) for s in EVERYTHING] + [EVERYTHING], ids=lambda s: ", ".join(s))
def test_every_option_changes_what_is_trained_and_trains(base, saved, tmp_path, settings):
    model = randomised(model_of(base), seed=4)
    save_weights(base, model)
    plain = train(options_of("epochs=1"), saved, str(base), str(tmp_path / "plain"))
    assert train(options_of("epochs=1", *settings), saved, str(base), str(tmp_path / "a")).sha256 != plain.sha256
    train(
        options_of("epochs=10", f"eval_data={saved}", "eval_every=1", *settings), saved, str(base), str(tmp_path / "b")
    )
    lines = read_jsonl(tmp_path / "b" / "metrics.jsonl")
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


@pytest.mark.parametrize(
    "setting",
    [
        "label_smoothing=1",
        "label_smoothing=-0.1",
        "label_smoothing=.nan",
        "z_loss=-1e-4",
        "z_loss=.inf",
        "neftune=-5",
        "neftune=.inf",
        "reduction=mean",
        "dft=2",
    ],
)
def test_senseless_values_are_refused_by_name(setting):
    with pytest.raises(UsageError, match=f"loss.{setting.partition('=')[0]}"):
        options_of(f"loss.{setting}")
