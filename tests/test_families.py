"""Every family equals transformers: logits, gradients, decoding, old and new configurations, what is saved."""

import json
import shutil

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from family_cases import (
    CASES,
    FAMILIES,
    LENGTH,
    ORIGINAL,
    SHORT,
    TOLERANCE,
    built,
    change_config,
    ids_of,
    older,
    read_config,
    their_logits,
    write_config,
)
from model_fixtures import make_row, model_of, row_logits

from sftcli.errors import CheckpointError
from sftcli.model.batches import make_batch
from sftcli.model.cache import Table, padded, positions_of, prefill
from sftcli.model.checkpoint import load_model, open_folder, save_model, upstream_tensors
from sftcli.model.decoding import Prompt, generate, in_order
from sftcli.model.layout import laid_out
from sftcli.model.tensorfile import WEIGHTS, write_tensors
from sftcli.recipe import Generate
from sftcli.text.folder import stop_ids

TIE = 1e-3  # two best scores closer than this may swap
BY_LENGTH = ("llama dynamic", "phi3 longrope")  # transformers lets rows of a batch change each other's rotation
IDS = ids_of(LENGTH)


@pytest.fixture(autouse=True)
def transformers():
    return pytest.importorskip("transformers", reason="transformers is the oracle here: pip install '.[test]'")


VARIANTS = [name for name in CASES if name not in FAMILIES and name not in BY_LENGTH]


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in CASES])
def case(request, transformers):
    return built(request.param)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


# ---- logits


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name):
    case = built(name)
    assert 0.5 < float(case.logits.std()) < 2  # these logits can tell models apart
    assert_close(row_logits(model_of(case.path), IDS), case.logits)


def test_weights_laid_out_for_decoding_give_the_same_logits(case):
    model = model_of(case.path)
    laid_out(model, len(IDS))
    assert_close(row_logits(model, IDS), case.logits)


def test_older_configuration_gives_the_same_logits(case, tmp_path):
    folder = shutil.copytree(case.path, tmp_path / "older")
    config = older(read_config(folder))
    assert "rope_parameters" not in config and "dtype" not in config
    write_config(folder, config)
    assert torch.equal(row_logits(model_of(folder), IDS), row_logits(model_of(case.path), IDS))


def test_logits_within_and_beyond_the_original_context_equal_transformers():
    for name in BY_LENGTH:
        made = built(name)
        model = model_of(made.path)
        for length in (SHORT, ORIGINAL, ORIGINAL + 1, LENGTH):
            made.theirs(
                torch.tensor([IDS[:2]])
            )  # transformers keeps the frequencies of the longest row until a short one
            assert_close(row_logits(model, IDS[:length]), their_logits(made.theirs, IDS[:length]))
        beginning = row_logits(model, IDS[:SHORT])
        assert not torch.allclose(row_logits(model, IDS)[:SHORT], beginning, atol=1e-3)  # length matters


