"""Which parameter gets which optimiser, the learning rate over a run, and optimizer state there and back."""

from itertools import pairwise

import pytest
import torch
from model_fixtures import CPU, make_model, make_rows

from sftcli import recipe
from sftcli.model import optim
from sftcli.model.optim import build, load_state_tensors, lr_share, set_lr, state_tensors, state_to_come, step
from sftcli.model.shards import TensorFiles
from sftcli.model.tensorfile import write_tensors
from sftcli.model.training import accumulate

KINDS = ("constant", "linear", "cosine", "wsd")


def names_of(model, params):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in params}


@pytest.mark.parametrize("preset", ["llama", "gpt2"])
def test_decay_acts_on_matrices_and_never_on_norms_and_biases(preset, tmp_path):
    model = make_model(tmp_path / "m", preset)
    (adamw,) = build(model, recipe.AdamW(weight_decay=0.3), 1e-3)
    decayed, rest = adamw.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in rest["params"])
    both = names_of(model, decayed["params"]) | names_of(model, rest["params"])
    assert both == {name for name, _ in model.named_parameters()}
    expected = {"norm.weight", "blocks.0.attention_norm.weight"} | (
        {"blocks.0.mlp.up.bias"} if preset == "gpt2" else set()
    )
    assert expected <= names_of(model, rest["params"])


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_matrices_of_blocks_only(tied, tmp_path):
    model = make_model(tmp_path / "m", "gpt2", tied=tied)
    adamw, muon = build(model, recipe.Muon(), 1e-3)
    taken = names_of(model, [p for group in muon.param_groups for p in group["params"]])
    matrices = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down")
    assert taken == {f"blocks.{n}.{name}.weight" for n in range(3) for name in matrices}
    left = names_of(model, [p for group in adamw.param_groups for p in group["params"]])
    assert {"embedding.weight", "position.weight"} <= left
    assert ("head.weight" in left) == (not tied)
    assert taken | left == {name for name, _ in model.named_parameters()}
    assert not taken & left


def test_frozen_parameters_are_left_out(tmp_path):
    model = make_model(tmp_path / "m", "llama")
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("blocks.2.attention.q")
    for options in (recipe.AdamW(), recipe.Muon()):
        (only,) = build(model, options, 1e-3)
        assert names_of(model, [p for g in only.param_groups for p in g["params"]]) == {"blocks.2.attention.q.weight"}


# ---- the learning rate


def shares(steps, **options):
    schedule = recipe.Schedule(**options)
    return [lr_share(step, steps, schedule) for step in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_run_of_any_length_reaches_the_peak_and_is_never_beyond(kind, warmup, steps):
    for decay in (0.0, 0.2, 1.0):
        found = shares(steps, kind=kind, warmup=warmup, decay=decay)
        assert max(found) == pytest.approx(1)
        assert min(found) > 0


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_long_run_ends_near_the_floor(kind, floor):
    found = shares(1000, kind=kind, floor=floor)
    assert floor < found[-1] < floor + 0.01
    assert shares(1000, kind="constant", floor=floor)[-1] == 1


def test_warmup_rises_evenly_and_the_rest_never_rises():
    for kind in KINDS:
        found = shares(100, kind=kind, warmup=0.1)
        assert found[:11] == pytest.approx([(i + 1) / 11 for i in range(11)])
        assert all(later <= earlier for earlier, later in pairwise(found[10:]))


def test_shapes_have_the_values_written_by_hand():
    assert shares(4, kind="linear", warmup=0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert shares(4, kind="cosine", warmup=0) == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    assert shares(5, kind="wsd", warmup=0, decay=0.4) == pytest.approx([1, 1, 1, 2 / 3, 1 / 3])
    assert shares(4, kind="linear", warmup=0, floor=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])


# ---- state


@pytest.mark.parametrize("options", [recipe.AdamW(lr=1e-2), recipe.Muon(lr=1e-2)], ids=["adamw", "muon"])
def test_state_put_back_continues_bit_for_bit(options, tmp_path):
    rows = make_rows([6, 9, 5])

    def train(model, optimizers):
        accumulate(model, rows, 99, CPU)
        step(optimizers)
        model.zero_grad()

    model = make_model(tmp_path / "a", "llama")
    optimizers = build(model, options, 1e-2)
    for _ in range(3):
        train(model, optimizers)
    state = {name: value.clone() for name, value in state_tensors(model, optimizers).items()}
    assert {name.rpartition("/")[0] for name in state} == {name for name, _ in model.named_parameters()}

    other = make_model(tmp_path / "b", "llama")
    other.load_state_dict(model.state_dict())
    fresh = build(other, options, 1e-2)
    unstated = make_model(tmp_path / "c", "llama")
    unstated.load_state_dict(model.state_dict())
    write_tensors(tmp_path / "state", state)
    load_state_tensors(other, fresh, TensorFiles([tmp_path / "state"]))
    again = state_tensors(other, fresh)
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)
    train(model, optimizers)
    train(other, fresh)
    train(unstated, build(unstated, options, 1e-2))
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(other.named_parameters())[name])
    assert not torch.equal(model.blocks[0].mlp.up.weight, unstated.blocks[0].mlp.up.weight)


