"""sft train as a whole: what a run leaves behind, the same weights every time, and what it refuses."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from model_fixtures import (
    CPU,
    END,
    empty_folder,
    make_row,
    make_rows,
    metrics,
    model_folder,
    model_of,
    random_ids,
    read_jsonl,
    write_jsonl,
    write_turns,
)

from sftcli import artifacts
from sftcli.cli import app
from sftcli.errors import CheckpointError, DataError, Exit, UsageError
from sftcli.model import optim
from sftcli.model.checkpoint import open_folder
from sftcli.model.dataset import split, trained_stops
from sftcli.model.scoring import total_score
from sftcli.model.training import Plan, train_steps
from sftcli.recipe import Train
from sftcli.recipefile import apply_settings, parse
from sftcli.rowfile import RowFile, write_rows
from sftcli.stages import train as stage
from sftcli.stages.train import train

LENGTHS = [12, 7, 20, 9, 15, 5, 11, 18, 6, 13, 8, 10]


def options_of(*settings):
    """Options as a recipe would give them: `options_of("epochs=2", "optimizer.lr=1e-2")`."""
    given = ["batch_rows=3", "epochs=2", "optimizer.lr=3e-3", "sample_rows=0", *settings]
    return parse(Train, apply_settings({}, given), section="train")


@pytest.fixture
def base(tmp_path):
    return model_folder(tmp_path / "base", "llama", layers=2)


@pytest.fixture
def rows(tmp_path, base):
    """Twelve rows that end with a trained end-of-turn token."""
    return write_turns(base, tmp_path / "rows.safetensors", LENGTHS)


def save_rows(path, rows):
    write_rows(path, iter(rows))
    return str(path)


def weights(run):
    return safetensors.torch.load_file(Path(run, "model", "model.safetensors"))


def same_weights(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items()) and set(a) == set(b)


# ---- what a run leaves behind


def test_run_leaves_the_files_that_the_contract_names(base, rows, tmp_path):
    run = tmp_path / "run"
    outcome = train(
        options_of("eval_share=0.2", "eval_every=2", "sample_rows=2", "sample_tokens=5"), rows, str(base), str(run)
    )
    assert {p.name for p in run.iterdir()} == {"run.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model"}
    assert {p.name for p in (run / "model").iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    assert outcome.sha256 == artifacts.file_fingerprint(run / "model" / "model.safetensors")
    assert json.loads((run / "model" / "generation_config.json").read_text())["eos_token_id"] == END
    assert model_of(run / "model").config == open_folder(base).config
    facts = json.loads((run / "run.json").read_text())
    assert {"sftcli", "torch", "command", "started", "options", "rows", "model"} <= set(facts)


def test_metrics_have_a_line_a_step_with_what_happened_in_it(base, rows, tmp_path):
    outcome = train(options_of("eval_share=0.2", "eval_every=3"), rows, str(base), str(tmp_path / "run"))
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))  # 10 rows, 3 a step: 4 steps, 2 epochs
    fields = {"step", "epoch", "loss", "tokens", "trained", "lr", "grad_norm", "seconds", "accuracy", "entropy"}
    assert all(fields | {"tokens_per_second"} <= set(line) for line in lines)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 8]
    train_rows, held = split(12, 0.2, 0)
    assert sum(line["tokens"] for line in lines) == 2 * sum(LENGTHS[i] + 1 for i in train_rows) == outcome.tokens
    assert sum(line["trained"] for line in lines) == 2 * sum(LENGTHS[i] - 2 for i in train_rows)
    assert all(
        line["lr"] == pytest.approx(3e-3 * optim.lr_share(i, 8, Train().schedule)) for i, line in enumerate(lines)
    )
    evaluated = total_score(model_of(tmp_path / "run" / "model"), [RowFile(rows)[i] for i in held], 999, CPU)
    assert lines[-1]["eval_loss"] == pytest.approx(evaluated.loss, rel=1e-6)
    assert lines[-1]["eval_accuracy"] == pytest.approx(evaluated.accuracy)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_samples_show_prompt_answer_and_reference(base, rows, tmp_path):
    train(
        options_of("eval_share=0.2", "eval_every=3", "sample_rows=2", "sample_tokens=4"),
        rows,
        str(base),
        str(tmp_path / "run"),
    )
    lines = read_jsonl(tmp_path / "run" / "samples.jsonl")
    held = split(12, 0.2, 0)[1]
    assert [line["step"] for line in lines] == [3, 3, 6, 6, 8, 8]
    assert [line["id"] for line in lines[:2]] == [f"r{i}" for i in held]
    assert all({"prompt", "completion", "reference", "finish_reason"} <= set(line) for line in lines)


def test_odd_rows_are_answered_too(base, tmp_path):
    odd = [
        make_row(random_ids(6, 1), id="first token labelled"),
        make_row(random_ids(6, 2), [-100] * 6, "nothing labelled"),
        make_row(random_ids(64, 3), [-100] * 63 + [5], "as long as the context"),
    ]
    path = save_rows(tmp_path / "rows.safetensors", odd)
    train(
        options_of("epochs=1", "sample_rows=3", "sample_every=1", "sample_tokens=3"),
        path,
        str(base),
        str(tmp_path / "run"),
    )
    ids = [line["id"] for line in read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert ids == ["first token labelled", "as long as the context"]


def test_weights_are_drawn_from_the_seed_and_train_from_nothing(tmp_path):
    empty = empty_folder(tmp_path / "empty", "gpt2", layers=2)
    path = save_rows(tmp_path / "rows.safetensors", make_rows(LENGTHS))
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs[name] = train(options_of(f"seed={seed}"), path, str(empty), str(tmp_path / name))
    assert runs["a"].sha256 == runs["b"].sha256 != runs["c"].sha256
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_rows_from_json_lines_train_the_same_weights_as_the_row_file(base, rows, tmp_path):
    lines = write_jsonl(tmp_path / "rows.jsonl", list(RowFile(rows)))
    a = train(options_of(), rows, str(base), str(tmp_path / "a"))
    b = train(options_of(), lines, str(base), str(tmp_path / "b"))
    assert a.sha256 == b.sha256
    assert list(RowFile(tmp_path / "b" / "rows.safetensors")) == list(RowFile(rows))


def test_deterministic_run_asks_torch_for_it_and_gives_the_weights_of_any_other(base, rows, tmp_path, monkeypatch):
    expected = train(options_of(), rows, str(base), str(tmp_path / "a")).sha256
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        found = train(options_of("deterministic=true"), rows, str(base), str(tmp_path / "b")).sha256
        assert torch.are_deterministic_algorithms_enabled() and os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == expected


@pytest.mark.parametrize("settings", [("micro_batch_tokens=1",), ("gradient_checkpointing=true",)], ids=str)
def test_how_a_step_is_computed_changes_no_step(base, rows, tmp_path, settings):
    train(options_of("epochs=1"), rows, str(base), str(tmp_path / "a"))
    train(options_of("epochs=1", *settings), rows, str(base), str(tmp_path / "b"))
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a.pop("rows") == b.pop("rows")
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.parametrize(
    "settings", [("optimizer.kind=muon",), ("dtype=bfloat16",), ("schedule=wsd", "clip_norm=0")], ids=str
)
def test_other_options_train_too(base, rows, tmp_path, settings):
    train(options_of("epochs=4", *settings), rows, str(base), str(tmp_path / "run"))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-4:]) < sum(losses[:4])


# ---- the step itself


def test_two_steps_equal_a_plain_loop_in_torch(base, tmp_path):
    found, plain = model_of(base), model_of(base)
    some = make_rows([6, 9, 4], prompt=2)
    # a large eps, or rounding in gradients near 0 would decide the sign of their updates
    options = options_of("schedule.kind=constant", "schedule.warmup=0", "clip_norm=0.5", "optimizer.eps=1e-3")
    plan = Plan([6, 9, 4], options)
    for _ in train_steps(
        found, optim.build(found, options.optimizer, 1e-2), some.__getitem__, plan, options, CPU, 1e-2
    ):
        pass
    matrices = [p for p in plain.parameters() if p.ndim >= 2]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-3)
    for _ in range(2):
        loss = torch.zeros(())
        for row in some:
            ids, length = torch.tensor(row.input_ids), len(row.input_ids)

            def causal(layer, q, k, v):
                q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                return out[0].transpose(0, 1)

            logits = plain.head(plain.hidden(ids, torch.arange(length), causal))
            loss = loss + torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row.labels[1:]), reduction="sum")
        adamw.zero_grad()
        (loss / 13).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adamw.step()
    for name, p in found.named_parameters():
        torch.testing.assert_close(p, dict(plain.named_parameters())[name], atol=2e-5, rtol=1e-4)


def steps_of_weights(base, some, *settings):
    """(weights before each step and after the last, reports) of a loop over `some` rows, one a step."""
    model = model_of(base)
    options = options_of("batch_rows=1", "epochs=1", *settings)
    plan = Plan([len(row.input_ids) for row in some], options)
    seen, reports = [{n: p.detach().clone() for n, p in model.named_parameters()}], []
    optimizers = optim.build(model, options.optimizer, 1e-2)
    for report, _ in train_steps(model, optimizers, some.__getitem__, plan, options, CPU, 1e-2):
        reports.append(report)
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return seen, reports


def test_step_of_weight_zero_is_skipped(base):
    silent = [
        make_row(random_ids(7, 1), [-100] * 7, "no label"),
        make_row(random_ids(7, 2), id="weight 0", loss_weight=[0.0] * 7),
        make_row(random_ids(1, 3), id="one token"),
    ]
    seen, reports = steps_of_weights(base, [*silent, *make_rows([6])])
    assert len(reports) == 4
    for before, after, report in zip(seen, seen[1:], reports, strict=False):
        assert same_weights(before, after) == math.isnan(report.loss)
    assert sum(math.isnan(report.loss) for report in reports) == 3


def test_steps_of_weight_zero_are_null_in_the_metrics_and_counted(base, tmp_path, capsys):
    some = [make_row(random_ids(7, 1), [-100] * 7, "no label"), *make_rows([6, 8])]
    path = save_rows(tmp_path / "rows.safetensors", some)
    train(options_of("batch_rows=1", "epochs=1"), path, str(base), str(tmp_path / "run"))
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert sorted((line["trained"], line["loss"] is None) for line in lines) == [(0, True), (5, False), (7, False)]
    assert "1 step(s) had no weight" in capsys.readouterr().err


# ---- resume


def interrupted(whole, run, step):
    """What a run killed some time after checkpoint `step` leaves: later metrics, half a checkpoint, no model."""
    shutil.copytree(whole, run)
    (run / "model").rename(run / ".tmp-model-abcd")
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            folder.rename(folder.with_name(f".tmp-{folder.name}-abcd"))
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 99, "lo')


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("dropout=0.2", "batch_rows=null", "batch_tokens=40"),
        ("dropout=0.1", "optimizer.kind=muon", "gradient_checkpointing=true", "dtype=bfloat16"),
    ],
    ids=str,
)
def test_resumed_run_ends_with_the_weights_of_the_unbroken_one(base, rows, tmp_path, settings):
    options = options_of("checkpoint_every=1", "keep=99", "eval_share=0.1", "eval_every=2", "sample_rows=1", *settings)
    whole = tmp_path / "whole"
    expected = train(options, rows, str(base), str(whole))
    for step in (1, 4, 7):  # inside an epoch, at its end, before the last step
        run = tmp_path / f"killed-{step}"
        interrupted(whole, run, step)
        found = train(options, rows, str(base), str(run), resumed=True)
        assert found.sha256 == expected.sha256
        assert metrics(run) == metrics(whole)
        assert (run / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
        for place in (".", "checkpoints", "model"):
            assert {p.name for p in (run / place).iterdir()} == {p.name for p in (whole / place).iterdir()}


def test_dropout_is_a_function_of_seed_and_step_whatever_the_process_drew_before(base, rows, tmp_path):
    found = {}
    for name, drawn, settings in (("a", 0, ()), ("b", 1, ("dropout=0.2",)), ("c", 2, ("dropout=0.2",))):
        torch.manual_seed(drawn)
        found[name] = train(options_of(*settings), rows, str(base), str(tmp_path / name)).sha256
    assert found["a"] != found["b"] == found["c"]


def signal_after(monkeypatch, step, number):
    """Let the process receive a signal while optimizer step `step` is being logged."""
    real = stage._metrics

    def metrics_then_signal(report, evaluation):
        if report.step == step:
            os.kill(os.getpid(), number)
        return real(report, evaluation)

    monkeypatch.setattr(stage, "_metrics", metrics_then_signal)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_a_checkpoint_exits_with_its_code_and_the_run_resumes(
    base, rows, tmp_path, monkeypatch, number, code
):
    expected = train(options_of(), rows, str(base), str(tmp_path / "whole"))
    run = tmp_path / "run"
    command = ["train", rows, "-m", str(base), "-o", str(run), "--set", "batch_rows=3", "--set", "epochs=2"]
    command += ["--lr", "3e-3", "--set", "sample_rows=0"]
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signal_after(patch, 3, number)
        with pytest.raises(SystemExit) as left:
            app(command)
    assert left.value.code == code
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-000003", "latest"}
    assert not (run / "model").exists()
    with pytest.raises(SystemExit) as refused:
        app(command)
    assert refused.value.code == 2  # an unfinished run is not started over by accident
    with pytest.raises(SystemExit) as done:
        app([*command, "--resume"])
    assert done.value.code == 0
    assert artifacts.file_fingerprint(run / "model" / "model.safetensors") == expected.sha256
    assert metrics(run) == metrics(tmp_path / "whole")


def test_signal_in_the_last_step_lets_the_run_end(base, rows, tmp_path, monkeypatch):
    signal_after(monkeypatch, 8, signal.SIGTERM)
    outcome = train(options_of(), rows, str(base), str(tmp_path / "run"))
    assert outcome.sha256 == artifacts.file_fingerprint(tmp_path / "run" / "model" / "model.safetensors")


def test_resuming_a_finished_run_changes_nothing(base, rows, tmp_path):
    run = tmp_path / "run"
    first = train(options_of("eval_share=0.1", "sample_rows=1"), rows, str(base), str(run))
    before = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    again = train(options_of("eval_share=0.1", "sample_rows=1"), rows, str(base), str(run), resumed=True)
    assert again.sha256 == first.sha256
    assert again.steps == first.steps
    assert before == {name: (run / name).read_bytes() for name in before}


def test_resume_without_a_checkpoint_starts_at_step_0(base, rows, tmp_path):
    first = train(options_of(), rows, str(base), str(tmp_path / "a"))
    again = train(options_of(), rows, str(base), str(tmp_path / "b"), resumed=True)
    assert again.sha256 == first.sha256


def test_held_out_rows_may_be_named_another_way(base, rows, tmp_path, monkeypatch):
    held = save_rows(tmp_path / "held.safetensors", make_rows([6, 8]))
    first = train(options_of(f"eval_data={held}"), rows, str(base), str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    again = train(options_of("eval_data=held.safetensors"), rows, str(base), "run", resumed=True)
    assert again.sha256 == first.sha256


@pytest.mark.parametrize("change", ["options", "rows", "model", "eval_data"])
def test_resume_with_something_changed_exits_2(base, rows, tmp_path, change):
    run = tmp_path / "run"
    held = save_rows(tmp_path / "held.safetensors", make_rows([6, 8]))
    train(options_of(f"eval_data={held}"), rows, str(base), str(run))
    before = (run / "metrics.jsonl").read_bytes()
    options = options_of(f"eval_data={held}", *(["optimizer.lr=1e-4"] if change == "options" else []))
    if change == "eval_data":
        save_rows(held, make_rows([6, 8], seed=9))
    if change == "rows":
        rows = save_rows(tmp_path / "other.safetensors", list(RowFile(rows))[::-1])
    if change == "model":
        base = model_folder(tmp_path / "other", "llama", seed=2, layers=2)
    told = r"optimizer\.lr was 0\.003, is 0\.0001" if change == "options" else f"the {change} changed"
    with pytest.raises(UsageError, match=told):
        train(options, rows, str(base), str(run), resumed=True)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("keep", [0, 40, -3])
def test_damaged_checkpoint_is_refused_by_name(base, rows, tmp_path, name, keep):
    run = tmp_path / "run"
    train(options_of("keep=1"), rows, str(base), str(run))
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=re.escape(name)):
        train(options_of("keep=1"), rows, str(base), str(run), resumed=True)


def test_only_the_newest_checkpoints_are_kept(base, rows, tmp_path):
    train(options_of("checkpoint_every=1", "keep=3"), rows, str(base), str(tmp_path / "run"))
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert names == ["step-000006", "step-000007", "step-000008"]


# ---- held-out rows and early stopping


@pytest.mark.parametrize(
    ("count", "share", "held"), [(100, 0.2, 20), (10, 0.01, 1), (3, 0.99, 2), (2, 0.5, 1), (5, 0.0, 0)]
)
def test_held_out_rows_are_disjoint_stable_and_leave_something_to_train(count, share, held):
    train_rows, held_out = split(count, share, 0)
    assert len(held_out) == held
    assert sorted(train_rows + held_out) == list(range(count))
    assert split(count, share, 0) == (train_rows, held_out)
    if count == 100:
        assert split(count, share, 1)[1] != held_out


def unlearnable(base, tmp_path):
    """Training rows, and held-out rows that contradict them: eval loss falls at no time for long."""
    train_rows = make_rows([10] * 6, seed=1)
    against = [
        make_row(row.input_ids, [-100, *random_ids(9, i)], f"e{i}", align="same") for i, row in enumerate(train_rows)
    ]
    return save_rows(tmp_path / "t.safetensors", train_rows), save_rows(tmp_path / "e.safetensors", against)


def test_early_stopping_keeps_the_best_weights(base, tmp_path):
    path, held = unlearnable(base, tmp_path)
    options = options_of(f"eval_data={held}", "eval_every=1", "patience=3", "epochs=50", "keep=1", "optimizer.lr=2e-2")
    outcome = train(options, path, str(base), str(tmp_path / "run"))
    losses = [line["eval_loss"] for line in metrics(tmp_path / "run")]
    best = min(losses)
    assert len(losses) == losses.index(best) + 1 + 3 < 100
    final = total_score(model_of(tmp_path / "run" / "model"), list(RowFile(held)), 999, CPU).loss
    assert outcome.eval_loss == best == pytest.approx(final, rel=1e-6)
    assert losses[-1] > best
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert names == [f"step-{losses.index(best) + 1:06}", f"step-{len(losses):06}"]


@pytest.mark.parametrize("back", [0, 1, 2])
def test_early_stopped_run_resumes_to_the_same_best_weights(base, tmp_path, back):
    path, held = unlearnable(base, tmp_path)
    settings = (f"eval_data={held}", "eval_every=1", "patience=3", "epochs=50", "optimizer.lr=2e-2")
    options = options_of(*settings, "checkpoint_every=1", "keep=99")
    first = train(options, path, str(base), str(tmp_path / "whole"))
    run = tmp_path / "run"
    interrupted(tmp_path / "whole", run, first.steps - back)
    again = train(options, path, str(base), str(run), resumed=True)
    assert (again.sha256, again.eval_loss) == (first.sha256, first.eval_loss)
    assert metrics(run) == metrics(tmp_path / "whole")


def test_patience_without_held_out_rows_exits_2(base, rows, tmp_path):
    with pytest.raises(UsageError, match="patience"):
        train(options_of("patience=2"), rows, str(base), str(tmp_path / "run"))


def test_held_out_rows_without_a_trained_token_exit_3(base, rows, tmp_path):
    for number, silent in enumerate(
        (
            make_row(random_ids(5, 1), [-100] * 5),
            make_row(random_ids(5, 1), loss_weight=[0.0] * 5),
            make_row(random_ids(5, 1), [*random_ids(1, 1), -100, -100, -100, -100]),
        )
    ):
        held = save_rows(tmp_path / f"held-{number}.safetensors", [silent])
        with pytest.raises(DataError, match="held"):
            train(options_of(f"eval_data={held}"), rows, str(base), str(tmp_path / "run"))


def test_weights_count_in_the_eval_loss(base, rows, tmp_path):
    some = make_rows([9, 9], seed=4)
    some[1].loss_weight = [0.0] * 9
    held = save_rows(tmp_path / "held.safetensors", some)
    train(options_of(f"eval_data={held}"), rows, str(base), str(tmp_path / "run"))
    alone = total_score(model_of(tmp_path / "run" / "model"), some[:1], 999, CPU)
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == pytest.approx(alone.loss, rel=1e-6)


# ---- what is refused


def refused(kind, code, *words):
    return pytest.raises(kind, match=".*".join(map(re.escape, words))), code


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (make_row([10] * 65, id="x"), ("'x'", "65 tokens", "context is 64")),
        (make_row([10, 300, 10], id="x"), ("'x'", "id 300", "vocabulary has 300")),
        (make_row([10, 11, 12], [-100, 11, 300], id="x"), ("'x'", "label 300", "vocabulary has 300")),
        (make_row([10, 11, 12], [-100, 11, -5], id="x"), ("'x'", "label -5", "vocabulary has 300")),
    ],
    ids=["too long", "id", "label", "negative label"],
)
@pytest.mark.parametrize("ending", ["jsonl", "safetensors"])
@pytest.mark.parametrize("part", ["train", "eval"])
def test_row_that_does_not_fit_the_model_exits_3_and_is_named(base, rows, tmp_path, row, words, ending, part):
    path = tmp_path / f"bad.{ending}"
    bad = [*make_rows([5, 6]), row]
    path = write_jsonl(path, bad) if ending == "jsonl" else save_rows(path, bad)
    with pytest.raises(DataError) as caught:
        if part == "train":
            train(options_of(), path, str(base), str(tmp_path / "run"))
        else:
            train(options_of(f"eval_data={path}"), rows, str(base), str(tmp_path / "run"))
    assert caught.value.code == Exit.DATA
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("ending", ["jsonl", "safetensors"])
def test_no_rows_at_all_exit_3(base, tmp_path, ending):
    path = write_jsonl(tmp_path / "r.jsonl", []) if ending == "jsonl" else save_rows(tmp_path / "r.safetensors", [])
    with pytest.raises(DataError, match="no rows"):
        train(options_of(), path, str(base), str(tmp_path / "run"))


@pytest.mark.parametrize(
    "silent",
    [
        make_row([10, 11], [-100, -100]),
        make_row([10, 11], [10, -100]),
        make_row([10, 11], loss_weight=[0.0, 0.0]),
        make_row([10]),
    ],
    ids=["no label", "first token only", "weight 0", "one token"],
)
def test_rows_without_a_trained_token_exit_3(base, tmp_path, silent):
    path = save_rows(tmp_path / "r.safetensors", [silent, silent])
    with pytest.raises(DataError, match="no token of any row is trained"):
        train(options_of(), path, str(base), str(tmp_path / "run"))


@pytest.mark.parametrize("ending", ["jsonl", "safetensors"])
@pytest.mark.parametrize("part", ["train", "eval"])
def test_rows_of_another_tokenizer_exit_2(base, rows, tmp_path, ending, part):
    other = make_rows([5, 6], tokenizer="0123456789ab")
    path = tmp_path / f"r.{ending}"
    path = write_jsonl(path, other) if ending == "jsonl" else save_rows(path, other)
    with pytest.raises(UsageError, match="0123456789ab"):
        if part == "train":
            train(options_of(), path, str(base), str(tmp_path / "run"))
        else:
            train(options_of(f"eval_data={path}"), rows, str(base), str(tmp_path / "run"))


def test_failed_stage_before_it_is_refused_with_exit_3(base, tmp_path):
    lines = [*make_rows([5, 6]), {"sft_error": {"code": 3, "message": "line 7: not JSON"}}]
    with pytest.raises(DataError, match="line 7: not JSON"):
        train(options_of(), write_jsonl(tmp_path / "r.jsonl", lines), str(base), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("name", ["none.jsonl", "none.safetensors"])
def test_missing_file_exits_2(base, rows, tmp_path, name):
    with pytest.raises(UsageError, match=name):
        train(options_of(), str(tmp_path / name), str(base), str(tmp_path / "run"))
    with pytest.raises(UsageError, match=name):
        train(options_of(f"eval_data={tmp_path / name}"), rows, str(base), str(tmp_path / "run"))


def test_folder_that_holds_something_else_exits_2(base, rows, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        train(options_of(), rows, str(base), str(tmp_path / "home"))


def test_run_is_not_trained_into_the_model_it_starts_from(base, rows, tmp_path):
    run = str(tmp_path / "run")
    first = train(options_of(), rows, str(base), run)
    with pytest.raises(UsageError, match="-o"):
        train(options_of(), rows, run, run)
    assert artifacts.file_fingerprint(tmp_path / "run" / "model" / "model.safetensors") == first.sha256
    second = train(options_of(), rows, run, str(tmp_path / "second"))
    assert second.sha256 != first.sha256


@pytest.mark.parametrize("device", ["warp", "cuda:99", "-1"])
def test_device_that_is_not_there_exits_2(base, rows, tmp_path, device):
    with pytest.raises(UsageError, match=f"device '{device}'"):
        train(options_of(f"device={device!r}"), rows, str(base), str(tmp_path / "run"))


# ---- the stop set


def test_stop_set_is_the_special_tokens_that_end_trained_turns(tmp_path):
    ended = make_row([7, 8, 9, 2], [-100, -100, 9, 2], turns=[[0, 2, "user", 0], [2, 4, "assistant", 1]])
    followed = make_row([7, 9, 3, 5, 7], [-100, 9, 3, 5, -100], turns=[[0, 1, "user", 0], [1, 3, "assistant", 1]])
    untrained = make_row([7, 8, 4], [-100, 8, -100], turns=[[1, 3, "assistant", 0]])
    plain = make_row([7, 8, 6], [-100, 8, 6])
    for some, expected in (([ended], [2]), ([followed], [3]), ([untrained], []), ([plain, ended], [2, 6])):
        path = save_rows(tmp_path / "rows.safetensors", some)
        assert trained_stops(RowFile(path), {2, 3, 4, 5, 6}) == expected
