"""Prefix and prompt tuning: vectors, PEFT's logits both ways, `sft train` with it, and decoding where positions begin at P."""

import json

import pytest
import safetensors.torch
import torch
from family_cases import WINDOW, build, ids_of, their_logits
from model_fixtures import (
    CPU,
    PRESETS,
    assert_equal_gradients,
    gradients,
    make_row,
    make_rows,
    metrics,
    model_folder,
    model_of,
    random_ids,
    row_logits,
    write_jsonl,
    write_turns,
)

from sftcli import artifacts, console, recipe
from sftcli.errors import CheckpointError, DataError, UsageError
from sftcli.model.adapters import adapt, peft
from sftcli.model.adapters.prefix import PrefixTable, PromptTable, attach, keys_and_values, width_of
from sftcli.model.attention import Sight, attend
from sftcli.model.batches import make_batch
from sftcli.model.cache import Held, Table, prefill
from sftcli.model.checkpoint import load_model, open_folder
from sftcli.model.decoding import Completion, Prompt, decode, generate, in_order
from sftcli.model.families import family_of
from sftcli.model.gpt import GPT
from sftcli.model.memory import estimate
from sftcli.model.training import accumulate
from sftcli.recipe import Generate, Lora, Prefix, Train
from sftcli.recipefile import apply_settings, parse
from sftcli.stages.train import train

IDS = ids_of()
P = 5
PROMPTS = [{"prompt": "Name a river.", "id": "a"}, {"prompt": "How many?", "id": "b"}]
LENGTHS = [12, 7, 20, 9, 15, 5, 11, 18, 6]
CASES = ("llama", "gpt2", "qwen3", "gemma", "gpt_neox", "gemma2 uncapped", "gemma2", "llama dynamic", "phi3 longrope")
CASES += ("olmo2", "glm", "granite", "stablelm parallel")
SEES_ALL = {"sliding_window": 4096}  # of cases whose layers have windows


def table_of(config, seed=3, length=P):
    """A prefix that matters."""
    return torch.randn(length, width_of(config), generator=torch.Generator().manual_seed(seed))


def prefixed(model, seed=3, length=P):
    attach(model, PrefixTable(model.config, table_of(model.config, seed, length)))
    return model.eval()


@pytest.fixture
def oracle():
    pytest.importorskip("transformers", reason="transformers is the oracle here: pip install '.[test]'")
    return pytest.importorskip("peft", reason="peft is the oracle here: pip install '.[test]'")


# ---- vectors


def test_layout_of_the_table_is_pf_1():
    found = keys_and_values(torch.arange(48).view(2, 24), layers=2, heads=2)  # (L, 2, G, P, D)
    assert found[0, 0].tolist() == [[[0, 1, 2], [24, 25, 26]], [[3, 4, 5], [27, 28, 29]]]
    assert found[0, 1, 0].tolist() == [[6, 7, 8], [30, 31, 32]]
    assert found[1, 0, 0].tolist() == [[12, 13, 14], [36, 37, 38]]
    assert found[1, 1, 1].tolist() == [[21, 22, 23], [45, 46, 47]]


@pytest.mark.parametrize("cap", [None, 1e6])  # a cap so high that it does nothing: the other kernel
@pytest.mark.parametrize(("key", "value", "expected"), [
    ([2.0, 0.0], [10.0, 0.0], [8.0442972, 0.1955703]), ([0.0, 0.0], [10.0, 0.0], [5.0, 0.5]),
])  # fmt: skip
def test_softmax_mass_of_a_prefix_is_pf_2(key, value, expected, cap):
    q, k, v = (torch.tensor(t).view(1, 1, 1, 2) for t in ([1.0, 0.0], [0.0, 1.0], [0.0, 1.0]))
    own = tuple(torch.tensor(t).view(1, 1, 2) for t in (key, value))
    if key[0] == 0:  # PF-2: weights .5, .5
        q = torch.zeros_like(q)
    found = attend(q, k, v, None, Sight(0, 2**-0.5, None, cap, own))
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), atol=1e-4 if cap else 1e-6, rtol=0)


GPT2_SMALL = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}


