"""LoRA by itself and in `sft train`: vectors, what trains and what stays, resume, generate, merge."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from model_fixtures import (
    CPU,
    END,
    PRESETS,
    assert_equal_gradients,
    empty_folder,
    gradients,
    make_rows,
    metrics,
    model_folder,
    model_of,
    random_ids,
    row_logits,
    steps_written,
    write_jsonl,
    write_turns,
)
from torch import nn

from sftcli import artifacts
from sftcli.errors import CheckpointError, UsageError
from sftcli.model import optim
from sftcli.model.adapters import lora
from sftcli.model.adapters.peft import ADAPTER_WEIGHTS, apply, open_model
from sftcli.model.attention import Group, RowAttention
from sftcli.model.checkpoint import load_model, open_folder, save_model
from sftcli.model.families import Stored, family_of
from sftcli.model.gpt import GPT
from sftcli.model.memory import estimate
from sftcli.model.training import Plan, accumulate, train_steps
from sftcli.recipe import AdamW, Lora, Muon, Train
from sftcli.recipefile import apply_settings, load_recipe, parse
from sftcli.rowfile import RowFile
from sftcli.stages.train import train
from sftcli.stages.training_job import make_job
from sftcli.text.folder import load_codec

LENGTHS = [12, 7, 20, 9, 15, 5, 11, 18, 6]
EVERYTHING = Lora(rank=4, bias="all", dora=True, modules_to_save=["lm_head"])
IDS = random_ids(17, 3)


def options_of(*settings):
    given = ["adapter=lora", "adapter.rank=4", "batch_rows=3", "epochs=2", "optimizer.lr=1e-2", "sample_rows=0"]
    return parse(Train, apply_settings({}, [*given, *settings]), section="train")


@pytest.fixture
def base(tmp_path):
    return model_folder(tmp_path / "base", "llama", layers=2)


@pytest.fixture
def rows(tmp_path, base):
    return write_turns(base, tmp_path / "rows.safetensors", LENGTHS)


def adapted(path, options):
    """A folder's model, frozen but for an adapter."""
    folder = open_folder(path)
    model = load_model(folder)
    lora.adapt(model, folder.family, options, seed=1)
    return model


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---- the layer