@pytest.mark.parametrize("name", [*FAMILIES, *BY_LENGTH])
def test_rows_laid_end_to_end_equal_transformers_one_by_one(name):
    made = built(name)
    rows = [make_row(ids_of(length, length), id=f"r{length}") for length in (LENGTH, 5, 19, SHORT)]
    batch, model = make_batch(rows), model_of(made.path).eval()
    with torch.no_grad():
        logits = model.logits(model.hidden(batch.ids, batch.positions, batch.attention))
    parts = logits.split([len(row.input_ids) for row in batch.rows])
    for row, part in zip(batch.rows, parts, strict=True):
        made.theirs(torch.tensor([IDS[:2]]))
        assert_close(part, their_logits(made.theirs, row.input_ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_transformers(name):
    """Of the mean loss over a row, tensor by tensor in the family's names."""
    made = built(name)
    theirs = dict(made.theirs.named_parameters())
    loss = F.cross_entropy(made.theirs(torch.tensor([IDS])).logits[0, :-1], torch.tensor(IDS[1:]))
    expected = dict(zip(theirs, torch.autograd.grad(loss, list(theirs.values())), strict=True))
    expected = {key.replace("lm_head", "embed_out") if name == "gpt_neox" else key: g for key, g in expected.items()}
    model = model_of(made.path).train()
    found = model(make_batch([make_row(IDS)]))["nll"]
    (found.total / found.weight).backward()
    assert float(found.total / found.weight) == pytest.approx(float(loss), abs=TOLERANCE)
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that they are joined and transposed as the weights are
    gradients = upstream_tensors(model, open_folder(made.path).family)
    assert set(gradients) == set(expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], atol=TOLERANCE, rtol=1e-4)


# ---- batched decoding


def decoded_logits(model, prompts, following):
    """Logits (B, steps, V) after each prompt and after each of the tokens that follow, through the batched cache."""
    model.eval()
    with torch.no_grad():
        table = Table(model, "left")
        found = [prefill(model, table, prompts)]
        for ids in zip(*following, strict=True):
            positions = table.open_column()
            found.append(model.logits(model.hidden(torch.tensor(ids), positions, table)))
    return torch.stack(found, 1)


def their_padded_logits(theirs, rows):
    """transformers' logits (B, T, V) of rows padded on the left."""
    ids, mask = padded(rows, "left", pad=2)
    with torch.no_grad():
        return theirs(ids, attention_mask=mask, position_ids=positions_of(mask)).logits


def test_left_padded_decoding_equals_transformers(case):
    lengths, steps = ((4, 9, 7), 5) if case.name in BY_LENGTH else ((4, 13, 9), 7)  # beyond any window
    rows = [ids_of(length + steps, seed) for seed, length in enumerate(lengths)]
    prompts = [row[:-steps] for row in rows]
    found = decoded_logits(model_of(case.path), prompts, [row[-steps:] for row in rows])
    one_by_one = [their_logits(case.theirs, row)[-steps - 1 :] for row in rows]
    assert_close(found, torch.stack(one_by_one))
    if case.name not in BY_LENGTH:
        assert_close(found, their_padded_logits(case.theirs, rows)[:, -steps - 1 :])


# ---- saved folders


def test_saved_folder_is_the_one_that_transformers_wrote(case, tmp_path):
    saved = tmp_path / "saved"
    change_config(shutil.copytree(case.path, tmp_path / "base"), some_key={"kept": [1, 2]})
    folder = open_folder(tmp_path / "base")
    save_model(load_model(folder), folder, saved, stops=[7, 8])
    expected, found = (safetensors.torch.load_file(path / WEIGHTS) for path in (case.path, saved))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert read_config(saved) == read_config(tmp_path / "base")
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [7, 8]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_what_we_saved_with_equal_logits(name, transformers, tmp_path):
    folder = open_folder(built(name).path)
    save_model(load_model(folder), folder, tmp_path / "saved", stops=[1])
    if name == "minimind":
        change_config(tmp_path / "saved", model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()), told
    assert torch.equal(their_logits(theirs.eval(), IDS), built(name).logits)


BUFFERS = {
    "gpt2": ("transformer.h.0.attn.bias", "transformer.h.3.attn.masked_bias"),
    "gpt_neo": ("transformer.h.0.attn.attention.bias", "transformer.h.3.attn.attention.masked_bias"),
    "gpt_neox": ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"),
    "gpt_neox rotary": ("gpt_neox.layers.2.attention.rotary_emb.inv_freq",),
    "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq",),
    "gptj": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
}


def changed_weights(name, path, renamed=(), dropped=(), **added):
    """A copy of a case's folder with other tensors in its file."""
    folder = shutil.copytree(built(name).path, path)
    tensors = safetensors.torch.load_file(folder / WEIGHTS) | added
    tensors = {dict(renamed).get(key, key): value for key, value in tensors.items() if key not in dropped}
    write_tensors(folder / WEIGHTS, tensors)
    return folder


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_of_older_files_are_no_weights(name, tmp_path):
    folder = changed_weights(name, tmp_path / "old", **{key: torch.ones(1, 1, 4, 4) for key in BUFFERS[name]})
    assert_close(row_logits(model_of(folder), IDS), built(name).logits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
def test_buffers_may_be_stored_as_no_weight_is(dtype, tmp_path):
    mask = torch.ones(1, 1, 4, 4, dtype=dtype)  # Pythia's are bytes
    folder = changed_weights("gpt_neox", tmp_path / "old", **dict.fromkeys(BUFFERS["gpt_neox"], mask))
    assert_close(row_logits(model_of(folder), IDS), built("gpt_neox").logits)


def test_weights_stored_as_whole_numbers_are_refused(tmp_path):
    name = "gpt_neox.layers.0.attention.dense.weight"
    whole = torch.ones(32, 32, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=f"{name} is stored as I64") as caught:
        model_of(changed_weights("gpt_neox", tmp_path / "whole", **{name: whole}))
    assert caught.value.hint == "only F32, BF16, F16 can be loaded"


def test_head_of_neox_has_two_names(tmp_path):
    folder = changed_weights("gpt_neox", tmp_path / "renamed", renamed=[("embed_out.weight", "lm_head.weight")])
    assert_close(row_logits(model_of(folder), IDS), built("gpt_neox").logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_missing_and_unknown_tensors_are_refused_by_name(name, tmp_path):
    own = sorted(safetensors.torch.load_file(built(name).path / WEIGHTS))
    missing = next(key for key in own if key.endswith("weight") and "0" in key)
    with pytest.raises(CheckpointError, match=missing):
        model_of(changed_weights(name, tmp_path / "missing", dropped=[missing]))
    unknown = missing.replace("weight", "lora")
    with pytest.raises(CheckpointError, match=unknown):
        model_of(changed_weights(name, tmp_path / "unknown", **{unknown: torch.ones(2)}))


# ---- keys of config.json that change what the weights mean, or do not

KEYS = [
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"] * 2}),  # Ministral
    ("olmo3", {"hidden_act": "gelu"}),
    ("gemma2", {"hidden_activation": "gelu"}),
    ("gemma3_text", {"hidden_activation": "gelu"}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("olmo3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("llama", {"pretraining_tp": 2}),  # Llama 2: how it was trained
    ("llama", {"partial_rotary_factor": 1.0}),
]


@pytest.mark.parametrize(("name", "keys"), KEYS, ids=str)
def test_a_changed_key_changes_logits_as_in_transformers(name, keys, transformers, tmp_path):
    folder = shutil.copytree(built(name).path, tmp_path / "changed")
    change_config(folder, **keys)
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    expected = their_logits(theirs, IDS)
    assert_close(row_logits(model_of(folder), IDS), expected)
    assert torch.equal(expected, built(name).logits) == (name == "llama")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "partial_rotary_factor", 0.5),
        ("gemma3_text", "attn_logit_softcapping", 2.0),
        ("gemma2", "attn_logit_softcapping", 0.0),
        ("granite", "attention_multiplier", 0.0),
        ("olmo3", "hidden_act", "mish"),
    ],
)
def test_values_that_transformers_does_not_follow_or_nobody_can_are_refused_by_name(name, key, value, tmp_path):
    folder = shutil.copytree(built(name).path, tmp_path / "changed")
    change_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=key):
        open_folder(folder)


