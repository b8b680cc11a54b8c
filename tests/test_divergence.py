"""Losses and gradients that are no numbers, and losses that jump: what reaches the weights, the log and the user."""

import json
import math
import time

import pytest
import torch
from model_fixtures import (
    CPU,
    make_row,
    make_rows,
    metrics,
    model_folder,
    model_of,
    random_ids,
    read_jsonl,
    save_weights,
    write_turns,
)
from test_training import LENGTHS, options_of, same_weights, save_rows, steps_of_weights

from sftcli.errors import Exit, SftError
from sftcli.model import optim, training
from sftcli.model.training import Plan, Report, train_steps
from sftcli.rowfile import write_rows
from sftcli.rows import read_rows_jsonl
from sftcli.stages.divergence import Spikes
from sftcli.stages.train import train

INF, NAN = math.inf, math.nan


@pytest.fixture
def base(tmp_path):
    return model_folder(tmp_path / "base", "llama", layers=2)


@pytest.fixture
def rows(tmp_path, base):
    return write_turns(base, tmp_path / "rows.safetensors", LENGTHS)


def poison(id="poison"):
    return make_row(random_ids(5, 9), id=id, loss_weight=[1e300] * 5)


@pytest.mark.parametrize("weight", [INF, NAN, -1.0])
@pytest.mark.parametrize("place", ["rows", "eval_data"])
def test_a_weight_that_no_row_may_have_is_refused_before_the_first_step(sft, base, rows, tmp_path, weight, place):
    """Of JSON lines the reader refuses it; a column of safetensors can hold it."""
    odd = tmp_path / "odd.safetensors"
    write_rows(odd, iter([make_row(random_ids(5, 1), id="good"), make_row(random_ids(5, 9), id="bad", loss_weight=[1.0, 2.0, weight, 1.0, 1.0])]))  # fmt: skip
    given = [odd] if place == "rows" else [rows, "--eval-data", odd]
    result = sft("train", *given, "-m", base, "-o", tmp_path / "run")
    assert result.code == 3 and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert "row 'bad'" in result.err and "a weight is negative or not finite at $.loss_weight" in result.err


def poisoned(monkeypatch, *steps):
    """From now on the gradients of these optimizer steps (from 1, in one process) have a nan."""
    real, taken = training.accumulate, []

    def accumulate(model, *rest, **named):
        sums = real(model, *rest, **named)
        taken.append(None)
        if len(taken) in steps:
            next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = NAN
        return sums

    monkeypatch.setattr(training, "accumulate", accumulate)


# ---- the step


@pytest.mark.parametrize("settings", [(), ("clip_norm=0",), ("optimizer.kind=muon",)], ids=str)
def test_loss_that_is_not_finite_never_reaches_the_weights(base, settings):
    seen, reports = steps_of_weights(base, [*make_rows([6, 9, 4]), poison()], *settings)
    assert [report.finite for report in reports].count(False) == 1
    for before, after, report in zip(seen, seen[1:], reports, strict=False):
        assert same_weights(before, after) == (not report.finite)
        assert all(bool(p.isfinite().all()) for p in after.values())


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_gradient_that_is_not_finite_never_reaches_the_weights_though_the_loss_is_a_number(base, bad, monkeypatch):
    model, some, options = model_of(base), make_rows([6, 9, 4, 8]), options_of("batch_rows=2", "epochs=1")
    model.blocks[0].mlp.up.weight.register_hook(lambda g: torch.full_like(g, bad) if len(reports) == 1 else g)
    plan = Plan([6, 9, 4, 8], options)
    reports, seen = [], [{n: p.detach().clone() for n, p in model.named_parameters()}]
    for report, _ in train_steps(
        model, optim.build(model, options.optimizer, 1e-2), some.__getitem__, plan, options, CPU, 1e-2
    ):
        reports.append(report)
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert [report.finite for report in reports] == [True, False]
    assert math.isfinite(reports[1].loss) and not math.isfinite(reports[1].grad_norm)
    assert not same_weights(seen[0], seen[1]) and same_weights(seen[1], seen[2])


def test_one_bad_micro_batch_of_many_is_enough(base):
    some = [*make_rows([6, 9, 4, 8, 7]), poison()]
    for micro in (1, 1000):
        seen, reports = steps_of_weights(base, some, f"micro_batch_tokens={micro}", "batch_rows=6")
        assert [report.finite for report in reports] == [False]
        assert same_weights(*seen)


def test_numbers_that_did_not_happen_are_none(base):
    _, reports = steps_of_weights(base, [poison()])
    assert math.isnan(reports[0].accuracy) and not math.isfinite(reports[0].loss)


# ---- the run


def test_diverged_run_exits_4_names_its_rows_and_keeps_them(base, rows, tmp_path, sft):
    model, run = model_of(base), tmp_path / "run"
    with torch.no_grad():
        model.norm.weight *= 1e38
    save_weights(base, model)
    with pytest.raises(SftError) as caught:
        train(options_of(), rows, str(base), str(run))
    assert caught.value.code == Exit.DIVERGED
    kept = [row for _, row, _ in read_rows_jsonl(str(run / "diverged-step-1.jsonl"))]
    assert f"step 1: loss nan, gradient norm nan: not finite; rows {', '.join(row.id for row in kept)}" in str(
        caught.value
    )
    assert len(kept) == 3
    assert b"--- row" in sft("show", run / "diverged-step-1.jsonl").out
    assert not (run / "model").exists() and not list((run / "checkpoints").glob("*"))
    (line,) = metrics(run)
    assert (line["finite"], line["loss"], line["grad_norm"], line["accuracy"]) == (False, None, None, None)
    assert b"NaN" not in (run / "metrics.jsonl").read_bytes()
    assert sft("show", run / "metrics.jsonl").code == 0