@pytest.fixture
def lr1():
    """The layer of the vectors: W 3 x 2, A [[1, -1]], B [[2], [.5], [-1]], alpha / r = 4."""
    linear = nn.Linear(2, 3, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    layer = lora.LoraLinear(linear, nn.Parameter(torch.tensor([[1.0, -1]])), 4.0, 0.0, dora=False)
    layer.lora_B.data = torch.tensor([[2], [0.5], [-1]])
    return layer


def test_vector_of_a_linear_layer(lr1):
    x = torch.tensor([1.0, 3])
    assert nn.functional.linear(x, lr1.weight).tolist() == [7, 15, 23]
    assert lr1(x).tolist() == [-9, 11, 31]
    assert lr1.merged().tolist() == [[9, -6], [5, 2], [1, 10]]


def test_vector_of_a_transposed_layer(lr1):
    stored = Stored("c_attn.weight", ("q.weight",), transposed=True)
    assert stored.transposed and stored.join([lr1.merged()]).T.tolist() == [[9, 5, 1], [-6, 2, 10]]


def test_scale_is_alpha_over_r_or_over_its_root():
    assert lora.rank_and_scale(Lora(rank=4, alpha=8), "a.q_proj") == (4, 2.0)
    assert lora.rank_and_scale(Lora(rank=4, alpha=8, rslora=True), "a.q_proj") == (4, 4.0)
    patterns = Lora(rank=4, alpha=8, rank_pattern={"q_proj": 2, ".*": 16}, alpha_pattern={"1.q_proj": 3})
    assert lora.rank_and_scale(patterns, "a.1.q_proj") == (2, 1.5)
    assert lora.rank_and_scale(patterns, "a.q_proj") == (2, 4.0)
    assert lora.rank_and_scale(patterns, "a.xq_proj") == (16, 0.5)


def test_dropout_is_on_the_input_of_the_update_only(base):
    model = adapted(base, Lora(rank=4, dropout=0.5))
    ids, plain = torch.tensor(IDS), row_logits(model, IDS)
    model.train()
    assert torch.equal(hidden_logits(model, ids), plain)  # B is 0: what dropout changes counts nothing
    shake(model)
    model.train()
    torch.manual_seed(1)
    assert not torch.equal(hidden_logits(model, ids), hidden_logits(model, ids))


def hidden_logits(model, ids):
    return model.logits(model.hidden(ids, torch.arange(len(ids)), RowAttention([Group(1, len(ids))])))


@torch.no_grad()
def shake(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    for _, p in model.named_parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


# ---- the model


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("options", [Lora(), EVERYTHING], ids=["plain", "everything"])
def test_logits_before_the_first_step_are_the_bases_bit_for_bit(preset, options, tmp_path):
    path = model_folder(tmp_path / "m", preset)
    assert torch.equal(row_logits(adapted(path, options), IDS), row_logits(model_of(path), IDS))


def test_a_is_drawn_from_the_seed_within_its_bound(base):
    folder = open_folder(base)
    drawn = []
    for seed in (1, 1, 2):
        model = load_model(folder)
        lora.adapt(model, folder.family, Lora(rank=4), seed)
        drawn.append({n: p.detach() for n, p in model.named_parameters() if n.endswith("lora_A")})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    for name, a in drawn[0].items():
        bound = a.shape[1] ** -0.5  # Kaiming uniform, a = sqrt 5
        assert 0.8 * bound < float(a.abs().max()) <= bound and not torch.equal(a, drawn[2][name])


def test_gpt2_small_with_c_attn_and_rank_4_trains_147456_numbers():
    config = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
    family = family_of(config)
    with torch.device("meta"):
        model = GPT(family.read_config(config))
        lora.adapt(model, family, Lora(rank=4, targets=["c_attn"]), seed=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 147_456
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + 147_456


@pytest.mark.parametrize("preset", PRESETS)
def test_first_gradient_reaches_only_b(preset, tmp_path):
    model = adapted(model_folder(tmp_path / "m", preset), Lora(rank=4))
    accumulate(model, make_rows([9, 5]), 99, CPU)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            assert float(p.grad.abs().max()) > 0, name
        elif name.endswith("lora_A"):
            assert float(p.grad.abs().max()) == 0, name
        else:
            assert p.grad is None and not p.requires_grad, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_micro_batch_or_many_give_equal_gradients(base, checkpointing):
    found = []
    for micro in (999, 1):
        model = adapted(base, EVERYTHING)
        shake(model)
        model.train()
        model.gradient_checkpointing = checkpointing and micro == 1
        accumulate(model, make_rows(LENGTHS), micro, CPU)
        found.append(gradients(model))
    assert set(found[0]) == trained_names(model)
    assert_equal_gradients(found[1], found[0], 1e-5)


def test_gradients_equal_those_of_plain_layers_with_the_merged_weights(base):
    """d/dB = scale * (dL/dW) A^T and d/dA = scale * B^T (dL/dW), where W is the weight of a plain model."""
    options = Lora(rank=4, alpha=6)
    model = adapted(base, options)
    shake(model)
    plain = adapted(base, options)
    plain.load_state_dict(model.state_dict())
    lora.merge(plain)
    plain.requires_grad_(True)
    for one in (model, plain):
        accumulate(one, make_rows([9, 5]), 99, CPU)
    for name, layer in model.named_modules():
        if isinstance(layer, lora.LoraLinear):
            whole = plain.get_parameter(f"{name}.weight").grad
            torch.testing.assert_close(layer.lora_B.grad, 1.5 * whole @ layer.lora_A.T, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(layer.lora_A.grad, 1.5 * layer.lora_B.T @ whole, atol=1e-5, rtol=1e-4)


def test_dora_norms_kept_while_answering_are_those_of_training(base):
    model = adapted(base, Lora(rank=4, dora=True))
    row_logits(model, IDS)  # norms of the start are kept
    model.train()
    shake(model)
    fresh = adapted(base, Lora(rank=4, dora=True))
    fresh.load_state_dict(model.state_dict())
    ids = torch.tensor(IDS)
    assert torch.equal(hidden_logits(model, ids), hidden_logits(fresh, ids))  # both learn: `fresh` keeps none yet
    expected = row_logits(fresh, IDS)
    assert torch.equal(row_logits(model, IDS), expected)
    assert torch.equal(row_logits(model, IDS), expected)


# ---- what trains


TRAINED = {
    "all-linear": (Lora(), {"q", "k", "v", "o", "gate", "up", "down"}, {0, 1}),
    "a list": (Lora(targets=["q_proj", "self_attn.v_proj"]), {"q", "v"}, {0, 1}),
    "a regex": (Lora(targets=r"model\.layers\.1\..*_proj"), {"q", "k", "v", "o", "gate", "up", "down"}, {1}),
    "layers": (Lora(targets=["down_proj"], layers=[0]), {"down"}, {0}),
    "a saved layer has no update": (Lora(modules_to_save=["up_proj"], targets=["up_proj", "q_proj"]), {"q"}, {0, 1}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_targets_choose_layers(base, case):
    options, leaves, layers = TRAINED[case]
    names = [name.split(".") for name in trained_names(adapted(base, options)) if name.endswith("lora_B")]
    assert {name[-2] for name in names} == leaves and {int(name[1]) for name in names} == layers


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("adapter.targets=[q_proj,w_proj]",), "'w_proj'"),
        (("adapter.targets=q_proj",), "regular expression"),
        (("adapter.targets=[q_proj]", "adapter.layers=[0,2]"), "0 to 1"),
        (("adapter.modules_to_save=[score]",), "'score'"),
    ],
)
def test_unknown_names_exit_2_and_name_what_there_is(base, rows, tmp_path, settings, told):
    with pytest.raises(UsageError, match=told) as caught:
        train(options_of(*settings), rows, str(base), str(tmp_path / "run"))
    if "layers" not in settings[-1]:
        assert "q_proj, k_proj" in caught.value.hint or "embed_tokens" in caught.value.hint


@pytest.mark.parametrize(
    "settings",
    [
        ("adapter.targets=(",),
        ("adapter.targets=.*", "adapter.layers=[0]"),
        ("adapter=null", "base_dtype=bfloat16"),
        ("adapter.kind=ia3",),
        ("adapter.r=3",),
        ("adapter.rank=0",),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(settings):
    with pytest.raises(UsageError, match=r"train"):
        options_of(*settings)


def test_biases_and_modules_to_save_train(tmp_path):
    path = model_folder(tmp_path / "m", "gpt2", layers=1, tied=False)
    only = trained_names(adapted(path, Lora(targets=["c_attn"], bias="lora_only")))
    assert {name for name in only if "lora" not in name} == {f"blocks.0.attention.{n}.bias" for n in "qkv"}
    every = trained_names(adapted(path, Lora(targets=["c_attn"], bias="all", modules_to_save=["lm_head", "wte"])))
    assert {name for name in every if "lora" not in name} == {
        *(f"blocks.0.attention.{n}.bias" for n in "qkvo"),
        *("blocks.0.mlp.up.bias", "blocks.0.mlp.down.bias", "blocks.0.attention_norm.bias", "blocks.0.mlp_norm.bias"),
        *("norm.bias", "head.weight", "embedding.weight"),
    }


def test_weight_decay_and_updates_leave_the_base_alone(base):
    model = adapted(base, Lora(rank=4))
    some = make_rows([6, 9, 4])
    options = options_of("optimizer.weight_decay=0.9", "epochs=3")
    plan = Plan([6, 9, 4], options)
    optimizers = optim.build(model, options.optimizer, 1e-2)
    for _ in train_steps(model, optimizers, some.__getitem__, plan, options, CPU, 1e-2):
        pass
    untouched = dict(model_of(base).named_parameters())
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in untouched.items())
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_lora_plus_gives_b_a_multiple_of_the_learning_rate(base, kind):
    model = adapted(base, Lora(rank=4, modules_to_save=["norm"]))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = optim.build(model, kind(), 1e-3, lora_plus=16)
    for lr in (1e-3, 2e-4):
        optim.set_lr(optimizers, lr)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            for p in group["params"]:
                assert group["lr"] == pytest.approx(lr * (16 if names[id(p)].endswith("lora_B") else 1))


# ---- sft train


def tensors(run):
    return safetensors.torch.load_file(Path(run, "adapter", ADAPTER_WEIGHTS))


def test_run_leaves_an_adapter_and_the_base_as_it_was(base, rows, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    run = tmp_path / "run"
    outcome = train(options_of(), rows, str(base), str(run))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert {p.name for p in run.iterdir()} == {"run.json", "metrics.jsonl", "checkpoints", "adapter"}
    assert {p.name for p in (run / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "generation_config.json",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert outcome.model == str(run / "adapter")
    assert outcome.sha256 == artifacts.file_fingerprint(run / "adapter" / ADAPTER_WEIGHTS)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and "sha256" not in config
    assert json.loads((run / "adapter" / "generation_config.json").read_text()) == {"eos_token_id": [END]}
    assert "base" in json.loads((run / "run.json").read_text())
    saved = safetensors.torch.load_file(next((run / "checkpoints").glob("step-*")) / "trained.safetensors")
    assert saved and all(name.endswith(("lora_A", "lora_B")) for name in saved)
    losses = [line["loss"] for line in metrics(run)]
    assert losses[-1] < losses[0]


def test_learning_rate_of_an_adapter_is_2e_4_where_none_is_given(base, rows, tmp_path):
    train(parse(Train, {"adapter": "lora", "max_steps": 1, "sample_rows": 0}), rows, str(base), str(tmp_path / "run"))
    assert metrics(tmp_path / "run")[0]["lr"] == pytest.approx(2e-4)


@pytest.mark.parametrize(
    "settings",
    [("adapter.dropout=0.2",), ("adapter.dora=true",), ("gradient_checkpointing=true",), ("optimizer.kind=muon",),
     ("adapter.modules_to_save=[lm_head,norm]", "adapter.lora_plus=4"), ("base_dtype=bfloat16",)],
    ids=str,
)  # fmt: skip
def test_killed_run_resumes_to_the_weights_of_the_whole_one(base, rows, tmp_path, settings, monkeypatch):
    options = options_of("checkpoint_every=1", "keep=9", *settings)
    whole = train(options, rows, str(base), str(tmp_path / "run"))
    expected, log = tensors(tmp_path / "run"), metrics(tmp_path / "run")
    assert all(t.dtype == torch.float32 for t in expected.values())
    (tmp_path / "run" / "adapter" / ADAPTER_WEIGHTS).unlink()
    (tmp_path / "run" / "adapter").rename(tmp_path / "gone")
    for step in (4, 5, 6):
        for path in (tmp_path / "run" / "checkpoints" / f"step-{step:06}").iterdir():
            path.unlink()
    again = train(options, rows, str(base), str(tmp_path / "run"), resumed=True)
    assert again.sha256 == whole.sha256 and metrics(tmp_path / "run") == log
    assert log[-1]["loss"] < log[0]["loss"]
    found = tensors(tmp_path / "run")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_another_rank_is_refused_by_name_and_not_called_damage(base, rows, tmp_path):
    train(options_of("max_steps=2"), rows, str(base), str(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"adapter\.rank was \d+, is 3"):
        train(options_of("max_steps=2", "adapter.rank=3"), rows, str(base), str(tmp_path / "run"), resumed=True)
    with pytest.raises(UsageError, match="adapter"):
        train(options_of("max_steps=2", "adapter=null"), rows, str(base), str(tmp_path / "run"), resumed=True)


@pytest.mark.slow
def test_process_that_is_killed_resumes_to_the_same_sha256(base, rows, tmp_path):
    settings = ("checkpoint_every=1", "epochs=30", "adapter.dropout=0.1")
    whole = train(options_of(*settings), rows, str(base), str(tmp_path / "whole"))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "sftcli", "train", rows, "-m", str(base), "-o", str(run), "--resume"]
    command += ["--adapter", "lora"]
    for setting in ("adapter.rank=4", "batch_rows=3", "optimizer.lr=1e-2", "sample_rows=0", *settings):
        command += ["--set", setting]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if steps_written(run) >= 20:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait(60) == -signal.SIGKILL
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert artifacts.file_fingerprint(run / "adapter" / ADAPTER_WEIGHTS) == whole.sha256


def test_dropout_is_drawn_from_the_seed_and_not_from_what_ran_before(base, rows, tmp_path):
    options = options_of("adapter.dropout=0.3", "max_steps=2")
    sums = [train(options, rows, str(base), str(tmp_path / name)).sha256 for name in "ab"]
    assert sums[0] == sums[1]


def test_micro_batches_change_no_step(base, rows, tmp_path):
    for name, settings in (("a", ()), ("b", ("micro_batch_tokens=1",))):
        train(options_of(*settings), rows, str(base), str(tmp_path / name))
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a.pop("rows") == b.pop("rows")
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.bfloat16, ("adapter.modules_to_save=[norm]",)),
        (torch.float16, ("adapter.targets=[q_proj]",)),
        (torch.bfloat16, ("adapter.dropout=0.2", "adapter.dora=true", "gradient_checkpointing=true")),
        (torch.bfloat16, ("adapter=prefix",)),
    ],
    ids=str,
)
def test_base_of_16_bits_is_kept_so_and_trains_to_the_bits_of_a_base_in_float32(base, tmp_path, dtype, settings):
    folder, narrow = open_folder(base), tmp_path / "narrow"
    save_model(load_model(folder), folder, narrow, dtype=dtype)
    rows = write_turns(narrow, tmp_path / "narrow.safetensors", LENGTHS)
    found = []
    for kept in ("auto", "float32"):
        options = options_of(f"base_dtype={kept}", "eval_share=0.3", "sample_rows=1", "sample_tokens=5", *settings)
        job = make_job(options, open_folder(narrow), tmp_path, RowFile(rows), rows, load_codec(narrow))
        assert job.engine.dtype == torch.float32
        for p in job.model.parameters():
            frozen = p.ndim >= 2 and not p.requires_grad and kept == "auto"
            assert p.dtype == (dtype if frozen else torch.float32)
        train(options, rows, str(narrow), str(tmp_path / kept))
        samples = (tmp_path / kept / "samples.jsonl").read_text()
        weights = artifacts.file_fingerprint(str(tmp_path / kept / "adapter" / ADAPTER_WEIGHTS))
        found.append((weights, samples, job.settings))  # a run goes on with the other
    assert found[0] == found[1]
    assert metrics(tmp_path / "auto") == metrics(tmp_path / "float32")


@pytest.mark.parametrize("odd", [torch.float32, torch.float16], ids=str)
def test_base_of_several_dtypes_is_kept_in_float32(base, rows, tmp_path, odd):
    weights = base / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    others = {n: t.to(odd if n == name else torch.bfloat16) for n, t in tensors.items()}
    safetensors.torch.save_file(others, weights, metadata={"format": "pt"})
    job = make_job(options_of(), open_folder(base), tmp_path, RowFile(rows), rows, load_codec(base))
    assert {p.dtype for p in job.model.parameters()} == {torch.float32}


def test_base_without_weights_is_refused(rows, tmp_path):
    empty = empty_folder(tmp_path / "empty", "llama", layers=2)
    with pytest.raises(UsageError, match="no weights"):
        train(options_of(), rows, str(empty), str(tmp_path / "run"))


def test_adapter_run_is_no_model_to_train_on(base, rows, tmp_path):
    train(options_of("max_steps=1"), rows, str(base), str(tmp_path / "run"))
    with pytest.raises(UsageError, match="is an adapter") as caught:
        train(options_of("max_steps=1"), rows, str(tmp_path / "run"), str(tmp_path / "next"))
    assert "sft merge" in caught.value.hint


def test_estimate_counts_what_trains(base):
    folder = open_folder(base)
    whole = estimate(folder.config, Train(), 24, folder.family)
    small = estimate(folder.config, options_of("base_dtype=bfloat16"), 24, folder.family)
    model = adapted(base, Lora(rank=4))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert whole["trained_parameters"] == whole["parameters"] and small["trained_parameters"] == trained
    assert small["parameters"] == whole["parameters"] + trained
    assert small["weights_bytes"] == 2 * whole["parameters"] + 4 * trained
    assert small["optimizer_bytes"] == 2 * small["gradients_bytes"] == 8 * trained


# ---- the commands


@pytest.fixture
def run(base, rows, tmp_path):
    """A trained adapter run whose answers are not the base's."""
    options = options_of("optimizer.lr=5e-2", "epochs=6")
    train(options, rows, str(base), str(tmp_path / "run"))
    return tmp_path / "run"


PROMPTS = [{"prompt": "Name a river.", "id": "a"}, {"prompt": "How many?", "id": "b"}]


def test_generate_asks_adapters_in_turn(sft, base, run, tmp_path):
    asked = write_jsonl(tmp_path / "q.jsonl", PROMPTS)
    short = ("--max-new-tokens", 6)
    own = sft("generate", asked, "-m", run, *short)
    bare = sft("generate", asked, "-m", base, *short)
    both = sft(
        "generate", asked, "-m", base, "--adapter", run, "--adapter", "none", "--adapter", run / "adapter", *short
    )
    assert own.code == bare.code == both.code == 0, own.err + bare.err + both.err
    assert "adapter" not in own.rows[0]
    assert [(row["adapter"], row["id"]) for row in both.rows] == [
        (name, id) for name in (str(run), "none", str(run / "adapter")) for id in "ab"
    ]
    ids = [row["completion_ids"] for row in both.rows]
    assert ids[:2] == ids[4:] == [row["completion_ids"] for row in own.rows]
    assert ids[2:4] == [row["completion_ids"] for row in bare.rows] != ids[:2]


def test_merged_model_answers_as_the_adapter_run(sft, run, base, rows, tmp_path):
    (base / "generation_config.json").write_text('{"eos_token_id": 0}')  # the adapter's own stop set counts
    assert sft("merge", run, "-o", tmp_path / "merged").code == 0
    folder, adapter = open_model(str(run))
    model = load_model(folder)
    apply(model, adapter)
    expected = row_logits(model, IDS)
    # tests/test_peft.py holds 1e-5 on models whose logits are about 1
    torch.testing.assert_close(row_logits(model_of(tmp_path / "merged"), IDS), expected, atol=2e-4, rtol=0)
    scores = [sft("evaluate", rows, "-m", path).rows[0]["loss"] for path in (run, tmp_path / "merged", base)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6) and abs(scores[0] - scores[2]) > 0.1
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == END


def test_base_that_moved_is_asked_for_and_can_be_given(sft, run, base, tmp_path):
    base.rename(tmp_path / "moved")
    asked = write_jsonl(tmp_path / "q.jsonl", PROMPTS)
    failed = sft("generate", asked, "-m", run)
    assert failed.code == 5 and "-m BASE --adapter" in failed.err
    given = sft("generate", asked, "-m", tmp_path / "moved", "--adapter", run, "--max-new-tokens", 3)
    assert given.code == 0 and "another model" not in given.err
    assert sft("merge", run, "-m", tmp_path / "moved", "-o", tmp_path / "merged").code == 0


def test_another_base_of_the_same_shape_is_warned_of(sft, run, tmp_path):
    other = model_folder(tmp_path / "other", "llama", seed=5, layers=2)
    asked = write_jsonl(tmp_path / "q.jsonl", PROMPTS)
    result = sft("generate", asked, "-m", other, "--adapter", run, "--max-new-tokens", 2)
    assert result.code == 0 and "trained on another model" in result.err


def test_another_base_of_another_shape_exits_5(sft, run, tmp_path):
    other = model_folder(tmp_path / "other", "llama", layers=2, width=16, heads=2, kv_heads=2)
    result = sft("merge", run, "-m", other, "-o", tmp_path / "merged")
    assert result.code == 5 and result.err.count("\n") == 1 and "of shape" in result.err


@pytest.mark.parametrize("command", ["generate", "merge"])
def test_folder_that_is_no_adapter_exits_5(sft, base, tmp_path, command):
    asked = write_jsonl(tmp_path / "q.jsonl", PROMPTS)
    args = (asked, "-m", base, "--adapter", base) if command == "generate" else (base, "-o", tmp_path / "x")
    result = sft(command, *args)
    assert result.code == 5 and "no adapter" in result.err


def test_show_tells_of_an_adapter(sft, run):
    for path in (run, run / "adapter"):
        shown = sft("show", path)
        assert shown.code == 0 and b"LORA" in shown.out and b"q_proj" in shown.out


def test_stages_of_text_take_an_adapter_run_for_a_model(sft, run, lines):
    data = lines({"prompt": "a", "completion": "b"})
    assert sft("tokenize", data, "-m", run).code == sft("check", data, "-m", run).code == 0


def test_recipe_with_an_adapter_runs_and_is_not_done_twice(sft, base, tmp_path, lines):
    data = lines(*[{"prompt": f"n{i}", "completion": "A river."} for i in range(4)])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {base}\ntokenize: {{data: {data}}}\ntrain: {{adapter: lora, max_steps: 2, sample_rows: 0}}\n"
        f"generate: {{prompts: {data}, max_new_tokens: 3}}\n"
    )
    assert load_recipe(str(recipe)).train.adapter == Lora()
    first = sft("run", recipe, "-o", tmp_path / "out")
    assert first.code == 0, first.err
    assert (tmp_path / "out" / "adapter").is_dir() and not (tmp_path / "out" / "model").exists()
    assert "train: nothing has changed, skipped" in sft("run", recipe, "-o", tmp_path / "out").err
    counted = json.loads(sft("run", recipe, "--dry-run").out.splitlines()[-1])
    assert 0 < counted["trained_parameters"] < counted["parameters"]


def test_missing_base_is_told_by_name(tmp_path, base, rows):
    train(options_of("max_steps=1"), rows, str(base), str(tmp_path / "run"))
    (tmp_path / "run" / "run.json").unlink()
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=f"{base} is not here"):
        open_model(str(tmp_path / "run"))