def test_learning_rate_is_set_in_every_group_of_every_optimiser(tmp_path):
    optimizers = build(make_model(tmp_path / "m", "gpt2"), recipe.Muon(), 1e-3)
    set_lr(optimizers, 7e-5)
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {7e-5}


# ---- offloaded


@pytest.mark.parametrize("options", [recipe.AdamW(lr=1e-2), recipe.Muon(lr=1e-2)], ids=["adamw", "muon"])
def test_offloaded_steps_have_the_bits_of_others_and_their_state_stays_where_it_is(options, tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "BUCKET", 3000)
    rows = make_rows([6, 9, 5])
    models = {name: make_model(tmp_path / name, "llama") for name in ("here", "there")}
    optimizers = {
        "here": build(models["here"], options, 1e-2),
        "there": build(models["there"], options, 1e-2, offload=True),
    }
    assert len(optimizers["there"]) > len(optimizers["here"]) + 2
    for optimizer in optimizers["there"]:
        numbers = [p.numel() for group in optimizer.param_groups for p in group["params"]]
        assert len(numbers) == 1 or sum(numbers) <= 3000
    places = []
    for _ in range(3):
        for name, model in models.items():
            accumulate(model, rows, 99, CPU)
            step(optimizers[name])
            model.zero_grad()
        state = state_tensors(models["there"], optimizers["there"])
        places.append({name: value.data_ptr() for name, value in state.items() if value.ndim})
        expected = state_tensors(models["here"], optimizers["here"])
        assert set(state) == set(expected)
        assert all(torch.equal(state[name], expected[name]) for name in state)
    assert places[0] == places[1] == places[2]
    for a, b in zip(models["here"].parameters(), models["there"].parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_goes_on_offloaded_and_back(tmp_path):
    rows, options = make_rows([6, 9, 5]), recipe.AdamW(lr=1e-2)
    weights = []
    for ways in ((False, False), (False, True), (True, False)):
        model = make_model(tmp_path / f"m{len(weights)}", "llama")
        for number, offload in enumerate(ways):
            optimizers = build(model, options, 1e-2, offload=offload)
            if number:
                load_state_tensors(model, optimizers, TensorFiles([tmp_path / "state"]))
            for _ in range(2):
                accumulate(model, rows, 99, CPU)
                step(optimizers)
                model.zero_grad()
            write_tensors(tmp_path / "state", state_tensors(model, optimizers))
        weights.append([p.detach().clone() for p in model.parameters()])
    for others in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], others, strict=True))


def test_state_that_is_still_to_come_is_all_of_it_until_the_first_step_and_none_offloaded(tmp_path):
    model, rows = make_model(tmp_path / "m", "llama"), make_rows([6])
    numbers = [p.numel() for p in model.parameters()]
    optimizers = build(model, recipe.AdamW(), 1e-2)
    assert state_to_come(optimizers) == 8 * sum(numbers)
    accumulate(model, rows, 99, CPU)
    step(optimizers)
    assert state_to_come(optimizers) == 0
    assert state_to_come(build(model, recipe.AdamW(), 1e-2, offload=True)) == 0


def test_offload_is_ddps():
    with pytest.raises(ValueError, match="optimizer_offload is for ddp"):
        recipe.Train(parallel="fsdp", optimizer_offload=True)


# ---- Muon


SHAPES = [(12, 20), (20, 12), (12, 20), (8, 8), (12, 20)]


@pytest.mark.parametrize("together", [1, 1 << 22])
def test_muon_of_ours_equals_that_of_torch_in_float32(monkeypatch, together):
    monkeypatch.setattr(optim, "TOGETHER", together)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # what torch's rounds to
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    flags = {"lr": 1e-2, "weight_decay": 0.3, "momentum": 0.8, "adjust_lr_fn": "match_rms_adamw"}
    makes = {optim.Muon: ours, torch.optim.Muon: theirs}
    optimizers = [make([{"params": ps[:3]}, {"params": ps[3:], "lr": 3e-2}], **flags) for make, ps in makes.items()]
    for _ in range(4):
        for a, b, shape in zip(ours, theirs, SHAPES, strict=True):
            a.grad = torch.randn(shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (3, 16, 24)])
def test_orthogonal_matrices_have_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x @ torch.linspace(1, 2, shape[-1]).diag()
    values = torch.linalg.svdvals(optim.orthogonal(x))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert float(torch.linalg.svdvals(x).min()) > 1.3


def test_parameters_without_gradient_stay_as_they_are_under_muon():
    kept, learns = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    learns.grad = torch.eye(4)
    optim.Muon([kept, learns], lr=1.0).step()
    assert torch.equal(kept, torch.ones(4, 4)) and not torch.equal(learns, kept)