# ---- greedy generation


def their_completion(theirs, prompt, count, stops=None):
    theirs.generation_config.eos_token_id = stops
    with torch.no_grad():
        made = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
        )
    return made[0, len(prompt) :].tolist()


def greedy_tokens(made, lengths, count):
    """(prompt, our completion) of a batch."""
    prompts = [ids_of(length, 50 + length) for length in lengths]
    options = Generate(max_new_tokens=count, temperature=0, batch_size=len(prompts))
    asked = [Prompt(ids, str(i)) for i, ids in enumerate(prompts)]
    ours = list(in_order(generate(model_of(made.path), asked, options, stops=[])))
    assert all(len(completion.ids) == count for completion in ours)
    return [(prompt, completion.ids) for prompt, completion in zip(prompts, ours, strict=True)]


def assert_tokens_are_their_best(made, lengths, count):
    """Each token is the best by transformers' scores after all before it: what its own greedy decoding would choose."""
    ties = 0
    for prompt, ids in greedy_tokens(made, lengths, count):
        scores = their_logits(made.theirs, prompt + ids)[len(prompt) - 1 : -1]
        behind = scores.amax(1) - scores[range(count), ids]
        assert behind.max() < TIE, f"token {int(behind.argmax())} is {float(behind.max()):.2g} behind the best"
        ties += int((behind > 0).sum())
    assert ties <= 1


def assert_same_greedy_tokens(made, lengths, count):
    """Token by token in transformers, too: where the rotation of a beginning depends on the length."""
    ties = 0
    for prompt, ids in greedy_tokens(made, lengths, count):
        expected = their_completion(made.theirs, prompt, count)
        if ids == expected:
            continue
        same = next(t for t, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b)
        best, second = their_logits(made.theirs, prompt + expected[:same])[-1].topk(2).values.tolist()
        assert best - second < TIE, f"differs at token {same} by {best - second:.2g}"
        ties += 1
    assert ties <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_of_a_batch_equal_transformers_one_by_one(name):
    assert_tokens_are_their_best(built(name), (3, 11, 7, 16, 5), 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_of_rarer_variants_equal_transformers(name):
    assert_tokens_are_their_best(built(name), (3, 11, 7, 16, 5), 32)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_greedy_tokens_within_the_original_context_equal_transformers(name):
    assert_same_greedy_tokens(built(name), (3, 7, 5), ORIGINAL - 7)


def test_greedy_tokens_beyond_the_original_context_equal_transformers():
    assert_same_greedy_tokens(built("phi3 longrope"), (ORIGINAL + 1, ORIGINAL + 5), 20)


def test_greedy_tokens_across_the_original_context_equal_transformers():
    assert_same_greedy_tokens(built("phi3 longrope"), (ORIGINAL - 4, ORIGINAL - 1), 20)


def test_list_of_stops_ends_generation_as_in_transformers(tmp_path):
    made, prompt = built("glm"), ids_of(9)
    endless = their_completion(made.theirs, prompt, 20)
    folder = shutil.copytree(made.path, tmp_path / "glm")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, endless[7]]}))
    change_config(folder, eos_token_id=2)  # generation_config.json wins
    assert stop_ids(folder) == [1, endless[7]]
    options = Generate(max_new_tokens=20, temperature=0)
    (completion,) = generate(model_of(folder), [Prompt(prompt, "p")], options, stop_ids(folder))
    expected = their_completion(made.theirs, prompt, 20, stops=[1, endless[7]])
    assert completion.finish_reason == "stop"
    assert [*completion.ids, expected[-1]] == expected
    assert expected[-1] in (1, endless[7]) and len(expected) <= 8
