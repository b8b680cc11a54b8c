"""The one model: equal to transformers, to itself row by row, and to the visibility rule."""

import json
import weakref

import pytest
import safetensors.torch
import torch
from model_fixtures import (
    CPU,
    PRESETS,
    VOCABULARY,
    assert_equal_gradients,
    empty_folder,
    gradients,
    make_model,
    make_row,
    make_rows,
    model_folder,
    model_of,
    random_ids,
    row_logits,
)
from torch import nn

from sftcli.errors import CheckpointError, Exit, UsageError
from sftcli.model.attention import PAD, Group, RowAttention, Sight, Tokens, attend, visible
from sftcli.model.batches import groups_of, make_batch
from sftcli.model.checkpoint import load_model, open_folder, save_model, upstream_tensors
from sftcli.model.memory import estimate
from sftcli.model.tensorfile import INDEX, WEIGHTS
from sftcli.model.training import Engine, accumulate
from sftcli.recipe import Init, Train
from sftcli.stages.init import parameters

IDS = random_ids(23, 7)
SIGHT = Sight(layer=0, scale=8**-0.5)  # of heads of width 8


@pytest.fixture(params=PRESETS)
def preset(request):
    return request.param


@pytest.fixture
def folder(preset, tmp_path):
    return model_folder(tmp_path / preset, preset)


@pytest.fixture
def model(folder):
    return model_of(folder)


# ---- transformers


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is the oracle here: pip install '.[test]'")