def test_steps_may_be_left_out_each_is_logged_and_one_too_many_ends_the_run(base, rows, tmp_path, monkeypatch, capsys):
    plain = train(options_of(), rows, str(base), str(tmp_path / "plain"))
    with monkeypatch.context() as patch:
        poisoned(patch, 2, 5)
        outcome = train(options_of("nonfinite_skips=2"), rows, str(base), str(tmp_path / "two"))
    told = capsys.readouterr().err
    assert "1 of 2 that may be" in told and "2 of 2 that may be" in told
    lines = read_jsonl(tmp_path / "two" / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("finite") is False] == [2, 5]
    assert all("finite" not in line and line["grad_norm"] > 0 for line in lines if line["step"] not in (2, 5))
    assert outcome.steps == plain.steps == 8 and outcome.sha256 != plain.sha256
    assert {p.name for p in (tmp_path / "two").glob("diverged*")} == {f"diverged-step-{n}.jsonl" for n in (2, 5)}
    with monkeypatch.context() as patch:
        poisoned(patch, 2, 5)
        with pytest.raises(SftError, match="step 5") as caught:
            train(options_of("nonfinite_skips=1"), rows, str(base), str(tmp_path / "one"))
    assert caught.value.code == Exit.DIVERGED
    assert len(metrics(tmp_path / "one")) == 5


def test_steps_left_out_before_a_resume_still_count_and_more_may_be_allowed_then(base, rows, tmp_path, monkeypatch):
    run, options = tmp_path / "run", ("checkpoint_every=1", "keep=99")
    with monkeypatch.context() as patch:
        poisoned(patch, 2, 5)
        expected = train(options_of("nonfinite_skips=2", *options), rows, str(base), str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        poisoned(patch, 2, 5)
        with pytest.raises(SftError):
            train(options_of("nonfinite_skips=1", *options), rows, str(base), str(run))
    with monkeypatch.context() as patch:
        poisoned(patch, 1)  # step 5 again, the first of this process
        with pytest.raises(SftError, match="step 5"):
            train(options_of("nonfinite_skips=1", *options), rows, str(base), str(run), resumed=True)
    with monkeypatch.context() as patch:
        poisoned(patch, 1)
        found = train(options_of("nonfinite_skips=2", *options), rows, str(base), str(run), resumed=True)
    assert found.sha256 == expected.sha256
    assert metrics(run) == metrics(tmp_path / "whole")


def test_a_new_run_does_not_keep_the_rows_of_an_old_failure(base, rows, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch, 2)
        with pytest.raises(SftError):
            train(options_of(), rows, str(base), str(tmp_path / "run"))
    train(options_of(), rows, str(base), str(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("diverged*"))


def test_poisoned_row_of_a_file_is_found_by_its_id(base, tmp_path):
    path = save_rows(tmp_path / "r.safetensors", [*make_rows([6, 8, 7]), poison("the culprit")])
    with pytest.raises(SftError, match="the culprit"):
        train(options_of("batch_rows=2"), path, str(base), str(tmp_path / "run"))


# ---- spikes


def told_of(losses, capsys):
    """The steps (from 1) for which a warning is printed."""
    spikes, warned = Spikes(), []
    for step, loss in enumerate(losses, 1):
        spikes.watch(Report(step, "", 0.0, loss, 1, 1, 1e-3, 1.0, 1.0, 0.0, 0.0, {}, {}, {}))
        warned += [step] if capsys.readouterr().err else []
    return warned


def test_a_spike_of_the_loss_is_told_once(capsys):
    noise = [2 + 0.1 * math.sin(1.7 * i) for i in range(300)]  # sigma 0.0707
    assert told_of(noise, capsys) == []
    spiked = list(noise)
    spiked[150:153] = [2.6, 2.7, 2.9]
    spiked[160] = NAN
    spiked[290] = 3.5
    assert told_of(spiked, capsys) == [151, 291]
    assert told_of([*noise[:99], 9.0, *noise[100:]], capsys) == []  # no 100 steps before it
    for above, told in ((5.9, []), (6.1, [201])):
        sigma = torch.tensor(noise[100:200], dtype=torch.float64).std(correction=0)
        mean = sum(noise[100:200]) / 100
        assert told_of([*noise[:200], float(mean + above * sigma)], capsys) == told


# ---- clocks


def test_a_clock_that_jumps_changes_no_number(base, rows, tmp_path, monkeypatch):
    day = iter(range(10**9, 0, -86400))
    monkeypatch.setattr(time, "time", lambda: next(day))
    outcome = train(options_of("eval_share=0.2"), rows, str(base), str(tmp_path / "run"))
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert 0 < outcome.seconds < 600
    assert all(0 < line["seconds"] < 600 and line["tokens_per_second"] > 0 for line in lines)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["started"].startswith("20")
