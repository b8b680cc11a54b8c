"""Adapters in PEFT's files: what PEFT saves we load, what we save PEFT loads, with equal logits."""

import json
import re

import pytest
import safetensors.torch
import torch
from family_cases import CASES, FAMILIES, build, family_of_case, ids_of, their_logits
from model_fixtures import row_logits

from sftcli.errors import CheckpointError, Exit, UsageError
from sftcli.model.adapters import lora, peft
from sftcli.model.attention import Group, RowAttention
from sftcli.model.checkpoint import load_model, open_folder, save_model
from sftcli.model.families import Stored
from sftcli.recipe import Lora
from sftcli.stages.merge import merge

IDS = ids_of()
FOUR = ("llama", "gpt2", "gpt_neox", "phi3")
QV = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}
# PEFT's names of a variant; `targets` None: those of QV
VARIANTS = {
    "q and v": {"target_modules": None},
    "dora": {"use_dora": True, "lora_dropout": 0.3},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "rslora": {"use_rslora": True},
    "biases of adapted layers": {"bias": "lora_only", "target_modules": None},
    "all biases": {"bias": "all"},
    "head": {"modules_to_save": ["lm_head"]},
    "head and norms": {"modules_to_save": ["lm_head", "layernorm", "norm", "ln_1", "ln_f"]},
    "a whole layer": {"modules_to_save": ["o_proj", "c_proj", "dense"]},
    "some layers": {"layers_to_transform": [1, 3], "target_modules": None},
    "patterns": {"target_modules": None, "rank_pattern": {"1.*": 2, "3.*": 5}, "alpha_pattern": {"2.*": 12}},
    "a regex": {"target_modules": r".*\.[13]\..*(proj|c_attn|query_key_value)"},
}
OURS = {"use_dora": "dora", "use_rslora": "rslora", "lora_dropout": "dropout", "target_modules": "targets"}
OURS |= {"layers_to_transform": "layers"}


@pytest.fixture
def oracle():
    pytest.importorskip("transformers", reason="transformers is the oracle here: pip install '.[test]'")
    return pytest.importorskip("peft", reason="peft is the oracle here: pip install '.[test]'")


def options_of(case, variant):
    """(PEFT's options, ours) of a variant for a model."""
    theirs = {"target_modules": "all-linear"} | VARIANTS[variant]
    if theirs["target_modules"] is None:
        theirs["target_modules"] = QV[family_of_case(case)]
    ours = {OURS.get(name, name): value for name, value in theirs.items()}
    return theirs, Lora(rank=4, alpha=6, **ours)


@torch.no_grad()
def shaken(model, seed=3):
    """Every parameter that trains, moved: B away from 0, magnitudes away from the norms."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in model.named_parameters():
        if p.requires_grad:
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def ours_on(folder, path):
    """Our base with an adapter's folder on it."""
    model = load_model(folder)
    peft.apply(model, peft.open_adapter(str(path), folder))
    return model


def same(found, expected, atol=1e-5):
    assert float(expected.std()) > 0.3  # these logits can tell models apart
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def theirs_of(oracle, model, tmp_path, options, base="base"):
    """An adapter with values that matter, saved by PEFT; returns (its folder, its logits)."""
    torch.manual_seed(0)
    adapted = oracle.get_peft_model(
        model, oracle.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options), autocast_adapter_dtype=False
    )
    adapted.peft_config["default"].base_model_name_or_path = base
    shaken(adapted)
    adapted.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", their_logits(adapted, IDS)


def ours_trained(folder, options):
    """Our model as training would leave it."""
    model = load_model(folder)
    lora.adapt(model, folder.family, options, seed=1)
    return shaken(model)


CROSSED = [(case, variant) for case in FOUR for variant in VARIANTS]


@pytest.mark.parametrize(("case", "variant"), CROSSED)
def test_adapter_saved_by_peft_gives_its_logits_here(oracle, case, variant, tmp_path):
    theirs, _ = options_of(case, variant)
    path, expected = theirs_of(oracle, build(case, tmp_path / "base"), tmp_path, theirs)
    folder = open_folder(tmp_path / "base")
    base = row_logits(load_model(folder), IDS)
    found = row_logits(ours_on(folder, path), IDS)
    same(found, expected)
    assert float((found - base).abs().max()) > 0.05


@pytest.mark.parametrize(("case", "variant"), CROSSED)
def test_adapter_saved_here_gives_our_logits_in_peft(oracle, case, variant, tmp_path, recwarn):
    theirs = build(case, tmp_path / "base")
    folder = open_folder(tmp_path / "base")
    _, options = options_of(case, variant)
    _check_saved_in_peft(oracle, theirs, folder, options, tmp_path)
    assert not [w for w in recwarn if "keys" in str(w.message)]  # none missing, none unexpected