def their_logits(transformers, folder, ids=IDS):
    """transformers' logits (T, V) of one row, in float32 and with its plain attention."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return theirs(torch.tensor([ids])).logits[0]


def assert_equal_logits(transformers, folder):
    ours = row_logits(model_of(folder), IDS)
    assert float(ours.std()) > 0.5  # these logits can tell models apart
    torch.testing.assert_close(ours, their_logits(transformers, folder), atol=2e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_folder_reloaded_by_transformers_gives_equal_logits(transformers, preset, tied, tmp_path):
    made = model_folder(tmp_path / "made", preset, tied=tied)
    saved = tmp_path / "saved"
    save_model(model_of(made), open_folder(made), saved, stops=[2, 3])
    assert_equal_logits(transformers, saved)
    generation = transformers.GenerationConfig.from_pretrained(saved)
    assert generation.eos_token_id == [2, 3]
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    assert tokenizer.decode(tokenizer("A river.")["input_ids"]) == "A river."


def test_saved_config_says_the_dtype_of_its_weights(transformers, tmp_path):
    made = model_folder(tmp_path / "made", "llama")
    change_config(made, torch_dtype="bfloat16")
    save_model(model_of(made), open_folder(made), tmp_path / "saved", stops=[])
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.float32


def randomise_theirs(model):
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        is_norm = p.ndim == 1 and name.endswith("weight")
        p.data = 1 + 0.4 * noise if is_norm else 0.3 * noise


LLAMAS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention biases only": {"attention_bias": True},
    "wide heads": {"head_dim": 12},
    "one key head": {"num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "large theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}
GPT2S = {"plain": {}, "untied": {"tie_word_embeddings": False}, "narrow": {"n_inner": 40, "layer_norm_epsilon": 1e-3}}


def save_theirs(transformers, kind, switches, path):
    sizes = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "llama":
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(**(sizes | shape | {"num_key_value_heads": 2} | switches))
        theirs = transformers.LlamaForCausalLM(config)
    else:
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | shape | switches)))
    randomise_theirs(theirs)
    theirs.save_pretrained(path)


@pytest.mark.parametrize(("kind", "name"), [*(("llama", name) for name in LLAMAS), *(("gpt2", name) for name in GPT2S)])
def test_what_transformers_saves_loads_with_equal_logits(transformers, kind, name, tmp_path):
    save_theirs(transformers, kind, (LLAMAS if kind == "llama" else GPT2S)[name], tmp_path / "m")
    ids = [i % 97 for i in IDS]
    ours = row_logits(model_of(tmp_path / "m"), ids)
    torch.testing.assert_close(ours, their_logits(transformers, tmp_path / "m", ids), atol=2e-5, rtol=0)


def test_shards_of_transformers_load_as_one_model(transformers, tmp_path):
    save_theirs(transformers, "llama", {}, tmp_path / "whole")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert (tmp_path / "shards" / INDEX).is_file()
    ids = [i % 97 for i in IDS]
    assert torch.equal(row_logits(model_of(tmp_path / "shards"), ids), row_logits(model_of(tmp_path / "whole"), ids))


def test_old_spelling_of_theta_gives_the_same_logits(tmp_path):
    folder = model_folder(tmp_path / "m", "llama", rope_theta=123.0)
    new = row_logits(model_of(folder), IDS)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    assert config["rope_theta"] == 123.0
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    assert torch.equal(row_logits(model_of(folder), IDS), new)
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}))
    assert not torch.allclose(row_logits(model_of(folder), IDS), new, atol=1e-3)


def test_gpt2_file_of_the_hub_without_prefix_and_with_buffers_loads(tmp_path):
    folder = model_folder(tmp_path / "m", "gpt2")
    before = row_logits(model_of(folder), IDS)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    safetensors.torch.save_file(bare, folder / WEIGHTS)
    assert torch.equal(row_logits(model_of(folder), IDS), before)


def test_what_is_saved_loads_bit_for_bit(folder, model, tmp_path):
    save_model(model, open_folder(folder), tmp_path / "again", stops=[])
    again = model_of(tmp_path / "again")
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert all(torch.equal(p, dict(again.named_parameters())[n]) for n, p in model.named_parameters())


def test_folder_without_weights_is_drawn_from_the_seed(preset, tmp_path):
    folder = open_folder(empty_folder(tmp_path / "m", preset))
    assert not folder.has_weights
    first, same, other = (load_model(folder, seed).embedding.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.02, rel=0.1)


# ---- one row at a time, micro-batches, weights


def test_padding_free_logits_equal_one_row_at_a_time(model):
    rows = make_rows([5, 9, 5, 1, 14, 9])
    batch = make_batch(rows)
    with torch.no_grad():
        logits = model.eval().logits(model.hidden(batch.ids, batch.positions, batch.attention))
    for row, part in zip(batch.rows, logits.split([len(row.input_ids) for row in batch.rows]), strict=True):
        torch.testing.assert_close(part, row_logits(model, row.input_ids), atol=1e-5, rtol=1e-5)


def test_tokens_of_one_row_change_no_logit_of_another(model):
    rows = make_rows([5, 9, 5, 14])
    changed = [*rows]
    changed[1] = make_row([(i + 1) % VOCABULARY for i in rows[1].input_ids], id="r1")
    logits = []
    for these in (rows, changed):
        batch = make_batch(these)
        with torch.no_grad():
            out = model.eval().logits(model.hidden(batch.ids, batch.positions, batch.attention))
        parts = out.split([len(row.input_ids) for row in batch.rows])
        logits.append({row.id: part for row, part in zip(batch.rows, parts, strict=True)})
    for name in ("r0", "r2", "r3"):
        assert torch.equal(logits[0][name], logits[1][name])
    assert not torch.allclose(logits[0]["r1"], logits[1]["r1"], atol=1e-2)


def test_token_changes_the_logits_of_its_own_and_later_positions_only(model):
    ids = random_ids(8, 3)
    before = row_logits(model, ids)
    for j in range(len(ids)):
        other = [*ids[:j], (ids[j] + 1) % VOCABULARY, *ids[j + 1 :]]
        difference = (row_logits(model, other) - before).abs().amax(-1)
        assert [bool(d > 1e-3) for d in difference] == [i >= j for i in range(len(ids))]


class Held:
    """Something that a graph holds."""


def test_forward_leaves_no_graph_in_memory_for_the_next(monkeypatch, tmp_path):
    model = make_model(tmp_path / "m", "llama")
    plain, held = model.forward, []

    def forward(*given):
        assert all(reference() is None for reference in held)
        found, mark = plain(*given), Held()
        found["nll"].total.register_hook(lambda gradient, mark=mark: None)
        held.append(weakref.ref(mark))
        return found

    monkeypatch.setattr(model, "forward", forward)
    accumulate(model, make_rows([5, 7, 9]), 1, CPU)
    assert len(held) == 3


def test_tied_table_learns_the_sum_of_what_embedding_and_head_learn(tmp_path):
    path = model_folder(tmp_path / "m", "llama", tied=True)
    one, two = model_of(path), model_of(path)
    assert one.head.weight is one.embedding.weight
    two.head.weight = nn.Parameter(two.head.weight.detach().clone())
    for model in (one, two):
        accumulate(model, make_rows([5, 7, 9]), 9, CPU)
    torch.testing.assert_close(one.head.weight.grad, two.head.weight.grad + two.embedding.weight.grad)


def step_gradients(model, rows, micro_batch_tokens):
    model.train()
    model.zero_grad()
    sums = accumulate(model, rows, micro_batch_tokens, CPU)
    return sums, gradients(model)


def test_micro_batches_of_one_row_give_the_gradients_of_one_batch(model):
    rows = make_rows([5, 9, 3, 12, 7, 7, 20, 4], prompt=2)
    whole, expected = step_gradients(model, rows, 1000)
    single, found = step_gradients(model, rows, 1)
    assert single.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (single.tokens, single.trained, single.weight) == (67, 51, 51)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert_equal_gradients(found, expected, 1e-6)


def test_gradients_are_those_of_plain_autograd(model):
    rows = make_rows([5, 9, 3], prompt=2)
    _, found = step_gradients(model, rows, 1000)
    model.zero_grad()
    total = 0
    for row in rows:
        length = len(row.input_ids)
        hidden = model.hidden(torch.tensor(row.input_ids), torch.arange(length), RowAttention([Group(1, length)]))
        targets = torch.tensor(row.labels[1:])
        total = total + torch.nn.functional.cross_entropy(model.head(hidden)[:-1], targets, reduction="sum")
    (total / 11).backward()
    assert_equal_gradients(found, gradients(model), 1e-6)


def test_row_of_weight_one_half_twice_equals_weight_one_once(model):
    rows = make_rows([6, 9])
    halves = [make_row(row.input_ids, row.labels, row.id, loss_weight=[0.5] * len(row.input_ids)) for row in rows]
    once, expected = step_gradients(model, rows, 1000)
    twice, found = step_gradients(model, halves * 2, 1000)
    assert twice.loss == pytest.approx(once.loss, rel=1e-6)
    assert_equal_gradients(found, expected, 1e-6)


def test_row_without_labels_changes_nothing(model):
    rows = make_rows([6, 9])
    once, expected = step_gradients(model, rows, 1000)
    more, found = step_gradients(model, [*rows, make_row(random_ids(7, 5), [-100] * 7, "silent")], 4)
    assert (more.loss, more.trained) == (pytest.approx(once.loss, rel=1e-6), once.trained)
    assert_equal_gradients(found, expected, 1e-6)


def test_gradient_checkpointing_gives_equal_gradients(model):
    rows = make_rows([6, 9, 9])
    _, expected = step_gradients(model, rows, 1000)
    model.gradient_checkpointing = True
    _, found = step_gradients(model, rows, 1000)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name])


def test_dropout_is_off_when_scoring_and_on_when_training(model):
    rows = make_rows([6, 9, 9])
    model.set_dropout(0.5)
    assert torch.equal(row_logits(model, IDS), row_logits(model, IDS))
    assert step_gradients(model, rows, 1000)[0].loss != step_gradients(model, rows, 1000)[0].loss
    model.set_dropout(0)
    assert step_gradients(model, rows, 1000)[0].loss == step_gradients(model, rows, 1000)[0].loss
    for dropout in (model.dropout, model.blocks[1].dropout):  # of the embedding, of what a block adds
        dropout.p = 0.5
        assert step_gradients(model, rows, 1000)[0].loss != step_gradients(model, rows, 1000)[0].loss
        dropout.p = 0


def test_bfloat16_autocast_on_the_cpu_gives_nearly_the_float32_loss(model):
    rows = make_rows([6, 9, 20])
    exact, expected = step_gradients(model, rows, 1000)
    model.zero_grad()
    found = accumulate(model, rows, 1000, Engine(torch.device("cpu"), torch.bfloat16))
    assert found.loss != exact.loss
    assert found.loss == pytest.approx(exact.loss, rel=0.05)
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in model.parameters())
    a, b = (torch.cat([g[name].flatten() for name in expected]) for g in (gradients(model), expected))
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.95


# ---- the visibility rule


def naive_attention(q, k, v, seen):
    """Softmax attention of one row, written out: q (T, H, D), k and v (T, G, D), seen (T, T)."""
    share = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // share].T / q.shape[2] ** 0.5
        out[:, head] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, head // share]
    return out


@pytest.mark.parametrize("order", [None, [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3], [0] * 6, [0, 0, 1, 1, 2, 2]])
def test_row_attention_equals_the_visibility_rule(order):
    rows = [make_row(range(1, 7), order=order, id="a"), make_row(range(1, 7), id="b"), make_row(range(1, 4), id="c")]
    batch = make_batch(rows)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(15, heads, 8, generator=generator) for heads in (4, 2, 2))
    found = batch.attention(SIGHT, q, k, v)
    for row, start in zip(batch.rows, (0, 3, 9), strict=True):
        part = slice(start, start + len(row.input_ids))
        index = torch.arange(len(row.input_ids))
        tokens = Tokens(torch.zeros_like(index), torch.tensor(row.order or index.tolist()), index)
        expected = naive_attention(q[part], k[part], v[part], visible(tokens, tokens))
        torch.testing.assert_close(found[part], expected, atol=1e-6, rtol=1e-5)
    plain = RowAttention([Group(1, 3), Group(2, 6)])(SIGHT, q, k, v)
    assert torch.allclose(plain, found, atol=1e-6) == (order in (None, [0, 1, 2, 3, 4, 5]))


def test_fast_kernel_equals_the_general_rule_for_causal_rows():
    rows = make_rows([7, 7, 3])
    general = [make_row(row.input_ids, id=row.id, order=list(range(len(row.input_ids)))) for row in rows]
    fast, slow = (groups_of(sorted(these, key=lambda row: len(row.input_ids))) for these in (rows, general))
    assert [group.seen(None, torch.device("cpu")) is None for group in fast] == [True, True]
    assert [group.seen(None, torch.device("cpu")) is None for group in slow] == [False, False]
    q, k, v = (torch.randn(17, heads, 8, generator=torch.Generator().manual_seed(3)) for heads in (4, 2, 2))
    found, expected = (RowAttention(groups)(SIGHT, q, k, v) for groups in (fast, slow))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 5, 7, 8])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_windows_and_caps_equal_attention_written_out(window, cap):
    rows = [make_row(range(7)), make_row(range(7), order=[0, 0, 0, 3, 4, 5, 6]), make_row(range(3))]
    batch = make_batch(rows)
    q, k, v = (torch.randn(17, heads, 8, generator=torch.Generator().manual_seed(4)) for heads in (4, 2, 2))
    found = batch.attention(Sight(0, 0.5, window, cap), q, k, v)
    for row, start in zip(batch.rows, (0, 3, 10), strict=True):
        part = slice(start, start + len(row.input_ids))
        for i in range(len(row.input_ids)):
            order = row.order or list(range(len(row.input_ids)))
            keys = [j for j in range(len(row.input_ids)) if order[j] <= order[i] and i - j < window]
            for head in range(4):
                scores = k[part][keys, head // 2] @ q[part][i, head] * 0.5
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                expected = scores.softmax(0) @ v[part][keys, head // 2]
                torch.testing.assert_close(found[part][i, head], expected, atol=1e-6, rtol=1e-5)


def test_visible_is_the_tables_written_by_hand():
    def seen(row, order, window=None):
        index = torch.arange(len(row))
        tokens = Tokens(torch.tensor(row), torch.tensor(order), index)
        return visible(tokens, tokens, window).int().tolist()

    assert seen([0] * 4, [0, 1, 2, 3]) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert seen([0] * 4, [0, 0, 1, 2]) == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert seen([0] * 3, [0, 0, 0]) == [[1, 1, 1]] * 3
    assert seen([PAD, 0, 0, 0], [0, 0, 1, 2]) == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert seen([0, 0, 1, 1], [0, 1, 0, 1]) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert seen([0] * 4, [0, 1, 2, 3], window=2) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_pads_see_each_other_so_that_nothing_becomes_nan():
    index = torch.arange(4)
    tokens = Tokens(torch.tensor([[PAD, PAD, 0, 0]]), index[None], index[None])
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    assert bool(attend(q, k, v, visible(tokens, tokens)[:, None], SIGHT).isfinite().all())


def test_model_with_an_order_of_its_own_differs_from_the_causal_one(model):
    ids = random_ids(6, 4)
    losses = [
        accumulate(model.eval(), [make_row(ids, order=order)], 99, CPU).loss
        for order in (None, [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0] - losses[2]) > 1e-3


# ---- folders that are refused


def refused(folder, *words):
    """What loading this folder says; it must name all of `words`."""
    with pytest.raises(CheckpointError) as caught:
        load_model(open_folder(folder))
    assert caught.value.code == Exit.CHECKPOINT
    for word in words:
        assert word in str(caught.value)


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def test_unknown_family_is_refused_by_name(folder):
    change_config(folder, model_type="mamba")
    refused(folder, "model_type 'mamba' is not supported")


def test_unknown_rope_scaling_is_refused_by_name(tmp_path):
    folder = model_folder(tmp_path / "m", "llama")
    change_config(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4, "factor": 4})
    refused(folder, "RoPE scaling 'spiral'")
    change_config(folder, rope_parameters=None, rope_scaling={"type": "mrope", "factor": 2})
    refused(folder, "RoPE scaling 'mrope'")


def test_switches_that_the_model_lacks_are_refused_by_name(tmp_path):
    llama, gpt2 = model_folder(tmp_path / "llama", "llama"), model_folder(tmp_path / "gpt2", "gpt2")
    change_config(llama, hidden_act="mish")
    refused(llama, "hidden_act", "mish")
    change_config(gpt2, scale_attn_by_inverse_layer_idx=True)
    refused(gpt2, "scale_attn_by_inverse_layer_idx")


@pytest.mark.parametrize("value", [0, -1, 2.5, "12", None, 1 << 50, [4]])
def test_senseless_sizes_are_refused(folder, preset, value):
    change_config(folder, vocab_size=value)
    refused(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"num_key_value_heads": 3},
        {"num_key_value_heads": -2},
        {"head_dim": 7},
        {"head_dim": "8"},
        {"num_attention_heads": 0},
        {"rms_norm_eps": "small"},
        {"rope_parameters": {"rope_theta": "big"}},
        {"rope_parameters": [1]},
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_together_are_refused(values, tmp_path):
    folder = model_folder(tmp_path / "m", "llama")
    change_config(folder, **values)
    refused(folder)


def test_missing_tensor_is_named(folder):
    name = min(safetensors.torch.load_file(folder / WEIGHTS))
    change_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder, name, "missing")


def test_unexpected_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.surprise.weight": torch.zeros(2)}))
    refused(folder, "model.surprise.weight", "no place")


def test_tensor_of_another_shape_is_named_with_both_shapes(folder):
    name = min(safetensors.torch.load_file(folder / WEIGHTS))
    shape = list(safetensors.torch.load_file(folder / WEIGHTS)[name].shape)
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    refused(folder, name, "[3, 5]", str(shape))


def test_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(folder, model):
    embedding = model.embedding.weight.detach().clone()
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assert torch.equal(row_logits(model_of(folder), IDS), row_logits(model, IDS))
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    refused(folder, "lm_head.weight")


def test_pickled_weights_alone_are_refused(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "pickle")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 5, ""])
def test_index_that_points_outside_of_its_folder_is_refused(folder, name):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(folder, INDEX)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', "{"])
def test_index_of_another_form_is_refused(folder, content):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)
    refused(folder, INDEX)


def test_index_that_names_a_missing_shard_is_refused(folder):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-9.safetensors"}}))
    refused(folder, "model-9.safetensors")


def test_cut_off_weights_are_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    for keep in (len(data) - 1, len(data) // 2, 5, 0):
        (folder / WEIGHTS).write_bytes(data[:keep])
        refused(folder, WEIGHTS)


def test_damaged_or_missing_config_is_refused(folder):
    for content in ("{", "[]", "null", "\udcff"):
        (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        refused(folder, "config.json")
    (folder / "config.json").unlink()
    refused(folder, "config.json")


def test_gpt2_context_bounds_its_position_table(tmp_path):
    model = make_model(tmp_path / "m", "gpt2", context=16)
    assert model.config.context == len(model.position.weight) == 16


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mlp", [None, 40])
def test_parameters_are_counted_before_the_model_exists(preset, tied, mlp, tmp_path):
    options = Init(preset=preset, layers=2, width=32, heads=4, context=24, tied=tied, mlp_width=mlp)
    config = {"layers": 2, "width": 32, "heads": 4, "context": 24, "tied": tied, "mlp_width": mlp, "kv_heads": None}
    made = open_folder(empty_folder(tmp_path / "m", preset, **config))
    count = sum(p.numel() for p in load_model(made).parameters())
    assert parameters(options, VOCABULARY) == count
    assert estimate(made.config, Train(), 24, made.family)["parameters"] == count


# ---- shards and dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_are_as_large_as_asked_and_load_as_one_model(folder, model, dtype, tmp_path):
    save_model(model, open_folder(folder), tmp_path / "whole", dtype=dtype)
    save_model(model, open_folder(folder), tmp_path / "cut", dtype=dtype, shard_size="20KB")
    shards = sorted((tmp_path / "cut").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "cut" / INDEX).read_text())
    assert len(shards) > 1 and not (tmp_path / "cut" / WEIGHTS).exists()
    held = [safetensors.torch.load_file(shard) for shard in shards]
    sizes = [[t.numel() * t.element_size() for t in tensors.values()] for tensors in held]
    assert all(sum(size) <= 20_000 or len(size) == 1 for size in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert index["weight_map"] == {n: s.name for s, tensors in zip(shards, held, strict=True) for n in tensors}
    whole = safetensors.torch.load_file(tmp_path / "whole" / WEIGHTS)
    together = {name: tensor for tensors in held for name, tensor in tensors.items()}
    assert {t.dtype for t in whole.values()} == {dtype}
    assert whole.keys() == together.keys() and all(torch.equal(whole[n], together[n]) for n in whole)
    assert torch.equal(row_logits(model_of(tmp_path / "cut"), IDS), row_logits(model_of(tmp_path / "whole"), IDS))


def test_shards_and_dtype_of_ours_load_in_transformers(transformers, folder, model, tmp_path):
    save_model(model, open_folder(folder), tmp_path / "cut", dtype=torch.bfloat16, shard_size="20KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert theirs.dtype == torch.bfloat16
    ours = upstream_tensors(model_of(tmp_path / "cut"), open_folder(folder).family, torch.bfloat16)
    state = theirs.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.items())


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "5 PB", "0MB", "nanGB", ""])
def test_senseless_shard_sizes_are_refused(folder, model, text, tmp_path):
    with pytest.raises(UsageError, match="shard size"):
        save_model(model, open_folder(folder), tmp_path / "m", shard_size=text)
    assert list(tmp_path.glob("m*")) == []


def test_model_kept_in_bfloat16_holds_matrices_rounded_once_and_vectors_as_stored(folder):
    exact, short = load_model(open_folder(folder)), load_model(open_folder(folder), dtype=torch.bfloat16)
    for a, b in zip(exact.parameters(), short.parameters(), strict=True):
        kept = torch.bfloat16 if a.ndim >= 2 else torch.float32
        assert b.dtype == kept and torch.equal(a.to(kept), b)


def test_weights_stored_as_numbers_of_another_kind_are_refused(folder):
    change_tensors(folder, lambda tensors: tensors.update({name: t.double() for name, t in tensors.items()}))
    refused(folder, "stored as F64")


def test_header_that_lies_about_its_file_is_refused(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"][1] += 4
    text = json.dumps(header).encode().ljust(size)
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    refused(folder, "damaged")


def test_tensor_in_two_shards_is_refused(folder, model, tmp_path):
    save_model(model, open_folder(folder), tmp_path / "cut", shard_size="20KB")
    first, second = sorted((tmp_path / "cut").glob("model-*.safetensors"))[:2]
    both = safetensors.torch.load_file(first) | safetensors.torch.load_file(second)
    safetensors.torch.save_file(both, second)
    refused(tmp_path / "cut", "stored twice")


def test_what_is_wrong_is_told_before_memory_is_taken(folder, monkeypatch):
    change_tensors(folder, lambda tensors: tensors.pop(max(tensors)))
    monkeypatch.setattr("sftcli.model.tensorfile._mapped", lambda path: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match="missing"):
        open_folder(folder)