def test_sizes_are_pf_3():
    family = family_of(GPT2_SMALL)
    config = family.read_config(GPT2_SMALL)
    for mlp, count in ((None, 368_640), (512, 9_864_704)):
        with torch.device("meta"):
            model = GPT(config)
            adapt(model, family, Prefix(length=20, mlp=mlp), seed=0)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        assert model.prefix.flat().shape == (20, 18_432) and model.prefix.flat().numel() == 368_640
        options = Train(adapter=Prefix(length=20, mlp=mlp))
        assert estimate(config, options, 24, family)["trained_parameters"] == count
    prompt = Train(adapter=recipe.Prompt(length=20))
    assert estimate(config, prompt, 24, family)["trained_parameters"] == 20 * 768


# ---- one rule: every query sees the prefix, no window counts it, tokens stand at P, P + 1, ...


def test_window_does_not_count_the_prefix():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4, generator=generator) for _ in range(3))
    keys, values = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    seen = torch.ones(9, 9, dtype=torch.bool).tril() & ~torch.ones(9, 9, dtype=torch.bool).tril(-4)
    found = attend(q, k, v, seen[None, None], Sight(0, 0.5, 4, None, (keys, values)))
    for t in range(9):
        first = max(0, t - 3)
        near = torch.cat([keys[None], k[:, :, first : t + 1]], 2), torch.cat([values[None], v[:, :, first : t + 1]], 2)
        weights = (0.5 * q[:, :, t, None] @ near[0].transpose(-1, -2)).softmax(-1)
        torch.testing.assert_close(found[:, :, t], (weights @ near[1])[:, :, 0])