def _check_saved_in_peft(oracle, theirs, folder, options, tmp_path):
    model = ours_trained(folder, named(options, folder))
    expected = row_logits(model, IDS)
    peft.save_adapter(model, folder, tmp_path / "ours", named(options, folder), "base", {})
    loaded = oracle.PeftModel.from_pretrained(theirs, tmp_path / "ours", autocast_adapter_dtype=False)
    same(their_logits(loaded.eval(), IDS), expected)
    same(row_logits(ours_on(folder, tmp_path / "ours"), IDS), expected)


def named(options, folder):
    """modules_to_save that this model has: unknown ones are errors here."""
    names = [name for name in options.modules_to_save if _has(folder, name)]
    return options.model_copy(update={"modules_to_save": names})


def _has(folder, module):
    stored = [lora.adapter_name(s) for s in folder.family.tensors(folder.config)]
    return any(lora.is_saved(name, [module]) for name in stored) or module == "lm_head"


@pytest.mark.parametrize("case", [name for name in FAMILIES if name not in FOUR])
def test_every_family_exchanges_adapters_with_peft(oracle, case, tmp_path):
    theirs = build(case, tmp_path / "base")
    folder = open_folder(tmp_path / "base")
    _check_saved_in_peft(oracle, theirs, folder, Lora(rank=4, alpha=6, dora=True), tmp_path)
    path, expected = theirs_of(oracle, build(case, tmp_path / "base"), tmp_path, {"target_modules": "all-linear"})
    same(row_logits(ours_on(folder, path), IDS), expected)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_equal_pefts(oracle, case, dora, dropout, tmp_path, monkeypatch):
    def every_third(x, p=0.5, training=True, inplace=False):  # dropout without chance, the same for both
        kept = (torch.arange(x.shape[-1]) % 3 != 0) / (1 - p)
        return x * kept if training and p else x

    monkeypatch.setattr(torch.nn.functional, "dropout", every_third)
    other_dropouts = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if case == "gpt2" else {}
    options = {"target_modules": QV[case], "use_dora": dora, "lora_dropout": dropout}
    path, _ = theirs_of(oracle, build(case, tmp_path / "base", **other_dropouts), tmp_path, options)
    fresh = build(case, tmp_path / "again", **other_dropouts)  # the same weights
    theirs = oracle.PeftModel.from_pretrained(fresh, path, is_trainable=True, autocast_adapter_dtype=False).train()
    folder = open_folder(tmp_path / "base")
    ours = ours_on(folder, path).train()
    for site in lora.linear_sites(folder.family, folder.config):
        for layer in lora.updates_of(ours, site):
            layer.dropout = dropout  # an adapter that is only used has none
    theirs(torch.tensor([IDS])).logits[0].square().mean().backward()
    group = RowAttention([Group(1, len(IDS))])
    logits = ours.logits(ours.hidden(torch.tensor(IDS), torch.arange(len(IDS)), group))
    logits.square().mean().backward()
    expected = {name.replace(".default", "").removesuffix(".weight"): p.grad for name, p in theirs.named_parameters()}
    for site in lora.linear_sites(folder.family, folder.config):
        layers = lora.updates_of(ours, site)
        if not layers:
            continue
        found = {"lora_A": layers[0].lora_A.grad, "lora_B": site.stored.join([layer.lora_B.grad for layer in layers])}
        if dora:
            found["lora_magnitude_vector"] = site.stored.join([layer.magnitude.grad for layer in layers])
        for part, grad in found.items():
            torch.testing.assert_close(grad, expected[f"base_model.model.{site.path}.{part}"], atol=1e-5, rtol=1e-4)


# ---- one matrix for embedding and head

