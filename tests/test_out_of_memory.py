"""A step that does not fit: tried before the first step, with smaller forwards then, and told if it comes later."""

import json

import pytest
import torch
from model_fixtures import CPU, make_rows, metrics, model_folder, model_of, write_turns
from test_training import LENGTHS, options_of, same_weights

from sftcli import manifest, reading
from sftcli.errors import Exit, OutOfMemory
from sftcli.model import optim, probe
from sftcli.model.batches import make_batch, micro_batches
from sftcli.model.gpt import GPT
from sftcli.model.memory import FLOAT, activations_per_token, forward_tokens
from sftcli.model.probe import available, fitting_tokens, longest_forwards
from sftcli.model.training import Plan
from sftcli.stages.train import train

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.fixture
def base(tmp_path):
    return model_folder(tmp_path / "base", "llama", layers=2)


@pytest.fixture
def rows(tmp_path, base):
    return write_turns(base, tmp_path / "rows.safetensors", LENGTHS)  # and one token more each: 6 to 21


@pytest.fixture
def small(monkeypatch):
    """Let a forward of more than so many tokens fail; `tried` are the tokens of every forward."""

    def limited(limit, error=ERRORS[0], after=0):
        tried, real = [], GPT.forward

        def forward(self, batch, *rest):
            tried.append(len(batch.ids))
            if len(batch.ids) > limit and len(tried) > after:
                raise error
            return real(self, batch, *rest)

        monkeypatch.setattr(GPT, "forward", forward)
        monkeypatch.setattr(probe, "AMPLE", float("inf"))  # a CPU that is never sure
        return tried

    return limited


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_forwards_that_do_not_fit_are_halved_and_the_steps_stay_the_same(base, rows, tmp_path, small, error, capsys):
    settings = ("batch_rows=4", "dropout=0.1", "schedule.kind=constant")
    train(options_of(*settings), rows, str(base), str(tmp_path / "whole"))
    with_less = options_of(*settings, "micro_batch_tokens=60")
    tried = small(30, error)
    train(with_less, rows, str(base), str(tmp_path / "halved"))
    largest = tried[0]
    assert 30 < largest <= 60 and all(tokens <= 30 for tokens in tried[1:])
    assert "the steps stay the same" in capsys.readouterr().err
    told = json.loads((tmp_path / "halved" / "run.json").read_text())
    assert told["micro_batch_tokens"] == largest // 2
    train(
        options_of(*settings, f"micro_batch_tokens={largest // 2}"), rows, str(base), str(tmp_path / "asked")
    )  # the same from the beginning: bit for bit
    assert metrics(tmp_path / "halved") == metrics(tmp_path / "asked")


def test_losses_of_smaller_forwards_are_those_of_the_whole_step(base, rows, tmp_path, small):
    train(options_of("batch_rows=6"), rows, str(base), str(tmp_path / "whole"))
    small(25)
    train(options_of("batch_rows=6"), rows, str(base), str(tmp_path / "halved"))
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "halved"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert (a["tokens"], a["trained"]) == (b["tokens"], b["trained"])


def test_a_row_that_fits_nowhere_exits_7_with_sizes_and_flags_before_a_step(base, rows, tmp_path, small):
    tried = small(20)  # the longest row has 21 tokens
    with pytest.raises(OutOfMemory) as caught:
        train(options_of(), rows, str(base), str(tmp_path / "run"))
    assert caught.value.code == Exit.MEMORY
    assert (
        "1 row(s)" in str(caught.value) and "the longest row 21" in str(caught.value) and "bytes" in str(caught.value)
    )
    assert all(flag in caught.value.hint for flag in ("gradient_checkpointing", "dtype=bfloat16", "--max-length"))
    assert tried[-1] == 21 and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_memory_that_ends_later_exits_7_keeps_the_checkpoint_and_smaller_forwards_go_on(
    base, rows, tmp_path, small, monkeypatch
):
    settings = ("batch_rows=4", "checkpoint_every=1", "keep=99")
    whole = train(options_of(*settings), rows, str(base), str(tmp_path / "whole"))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        small(0, after=4)  # the probe and three steps
        with pytest.raises(OutOfMemory, match=r"4 row\(s\), forwards of up to") as caught:
            train(options_of(*settings), rows, str(base), str(run))
        assert "micro_batch_tokens=" in caught.value.hint
        patch.undo()
    monkeypatch.undo()
    assert [p.name for p in manifest.checkpoints(run)] == [f"step-{n:06}" for n in (1, 2, 3)]
    changed = options_of(*settings, "micro_batch_tokens=30", "gradient_checkpointing=true")
    outcome = train(changed, rows, str(base), str(run), resumed=True)
    assert outcome.loss == pytest.approx(whole.loss, abs=1e-4)


def test_a_resumed_run_is_tried_again(base, rows, tmp_path, small):
    settings = ("checkpoint_every=1", "keep=99")
    train(options_of(*settings), rows, str(base), str(tmp_path / "run"))
    for folder in manifest.checkpoints(tmp_path / "run")[3:]:
        folder.rename(folder.with_name(f".tmp-{folder.name}"))
    tried = small(30)
    train(options_of(*settings), rows, str(base), str(tmp_path / "run"), resumed=True)
    assert tried[0] > 30 and all(tokens <= 30 for tokens in tried[1:])


# ---- what is tried, and what it leaves behind