@pytest.mark.parametrize("preset", PRESETS)
def test_prefix_of_real_tokens_gives_the_logits_of_the_longer_row(preset, tmp_path):
    """The keys and values that P tokens have are a prefix: what comes after them stands at position P."""
    model = model_of(model_folder(tmp_path / "m", preset))
    ids = random_ids(20, 1)
    whole = row_logits(model, ids)
    table = Table(model.eval(), "left")
    with torch.no_grad():
        prefill(model, table, [ids[:P]])
    both = torch.stack([torch.stack([k[0, :, :P], v[0, :, :P]]) for k, v in zip(table.keys, table.values, strict=True)])
    flat = both.permute(3, 0, 1, 2, 4).flatten(1)  # (P, 2 L G D)
    attach(model, PrefixTable(model.config, flat))
    torch.testing.assert_close(row_logits(model, ids[P:]), whole[P:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_prompt_of_real_tokens_gives_the_logits_of_the_longer_row(preset, tmp_path):
    model = model_of(model_folder(tmp_path / "m", preset))
    ids = random_ids(20, 1)
    whole = row_logits(model, ids)
    attach(model, PromptTable(model.config, model.embedding.weight.detach()[ids[:P]]))
    torch.testing.assert_close(row_logits(model, ids[P:]), whole[P:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_positions_that_begin_at_0_are_wrong(preset, tmp_path):
    model = prefixed(model_of(model_folder(tmp_path / "m", preset)))
    right = row_logits(model, random_ids(12, 1))
    model.prefix.length = 0
    assert float((row_logits(model, random_ids(12, 1)) - right).abs().max()) > 0.2


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_free_rows_equal_one_by_one_and_never_touch_each_other(preset, tmp_path):
    model = prefixed(model_of(model_folder(tmp_path / "m", preset)))
    rows = make_rows([4, 9, 4, 13])

    def logits(rows):
        batch = make_batch(rows)
        with torch.no_grad():
            found = model.logits(model.hidden(batch.ids, batch.positions, batch.attention))
        return dict(
            zip([row.id for row in batch.rows], found.split([len(r.input_ids) for r in batch.rows]), strict=True)
        )

    found = logits(rows)
    for row in rows:
        torch.testing.assert_close(found[row.id], row_logits(model, row.input_ids), atol=1e-5, rtol=1e-5)
    changed = logits([make_row(random_ids(4, 77), id="r0"), *rows[1:]])
    for row in rows[1:]:
        assert torch.equal(changed[row.id], found[row.id])
    assert not torch.equal(changed["r0"], found["r0"])


# ---- PEFT's files


def folder_of(case, path):
    """(transformers' model, our folder); windows wider than the row: beyond them PEFT forgets its prefix."""
    sizes = SEES_ALL if case.startswith(("gemma2", "mistral")) else {}
    theirs = build(case, path, **sizes)
    return theirs, open_folder(path)


def ours_on(folder, path):
    model = load_model(folder)
    peft.apply(model, peft.open_adapter(str(path), folder))
    return model


def same(found, expected):
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def save_theirs(oracle, theirs, path, kind="Prefix", **options):
    torch.manual_seed(0)
    config = getattr(oracle, f"{kind}TuningConfig")(task_type="CAUSAL_LM", num_virtual_tokens=P, **options)
    adapted = oracle.get_peft_model(theirs, config)
    adapted.peft_config["default"].base_model_name_or_path = "base"
    adapted.save_pretrained(path)
    return adapted.eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("projected", [False, True])
def test_prefix_saved_by_peft_gives_its_logits_here(oracle, case, projected, tmp_path):
    theirs, folder = folder_of(case, tmp_path / "base")
    options = {"prefix_projection": True, "encoder_hidden_size": 7} if projected else {}
    adapted = save_theirs(oracle, theirs, tmp_path / "theirs", **options)
    expected = their_logits(adapted, IDS)
    found = row_logits(ours_on(folder, tmp_path / "theirs"), IDS)
    same(found, expected)
    assert float((found - row_logits(load_model(folder), IDS)).abs().max()) > 0.05


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mlp", [None, 7])
def test_prefix_saved_here_gives_our_logits_in_peft(oracle, case, mlp, tmp_path):
    theirs, folder = folder_of(case, tmp_path / "base")
    model, options = load_model(folder), Prefix(length=P, mlp=mlp)
    adapt(model, folder.family, options, seed=1)
    with torch.no_grad():
        model.prefix.table.add_(torch.randn(model.prefix.table.shape, generator=torch.Generator().manual_seed(2)))
    expected = row_logits(model, IDS)
    peft.save_adapter(model, folder, tmp_path / "ours", options, "base", {})
    loaded = oracle.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    same(their_logits(loaded.eval(), IDS), expected)
    same(row_logits(ours_on(folder, tmp_path / "ours"), IDS), expected)


PROMPTED = ("llama", "gpt2", "qwen3", "gemma", "gemma2", "phi", "stablelm parallel", "olmo2")


@pytest.mark.parametrize("case", PROMPTED)
def test_prompt_saved_by_peft_gives_its_logits_here(oracle, case, tmp_path):
    theirs, folder = folder_of(case, tmp_path / "base")
    adapted = save_theirs(oracle, theirs, tmp_path / "theirs", kind="Prompt")
    found = row_logits(ours_on(folder, tmp_path / "theirs"), IDS)
    same(found, their_logits(adapted, IDS)[P:])  # PEFT gives the logits of its virtual tokens, too
    assert float((found - row_logits(load_model(folder), IDS)).abs().max()) > 0.05


@pytest.mark.parametrize("case", PROMPTED)
def test_prompt_saved_here_gives_our_logits_in_peft(oracle, case, tmp_path):
    theirs, folder = folder_of(case, tmp_path / "base")
    model, options = load_model(folder), recipe.Prompt(length=P)
    adapt(model, folder.family, options, seed=1)
    expected = row_logits(model, IDS)
    peft.save_adapter(model, folder, tmp_path / "ours", options, "base", {})
    loaded = oracle.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    same(their_logits(loaded.eval(), IDS)[P:], expected)
    same(row_logits(ours_on(folder, tmp_path / "ours"), IDS), expected)


@pytest.mark.parametrize("case", ["granite", "llama dynamic", "phi3 longrope"])
def test_prompt_is_refused_where_it_would_be_another_one(oracle, case, tmp_path):
    theirs, folder = folder_of(case, tmp_path / "base")
    with pytest.raises(UsageError, match="no virtual tokens for this model"):
        adapt(load_model(folder), folder.family, recipe.Prompt(), seed=1)
    save_theirs(oracle, theirs, tmp_path / "theirs", kind="Prompt")
    with pytest.raises(CheckpointError, match="no virtual tokens for"):
        peft.open_adapter(str(tmp_path / "theirs"), folder)


def test_beyond_a_window_peft_forgets_the_prefix_and_we_do_not(oracle, tmp_path):
    theirs = build("mistral", tmp_path / "base")  # windows of 6
    folder = open_folder(tmp_path / "base")
    adapted = save_theirs(oracle, theirs, tmp_path / "theirs")
    found, expected = row_logits(ours_on(folder, tmp_path / "theirs"), IDS), their_logits(adapted, IDS)
    torch.testing.assert_close(found[: WINDOW - P], expected[: WINDOW - P], atol=1e-5, rtol=0)
    assert float((found - expected)[WINDOW:].abs().max()) > 0.05


# ---- files that are refused


@pytest.fixture
def saved(tmp_path):
    """(the base's folder, a prefix beside it)."""
    folder = open_folder(model_folder(tmp_path / "base", "llama"))
    model, options = load_model(folder), Prefix(length=P)
    adapt(model, folder.family, options, seed=1)
    peft.save_adapter(model, folder, tmp_path / "adapter", options, str(tmp_path / "base"), {})
    return folder, tmp_path / "adapter"


def test_minimal_config_loads_and_more_than_the_known_keys_do_not_come_from_peft(oracle, saved, tmp_path):
    folder, path = saved
    minimal = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": P}
    (path / "adapter_config.json").write_text(json.dumps(minimal))
    assert peft.open_adapter(str(path), folder).options == Prefix(length=P)
    everything = oracle.PrefixTuningConfig().to_dict() | minimal
    (path / "adapter_config.json").write_text(json.dumps(everything))
    assert peft.open_adapter(str(path), folder).options == Prefix(length=P)


WIDE = 3 * 2 * 2 * 8  # layers, keys and values, key heads, head width


@pytest.mark.parametrize(
    ("keys", "tensors", "told"),
    [
        ({"num_virtual_tokens": 4}, None, r"prompt_embeddings is of shape \[5, 96\].*need \[4, 96\]"),
        ({"num_layers": 4}, None, "num_layers is 4; .* needs 3"),
        ({"num_attention_heads": 4}, None, "num_attention_heads is 4; .* needs 2"),
        ({"token_dim": 32}, None, "token_dim is 32; .* needs 16"),
        ({"num_transformer_submodules": 2}, None, "num_transformer_submodules is 2"),
        ({"task_type": "SEQ_2_SEQ_LM"}, None, "task_type 'SEQ_2_SEQ_LM' is not supported"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save = .* is not supported"),
        ({}, {}, "prompt_embeddings is missing"),
        ({}, {"prompt_embeddings": torch.zeros(P, WIDE + 1)}, r"of shape \[5, 97\]"),
        ({}, {"prompt_embeddings": torch.zeros(P * WIDE)}, "of shape"),
        ({}, {"prompt_embeddings": torch.zeros(())}, "is missing"),
        ({}, {"prompt_embeddings": torch.zeros(P, WIDE), "other": torch.zeros(2)}, "tensor other is not supported"),
        ({"num_virtual_tokens": 64}, {"prompt_embeddings": torch.zeros(64, WIDE)}, "leaves no room in a context of 64"),
        ({"peft_type": ["PREFIX_TUNING"]}, None, r"peft_type \['PREFIX_TUNING'\] is not supported"),
        ({"peft_type": "P_TUNING"}, None, "peft_type 'P_TUNING' is not supported"),
    ],
    ids=lambda value: "" if isinstance(value, dict) or value is None else value[:20],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_by_name(sft, saved, keys, tensors, told, tmp_path):
    folder, path = saved
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | keys))
    if tensors is not None:
        safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=told):
        peft.open_adapter(str(path), folder)
    asked = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Name a river."}])
    result = sft("generate", asked, "-m", folder.path, "--adapter", path)
    assert result.code == 5 and "Traceback" not in result.err


# ---- sft train


@pytest.fixture
def base(tmp_path):
    return model_folder(tmp_path / "base", "llama", layers=2)


@pytest.fixture
def rows(base, tmp_path):
    return write_turns(base, tmp_path / "rows.safetensors", LENGTHS)


def options_of(*settings):
    given = ["adapter.kind=prefix", f"adapter.length={P}", "batch_rows=3", "epochs=2", "optimizer.lr=3e-2"]
    return parse(Train, apply_settings({}, [*given, "sample_rows=0", *settings]), section="train")


@pytest.mark.parametrize("mlp", [None, 16])
def test_run_lowers_the_loss_and_leaves_the_base_bit_for_bit(base, rows, tmp_path, mlp, monkeypatch):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    held = {}
    monkeypatch.setattr(
        "sftcli.stages.finishing.save_adapter", lambda *a: held.update(model=a[0]) or peft.save_adapter(*a)
    )
    settings = ("epochs=12", f"optimizer.lr={3e-2 if mlp else 0.3}", *([f"adapter.mlp={mlp}"] if mlp else []))
    outcome = train(options_of(*settings), rows, str(base), str(tmp_path / "run"))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    for name, value in model_of(base).state_dict().items():
        assert torch.equal(held["model"].state_dict()[name], value), name
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3
    written = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(value.shape) for name, value in written.items()} == {"prompt_embeddings": (P, 64)}
    assert outcome.sha256 == artifacts.file_fingerprint(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    expected = {"num_virtual_tokens": P, "num_attention_heads": 2, "token_dim": 16, "num_layers": 2}
    assert expected.items() <= config.items() and config["prefix_projection"] is False
    folder, adapter = peft.open_model(str(tmp_path / "run"))
    trained = row_logits(held["model"], IDS)
    assert torch.equal(row_logits(ours_on(folder, adapter.path), IDS), trained)


@pytest.mark.parametrize(
    "settings",
    [("adapter.dropout=0.2",), ("adapter.mlp=16", "adapter.dropout=0.2"), ("gradient_checkpointing=true",),
     ("optimizer.kind=muon",), ("adapter.kind=prompt", "adapter.dropout=0.2", "gradient_checkpointing=true"), ("base_dtype=bfloat16",), ("dtype=bfloat16", "adapter.mlp=16")],
    ids=str,
)  # fmt: skip
def test_killed_run_resumes_to_the_sha256_of_the_whole_one(base, rows, tmp_path, settings):
    options, run = options_of("checkpoint_every=1", "keep=9", *settings), tmp_path / "run"
    whole = train(options, rows, str(base), str(run))
    log = metrics(run)
    (run / "adapter").rename(tmp_path / "gone")
    for step in (4, 5, 6):
        for path in (run / "checkpoints" / f"step-{step:06}").iterdir():
            path.unlink()
    again = train(options, rows, str(base), str(run), resumed=True)
    assert again.sha256 == whole.sha256 and metrics(run) == log
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert not config.get("prefix_projection")  # the MLP is in the checkpoints and nowhere else


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_micro_batch_or_eight_give_equal_gradients(preset, checkpointing, tmp_path):
    folder = open_folder(model_folder(tmp_path / "m", preset))
    found = []
    for micro in (999, 1):
        model = load_model(folder)
        adapt(model, folder.family, Prefix(length=P, mlp=8), seed=2)
        model.gradient_checkpointing = checkpointing and micro == 1
        model.train()
        accumulate(model, make_rows(LENGTHS[:8]), micro, CPU)
        found.append(gradients(model))
    assert set(found[0]) == {
        f"prefix.{n}" for n in ("table", "inner_weight", "inner_bias", "outer_weight", "outer_bias")
    }
    assert_equal_gradients(found[1], found[0], 1e-5)


@pytest.mark.parametrize("kind", ["Prefix", "Prompt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_peft(oracle, kind, checkpointing, tmp_path):
    theirs, folder = folder_of("llama", tmp_path / "base")
    adapted = save_theirs(oracle, theirs, tmp_path / "theirs", kind=kind)
    ids = torch.tensor([IDS])
    loss = adapted(ids, labels=ids).loss
    if kind == "Prompt":  # PEFT trains the first token behind its virtual ones, too; we do not
        loss = torch.nn.functional.cross_entropy(adapted(ids).logits[0, P:-1], ids[0, 1:])
    loss.backward()
    expected = adapted.prompt_encoder["default"].embedding.weight.grad
    model = ours_on(folder, tmp_path / "theirs")
    model.prefix.requires_grad_(True)
    model.gradient_checkpointing = checkpointing
    model.train()
    accumulate(model, [make_row(IDS)], 999, CPU)
    torch.testing.assert_close(model.prefix.table.grad, expected, atol=1e-6, rtol=1e-4)


def test_dropout_falls_on_the_prefix_in_training_only(base):
    folder = open_folder(base)
    model = load_model(folder)
    adapt(model, folder.family, Prefix(length=P, mlp=8, dropout=0.5), seed=2)
    kept = model.eval().prefix(model)
    assert int((kept == 0).sum()) == 0
    dropped = model.train().prefix(model)
    share = float((dropped == 0).float().mean())
    assert 0.35 < share < 0.65
    torch.testing.assert_close(dropped[dropped != 0], 2 * kept[dropped != 0])


def test_prefix_that_trains_on_is_not_answered_from_what_was_kept(base):
    folder = open_folder(base)
    model = load_model(folder)
    adapt(model, folder.family, Prefix(length=P, mlp=8), seed=2)
    with torch.no_grad():
        first = model.eval().prefix(model)
        assert model.prefix(model) is first
        model.train()
        model.prefix.outer_bias.add_(1.0)
        torch.testing.assert_close(model.eval().prefix(model), first + 1)
    assert model.prefix(model).requires_grad  # what is kept has no gradient


def test_prefix_is_the_saved_one_bit_for_bit_when_the_model_computes_in_bfloat16(base):
    folder = open_folder(base)
    model = load_model(folder)
    adapt(model, folder.family, Prefix(length=P, mlp=8), seed=2)
    expected = model.prefix(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.prefix(model), expected)


def test_context_is_shorter_by_the_prefix(base, tmp_path):
    fits = write_turns(base, tmp_path / "fits.safetensors", [64 - P - 1])
    long = write_turns(base, tmp_path / "long.safetensors", [64 - P])
    once = ("max_steps=1", "batch_rows=1")
    assert train(options_of(*once), fits, str(base), str(tmp_path / "run")).steps == 1
    with pytest.raises(DataError, match="has 60 tokens, the model's context is 59"):
        train(options_of(*once), long, str(base), str(tmp_path / "b"))
    with pytest.raises(DataError, match="the model's context is 59"):
        train(options_of(*once, f"eval_data={long}"), fits, str(base), str(tmp_path / "c"))
    with pytest.raises(UsageError, match="adapter.length: 64, the model's context is 64"):
        train(options_of("adapter.length=64"), fits, str(base), str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [(["adapter=prefixes"], "adapter.kind: 'prefixes' is not one of lora, prefix, prompt"), (["adapter=prefix", "adapter.rank=4"], "adapter.rank: unknown"),
     (["adapter.length=4"], "adapter.length: unknown"), (["adapter=prefix", "adapter.length=0"], "adapter.length: input"),
     (["adapter=prefix", "adapter.lenght=4"], "adapter.lenght: unknown key")],
)  # fmt: skip
def test_options_that_cannot_be_are_refused_by_path(settings, told):
    with pytest.raises(UsageError, match=told):
        parse(Train, apply_settings({}, settings), section="train")
    assert parse(Train, {"adapter": {"rank": 4}}).adapter == Lora(rank=4)
    assert parse(Train, {"adapter": "prefix"}).adapter == Prefix()
    assert parse(Train, {"adapter": "prompt"}).adapter == recipe.Prompt()


def test_prompt_run_lowers_the_loss_and_answers_through_its_run(sft, base, rows, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    options = options_of("adapter.kind=prompt", "epochs=12", "optimizer.lr=0.3")
    train(options, rows, str(base), str(tmp_path / "run"))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    scores = [sft("evaluate", rows, "-m", path).rows[0]["loss"] for path in (tmp_path / "run", base)]
    assert scores[0] < scores[1] - 0.1
    written = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(value.shape) for name, value in written.items()} == {"prompt_embeddings": (P, 32)}
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PROMPT_TUNING" and config["token_dim"] == 32 and config["num_attention_heads"] == 4
    asked = write_jsonl(tmp_path / "q.jsonl", PROMPTS)
    assert sft("generate", asked, "-m", tmp_path / "run", "--max-new-tokens", 4).code == 0
    assert sft("merge", tmp_path / "run", "-o", tmp_path / "merged").code == 2


@pytest.mark.parametrize(
    ("adapter", "lr"), [("prefix", 1e-2), ({"kind": "prefix", "mlp": 8}, 2e-4), ("prompt", 1e-2), ("lora", 2e-4)]
)
def test_learning_rate_where_none_is_given(base, rows, tmp_path, adapter, lr):
    train(parse(Train, {"adapter": adapter, "max_steps": 1, "sample_rows": 0}), rows, str(base), str(tmp_path / "run"))
    assert metrics(tmp_path / "run")[0]["lr"] == pytest.approx(lr)


# ---- decoding


def greedy(model, ids, steps):
    """Greedy ids by whole forwards, without cache or batch."""
    made = list(ids)
    for _ in range(steps):
        made.append(int(row_logits(model, made)[-1].argmax()))
    return made[len(ids) :]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_padded_batch_equals_one_by_one(preset, side, kind, tmp_path):
    model = model_of(model_folder(tmp_path / "m", preset))
    if kind == "prefix":
        prefixed(model)
    else:
        attach(model, PromptTable(model.config, torch.randn(P, model.config.width)))
    prompts = [Prompt(random_ids(n, n), str(n)) for n in (3, 11, 6, 1, 17)]
    options = Generate(batch_size=3, max_new_tokens=12, pad_side=side)
    found = [done.ids for done in in_order(generate(model, prompts, options, ()))]
    assert found == [greedy(model, prompt.ids, 12) for prompt in prompts]
    alone = options.model_copy(update={"batch_size": 1})
    assert found == [done.ids for done in in_order(generate(model, prompts, alone, ()))]


@pytest.mark.parametrize("case", ["mistral", "gemma2", "llama dynamic", "phi3 longrope"])
def test_decoding_across_windows_and_lengths_equals_whole_forwards(oracle, case, tmp_path):
    build(case, tmp_path / "base")
    model = prefixed(model_of(tmp_path / "base"))
    ids = [ids_of(n, seed=n) for n in (9, 4, 14)]  # phi3 turns to its long factors at 17 positions, 5 of them here
    prompts = [Prompt(row, str(n)) for n, row in enumerate(ids)]
    found = [done.ids for done in in_order(generate(model, prompts, Generate(max_new_tokens=12), ()))]
    if case != "llama dynamic":  # there, keys keep the angles of the length that their row had when they came
        assert found == [greedy(model, row, 12) for row in ids]
    assert found == [[done.ids for done in generate(model, [p], Generate(max_new_tokens=12), ())][0] for p in prompts]


@pytest.mark.parametrize("preset", PRESETS)
def test_row_ends_where_the_shorter_context_is_full(preset, tmp_path):
    model = prefixed(model_of(model_folder(tmp_path / "m", preset)))
    (done,) = generate(model, [Prompt(random_ids(50, 1), "a")], Generate(max_new_tokens=99), ())
    assert len(done.ids) == 64 - P - 50 and done.context_full


@pytest.mark.parametrize("preset", PRESETS)
def test_row_that_goes_on_from_what_is_held_equals_whole_forwards(preset, tmp_path):
    model, options = prefixed(model_of(model_folder(tmp_path / "m", preset))), Generate(max_new_tokens=6)
    held, first = Held(), random_ids(9, 1)
    for ids in (first, [*first, *greedy(model, first, 6), *random_ids(5, 2)]):
        common = held.common(ids)
        events = decode(model, [Prompt(ids, "a")], options, (), held=held)
        (answer,) = [event.ids for event in events if isinstance(event, Completion)]
        assert answer == greedy(model, ids, 6)
    assert common == 9 + 5  # the last token of the first answer was not fed


# ---- the commands


@pytest.fixture
def run(sft, base, rows, tmp_path):
    done = sft(
        "train", rows, "-m", base, "-o", tmp_path / "run", "--adapter", "prefix", "--prefix-length", P, "--prefix-mlp", 16,
        "--lr", "5e-2", "--epochs", 6, "--set", "batch_rows=3", "--set", "sample_rows=2",
    )  # fmt: skip
    assert done.code == 0, done.err
    count = P * 32 + 32 * 16 + 16 + 16 * 64 + 64
    assert f"({count:,} trained, " in done.err
    return tmp_path / "run"


def test_generate_compares_base_prefix_and_lora(sft, base, rows, run, tmp_path):
    lora = sft("train", rows, "-m", base, "-o", tmp_path / "lora", "--adapter", "lora", "--lr", "5e-2", "--epochs", 4)
    assert lora.code == 0, lora.err
    asked = write_jsonl(tmp_path / "q.jsonl", PROMPTS)
    short = ("--max-new-tokens", 6)
    own, bare = (sft("generate", asked, "-m", path, *short) for path in (run, base))
    names = [name for path in (run, "none", tmp_path / "lora", run) for name in ("--adapter", path)]
    every = sft("generate", asked, "-m", base, *names, *short)
    assert own.code == bare.code == every.code == 0, own.err + bare.err + every.err
    ids = [row["completion_ids"] for row in every.rows]
    assert ids[:2] == ids[6:] == [row["completion_ids"] for row in own.rows]
    assert ids[2:4] == [row["completion_ids"] for row in bare.rows]
    assert len({json.dumps(ids[i : i + 2]) for i in (0, 2, 4)}) == 3


def test_show_batch_counts_positions_from_the_prefix_on(sft, run, tmp_path):
    asked = write_jsonl(
        tmp_path / "q.jsonl", [{"input_ids": ids, "labels": [-100] * len(ids)} for ids in ([11, 12], [13, 14, 15])]
    )
    shown = sft("generate", asked, "-m", run, "--show-batch", "--max-new-tokens", 1)
    assert "  5 5 6\n  5 6 7\n" in shown.err


def test_evaluate_chat_and_show_know_a_prefix_run(sft, run, base, rows, tmp_path):
    scores = [sft("evaluate", rows, "-m", path).rows[0]["loss"] for path in (run, base)]
    assert scores[0] < scores[1] - 0.3
    long = write_turns(base, tmp_path / "long.safetensors", [64 - P])
    assert "context is 59" in sft("evaluate", long, "-m", run).err and sft("evaluate", long, "-m", base).code == 0
    asked = write_jsonl(tmp_path / "q.jsonl", PROMPTS[:1])
    answer = sft("generate", asked, "-m", run, "--max-new-tokens", 6).rows[0]["completion"]
    talk = sft("chat", run, "--max-new-tokens", 6, stdin=b"Name a river.\nAnd another?\n/tokens\n")
    assert talk.code == 0 and talk.out.decode().startswith(console.safe(answer)) and " of 59 tokens" in talk.err
    shown = sft("show", run)
    assert b"PREFIX_TUNING" in shown.out and b"num_virtual_tokens" in shown.out


def test_merge_of_a_prefix_is_refused_in_one_line(sft, run, tmp_path):
    result = sft("merge", run, "-o", tmp_path / "merged")
    assert result.code == 2 and "no weights can hold" in result.err and result.err.count("\n") <= 2
    assert not (tmp_path / "merged").exists()


def test_prefix_run_whose_base_has_another_shape_exits_5(sft, run, tmp_path):
    other = model_folder(tmp_path / "other", "llama", layers=3)
    asked = write_jsonl(tmp_path / "q.jsonl", PROMPTS)
    result = sft("generate", asked, "-m", other, "--adapter", run)
    assert result.code == 5 and "num_layers is 2" in result.err