TIED = ["llama tied", "gpt2", "gpt_neox tied"]
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "gpt_neox": "embed_in"}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("saved", [["lm_head"], ["embedding"], ["embedding", "lm_head"]], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_tied_matrix_trained_by_peft_as_one_or_two_gives_its_logits_here(oracle, case, saved, ties, tmp_path):
    modules = [EMBEDDING[family_of_case(case)] if name == "embedding" else name for name in saved]
    options = {"target_modules": QV[family_of_case(case)], "modules_to_save": modules, "ensure_weight_tying": ties}
    path, expected = theirs_of(oracle, build(case, tmp_path / "base"), tmp_path, options)
    folder = open_folder(tmp_path / "base")
    same(row_logits(ours_on(folder, path), IDS), expected)
    merge(str(path), str(tmp_path / "merged"), str(tmp_path / "base"))
    same(row_logits(load_model(open_folder(tmp_path / "merged")), IDS), expected)


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("saved", [["lm_head"], ["embedding"]], ids=str)
def test_tied_matrix_trained_here_stays_one_in_peft(oracle, case, saved, tmp_path):
    modules = [EMBEDDING[family_of_case(case)] if name == "embedding" else name for name in saved]
    theirs = build(case, tmp_path / "base")
    folder = open_folder(tmp_path / "base")
    _check_saved_in_peft(oracle, theirs, folder, Lora(rank=4, alpha=6, modules_to_save=modules), tmp_path)
    merge(str(tmp_path / "ours"), str(tmp_path / "merged"), str(tmp_path / "base"))
    assert open_folder(tmp_path / "merged").config.tied


# ---- merging, taking off


@pytest.mark.parametrize(
    ("case", "variant"), [(c, v) for c in FOUR for v in ("dora and rslora", "head and norms", "all biases")]
)
def test_merged_folder_gives_the_logits_of_base_and_adapter(oracle, case, variant, tmp_path):
    build(case, tmp_path / "base")
    folder = open_folder(tmp_path / "base")
    options = named(options_of(case, variant)[1], folder)
    model = ours_trained(folder, options)
    peft.save_adapter(model, folder, tmp_path / "a", options, str(tmp_path / "base"), {})
    merge(str(tmp_path / "a"), str(tmp_path / "merged"))
    merged = load_model(open_folder(tmp_path / "merged"))
    same(row_logits(merged, IDS), row_logits(model, IDS), atol=2e-5)  # logits of 5, processors round differently
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(their_logits(theirs.eval(), IDS), row_logits(model, IDS), atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", ["gpt2", "llama tied"])
def test_base_is_bit_for_bit_itself_after_an_adapter_was_on_it(oracle, case, tmp_path):
    options = {"target_modules": QV[family_of_case(case)], "modules_to_save": ["lm_head", "norm"], "bias": "all"}
    path, expected = theirs_of(oracle, build(case, tmp_path / "base"), tmp_path, options)
    folder = open_folder(tmp_path / "base")
    model = load_model(folder)
    before, names = row_logits(model, IDS), [name for name, _ in model.named_parameters()]
    adapter = peft.open_adapter(str(path), folder)
    for _ in range(2):
        with peft.applied(model, adapter):
            same(row_logits(model, IDS), expected)
        assert torch.equal(row_logits(model, IDS), before)
        assert [name for name, _ in model.named_parameters()] == names
        assert model.head.weight is model.embedding.weight


# ---- what a config may say, and what is refused


@pytest.fixture
def saved(tmp_path):
    """A llama-shaped base and an adapter of ours on it."""
    pytest.importorskip("transformers")
    build("llama", tmp_path / "base")
    folder = open_folder(tmp_path / "base")
    options = Lora(rank=4, alpha=6, targets=["q_proj", "v_proj"])
    peft.save_adapter(ours_trained(folder, options), folder, tmp_path / "a", options, "base", {})
    return folder, tmp_path / "a"


def change(path, **keys):
    """Set keys of adapter_config.json; None takes them out."""
    file = path / "adapter_config.json"
    config = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(path, edit):
    tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
    safetensors.torch.save_file(edit(tensors), path / "adapter_model.safetensors")


def test_config_with_the_minimal_keys_loads(saved):
    folder, path = saved
    before = row_logits(ours_on(folder, path), IDS)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 6}')
    assert torch.equal(row_logits(ours_on(folder, path), IDS), before)


def test_config_without_rank_and_alpha_has_pefts_8_and_8(saved):
    folder, path = saved
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"need \[8, 32\]"):
        peft.open_adapter(str(path), folder)
    assert peft.read_config({"peft_type": "LORA"}, path) == Lora(rank=8, alpha=8)


def test_config_as_peft_writes_it_has_nothing_unknown(oracle, tmp_path):
    config = oracle.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    found = peft.read_config(json.loads(json.dumps(config, default=list)), tmp_path)
    assert found == Lora(rank=8, alpha=8)


REFUSED = {
    "peft_type": "IA3",
    "task_type": "SEQ_CLS",
    "lora_bias": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "megatron_config": {"a": 1},
    "layer_replication": [[0, 2], [1, 3]],
    "alora_invocation_tokens": [5, 6],
    "trainable_token_indices": [1, 2],
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "a_feature_of_next_year": 1,
    "init_lora_weights": "pissa_niter_4",
    "r": 0,
    "lora_alpha": "much",
    "bias": "some",
    "rank_pattern": {"(": 3},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_supported_is_refused_by_name(saved, key):
    folder, path = saved
    change(path, **{key: REFUSED[key]})
    with pytest.raises(CheckpointError, match=key) as caught:
        peft.open_adapter(str(path), folder)
    assert caught.value.code == Exit.CHECKPOINT and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["olora", "corda", "loftq", "lora_ga", "pissa"])