@pytest.mark.parametrize("settings", [("batch_rows=5",), ("batch_rows=null", "batch_tokens=50")], ids=str)
@pytest.mark.parametrize("limit", [1, 15, 30, 1000])
def test_no_forward_of_a_run_is_longer_than_those_that_are_tried(settings, limit):
    options, some = options_of(*settings), make_rows(LENGTHS)
    plan = Plan(LENGTHS, options)
    found = longest_forwards(plan, limit, 0)
    made = [part for rows, _, _ in plan.from_step(0) for part in micro_batches([some[i] for i in rows], limit)]
    tokens = [sum(len(row.input_ids) for row in part) for part in made]
    assert max(sum(LENGTHS[i] for i in part) for part in found) == max(tokens)
    assert max(LENGTHS[i] for part in found for i in part) == max(LENGTHS)


def test_what_is_tried_changes_neither_weights_nor_random_numbers(base, monkeypatch):
    monkeypatch.setattr(probe, "AMPLE", float("inf"))
    model, some, options = model_of(base), make_rows(LENGTHS), options_of("dropout=0.5", "loss.neftune=5")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers, state = optim.build(model, options.optimizer, 1e-2), torch.get_rng_state()
    plan = Plan(LENGTHS, options)
    assert fitting_tokens(model, optimizers, some.__getitem__, plan, options, CPU) == forward_tokens(
        options, CPU.device.type
    )
    assert same_weights(before, dict(model.named_parameters()))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and not optimizers[0].state


def test_a_cpu_with_ample_memory_tries_nothing_and_one_with_too_little_does_not_dare(base, monkeypatch, small):
    model, some, options = model_of(base), make_rows(LENGTHS), options_of("batch_rows=12")
    plan, optimizers = Plan(LENGTHS, options), optim.build(model, options.optimizer, 1e-2)
    tried = small(1000)
    monkeypatch.setattr(probe, "AMPLE", 1.5)

    def fitted(free):
        monkeypatch.setattr(probe, "available", lambda: free)
        return fitting_tokens(model, optimizers, some.__getitem__, plan, options, CPU)

    needed = {n: probe.needed_bytes(model, n, options) for n in (sum(LENGTHS), sum(LENGTHS) // 2)}
    moments = 8 * sum(p.numel() for p in model.parameters())
    assert needed[sum(LENGTHS)] > needed[sum(LENGTHS) // 2]
    assert fitted(3 * (needed[sum(LENGTHS)] + moments)) == forward_tokens(options, CPU.device.type) and tried == []
    monkeypatch.setattr(probe, "AMPLE", 9)
    assert fitted(needed[sum(LENGTHS)] + moments - 1) == sum(LENGTHS) // 2
    assert sum(LENGTHS) not in tried and tried  # the halves were tried, the whole was not
    with pytest.raises(OutOfMemory):
        fitted(1000)


def test_growth_of_the_process_counts_on_a_cpu(base, monkeypatch, small):
    """Less than what is free is needed by count, more by measure."""
    model, some, options = model_of(base), make_rows(LENGTHS), options_of("batch_rows=12")
    small(1000)
    free = 1.2 * (probe.needed_bytes(model, sum(LENGTHS), options) + 8 * sum(p.numel() for p in model.parameters()))
    monkeypatch.setattr(probe, "available", lambda: free)
    real, hoard = GPT.forward, []

    def forward(self, batch, *rest):
        if len(batch.ids) > 70:
            hoard.append(torch.ones(int(free) // 4 + (1 << 20)))
        return real(self, batch, *rest)

    monkeypatch.setattr(GPT, "forward", forward)
    plan = Plan(LENGTHS, options)
    assert fitting_tokens(model, [], some.__getitem__, plan, options, CPU) == sum(LENGTHS) // 2


def test_available_memory_is_that_of_the_machine_and_of_its_container(tmp_path, monkeypatch):
    assert 0 < available() < 1 << 50
    stat, limit = tmp_path / "memory.stat", tmp_path / "memory.max"
    stat.write_text("file 5000\nanon 300000\ninactive_anon 7\n")
    monkeypatch.setattr(probe, "CGROUPS", [(str(limit), str(stat), "anon")])
    for text, expected in (("1000000\n", 700000), ("max\n", None)):
        limit.write_text(text)
        assert available() == expected or (expected is None and available() > 1000000)


def test_the_run_that_fits_says_nothing_of_memory(base, rows, tmp_path, capsys):
    train(options_of(), rows, str(base), str(tmp_path / "run"))
    assert "memory" not in capsys.readouterr().err
    assert "micro_batch_tokens" not in reading.read_json(tmp_path / "run" / "run.json")["options"]


@pytest.mark.parametrize("preset", ["llama", "gpt2"])
def test_what_the_backward_pass_keeps_is_what_is_counted(preset, tmp_path):
    model = model_of(model_folder(tmp_path / preset, preset, layers=6, width=64, heads=4, mlp_width=96)).train()
    kept = {p.data_ptr(): 0 for p in model.parameters()}

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes() // FLOAT)
        return tensor

    batch = make_batch(make_rows([32] * 4))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(batch.ids, batch.positions, batch.attention)
    counted = len(batch.ids) * activations_per_token(model.config, False)
    assert sum(kept.values()) + hidden.numel() == pytest.approx(counted, rel=0.06)