def test_starts_that_change_the_base_are_refused(saved, kind):
    folder, path = saved
    change(path, init_lora_weights=kind)
    with pytest.raises(CheckpointError, match=f"init_lora_weights '{kind}'"):
        peft.open_adapter(str(path), folder)


ROOT = "base_model.model.model.layers."
BAD_TENSORS = {
    "no such layer": lambda t: {k.replace("layers.3", "layers.9"): v for k, v in t.items()},
    "is missing": lambda t: {k: v for k, v in t.items() if k != f"{ROOT}2.self_attn.q_proj.lora_B.weight"},
    "of shape [4, 31]": lambda t: t | {f"{ROOT}2.self_attn.q_proj.lora_A.weight": torch.zeros(4, 31)},
    "use_dora": lambda t: t | {f"{ROOT}2.self_attn.q_proj.lora_magnitude_vector": torch.zeros(48)},
    "lora_embedding_A": lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 96)},
    "lora_B.bias": lambda t: t | {f"{ROOT}2.self_attn.q_proj.lora_B.bias": torch.zeros(48)},
    "no place": lambda t: t | {"base_model.model.score.weight": torch.zeros(2, 32)},
    "model's of [96, 32]": lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(97, 32)},
}


@pytest.mark.parametrize("told", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_before_the_base_is_loaded(saved, told):
    folder, path = saved
    change_tensors(path, BAD_TENSORS[told])
    expected = {"no such layer": "no linear layer"}.get(told, re.escape(told))
    with pytest.raises(CheckpointError, match=expected) as caught:
        peft.open_adapter(str(path), folder)
    assert "\n" not in str(caught.value)


def test_adapter_of_another_model_is_refused(saved, tmp_path):
    _, path = saved
    for case, told in (("gpt2", "is no linear layer of .*c_attn"), ("qwen3", "of shape")):
        build(case, tmp_path / case, **({} if case == "gpt2" else {"hidden_size": 48}))
        with pytest.raises(CheckpointError, match=told):
            peft.open_adapter(str(path), open_folder(tmp_path / case))


@pytest.mark.parametrize("keep", [0, 30, -7])
def test_damaged_adapter_is_refused(saved, keep):
    folder, path = saved
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        peft.open_adapter(str(path), folder)


@pytest.mark.parametrize("what", ["no folder", "no weights", "no json"])
def test_missing_parts_of_an_adapter_are_named(saved, what, tmp_path):
    folder, path = saved
    if what == "no folder":
        path = tmp_path / "nowhere"
    elif what == "no weights":
        (path / "adapter_model.safetensors").unlink()
    else:
        (path / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError):
        peft.open_adapter(str(path), folder)


def test_layers_of_a_pattern_of_peft_are_read_from_the_keys(oracle, tmp_path):
    options = {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": ["layers"]}
    path, expected = theirs_of(oracle, build("llama", tmp_path / "base"), tmp_path, options)
    same(row_logits(ours_on(open_folder(tmp_path / "base"), path), IDS), expected)


def test_merge_casts_once_to_the_dtype_of_the_base(saved, tmp_path):
    folder, path = saved
    save_model(load_model(folder), folder, tmp_path / "half", dtype=torch.bfloat16)
    exact = load_model(open_folder(tmp_path / "half"))
    peft.apply(exact, peft.open_adapter(str(path), folder))
    lora.merge(exact)
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)):
        merge(str(path), str(tmp_path / f"m{dtype}"), str(tmp_path / "half"), dtype)
        found = open_folder(tmp_path / f"m{dtype}")
        assert found.dtype == expected
        for name, p in load_model(found).named_parameters():
            assert torch.equal(p, exact.get_parameter(name).to(expected).float()), name


def test_merge_refuses_to_overwrite_what_it_reads(saved, tmp_path):
    _, path = saved
    for target in (tmp_path / "base", path):
        with pytest.raises(UsageError):
            merge(str(path), str(target), str(tmp_path / "base"))


def test_rows_of_neox_alternate_head_by_head():
    fused = Stored("query_key_value.weight", ("q", "k", "v"), heads=2)
    q, k, v = fused.split(torch.arange(12.0)[:, None], [4, 4, 4])
    assert [part[:, 0].tolist() for part in (q, k, v)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_every_case_of_the_tests_is_known():
    assert set(FOUR) <= set(CASES) and set(TIED) <= set(CASES)
