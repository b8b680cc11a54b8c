"""Rows with an order and block positions in the model: who sees whom, the loss, and the table beside the weights."""

import json
import shutil

import pytest
import torch
from model_fixtures import PRESETS, make_row, model_folder, model_of, random_ids, randomised, row_logits

from sftcli.model.batches import make_batch
from sftcli.model.checkpoint import add_block_positions, load_model, open_folder, save_model
from sftcli.model.gpt import GPT
from sftcli.model.loss import projected_loss
from sftcli.model.tensorfile import EXTRA
from sftcli.rows import Document, encode_row
from sftcli.text.objectives.blank_infilling import Blanks, Marks, infilled

MARKS = Marks(3, 4, 5)
SHAPES = [
    (6, [(2, 3), (4, 6)], [1, 0]),
    (9, [(1, 4), (5, 7)], [0, 1]),
    (5, [(2, 4)], [0]),
    (11, [(0, 1), (2, 9)], [1, 0]),
]


def row_of(size, spans, order, seed=0, ids=None):
    text = ids or random_ids(size, seed)
    return infilled(Document(id=f"{size}", input_ids=text, segments=[]), Blanks(spans, order), MARKS)


ROWS = [row_of(*shape, seed=i) for i, shape in enumerate(SHAPES)]


@pytest.fixture(params=PRESETS)
def model(request, tmp_path):
    """A model with a table of block positions that matters."""
    return with_table(model_folder(tmp_path / "m", request.param))


def with_table(path) -> GPT:
    folder = open_folder(path)
    add_block_positions(folder)
    return randomised(load_model(folder)).eval()


@torch.no_grad()
def logits_of(model, *rows):
    """Logits of each row, in the order given."""
    batch = make_batch(rows)
    logits = model.logits(model.hidden(batch.ids, batch.positions, batch.attention, batch.blocks))
    pieces = dict(zip(map(id, batch.rows), logits.split([len(r.input_ids) for r in batch.rows]), strict=True))
    return [pieces[id(row)] for row in rows]


def test_glm_1_has_the_loss_of_the_vector_and_a_shifted_one_does_not():
    row = row_of(6, [(2, 3), (4, 6)], [1, 0], ids=[6, 7, 8, 9, 10, 11])
    t, v = torch.arange(10)[:, None], torch.arange(12)[None]
    z = ((5 * t + 7 * v + t * v) % 13).double() / 5  # of batch row 0

    def loss(shift):
        batch = make_batch([row])
        hidden, head = z[batch.scored - shift].float(), torch.eye(12)  # logits = Z
        found = projected_loss(hidden, head, None, batch.targets, batch.weights)
        return found.total.item() / batch.weights.sum().item(), found.nll.tolist()

    mean, nll = loss(0)
    assert nll == pytest.approx([3.612672, 2.484907, 3.738497, 3.012672, 2.397692], abs=1e-5)
    assert mean == pytest.approx(3.0492879, abs=1e-6)
    assert loss(1)[0] == pytest.approx(2.9931307, abs=1e-6)


def test_a_batch_of_rows_equals_the_rows_one_by_one(model):
    plain = make_row(random_ids(9, 77))
    rows = [ROWS[1], plain, *ROWS]
    for row, together in zip(rows, logits_of(model, *rows), strict=True):
        torch.testing.assert_close(together, logits_of(model, row)[0], atol=1e-5, rtol=1e-5)
    for name, value in model(make_batch(rows)).items():
        apart = [model(make_batch([row]))[name] for row in rows]
        assert float(value.total.detach()) == pytest.approx(sum(float(one.total.detach()) for one in apart), rel=1e-5)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_part_a_is_seen_by_all_and_part_b_by_what_comes_after(model, number):
    """Every pair of positions: an id changes the logits of exactly the positions that see it."""
    row = ROWS[number]
    (before,) = logits_of(model, row)
    for j in range(len(row.input_ids)):
        changed = make_row([*row.input_ids], row.labels, **shape_of(row))
        changed.input_ids[j] = 299 - row.input_ids[j]
        moved = (logits_of(model, changed)[0] - before).abs().amax(1)
        for i, order in enumerate(row.order):
            sees = row.order[j] <= order
            assert (moved[i] > 1e-4) if sees else (moved[i] == 0), (i, j)


def shape_of(row):
    names = ("align", "position_ids", "block_position_ids", "order")
    return {name: getattr(row, name) for name in names}


def test_both_positions_of_a_filled_token_count(model):
    row = ROWS[1]
    (before,) = logits_of(model, row)
    for name in ("position_ids", "block_position_ids"):
        other = [value + (t == len(row.order) - 1) for t, value in enumerate(getattr(row, name))]
        moved = logits_of(model, make_row(row.input_ids, row.labels, **shape_of(row) | {name: other}))[0] - before
        assert moved[-1].abs().max() > 1e-4 and moved[:-1].abs().max() == 0


def test_a_new_table_changes_nothing_at_first(tmp_path):
    path = model_folder(tmp_path / "m", "llama")
    folder = open_folder(path)
    add_block_positions(folder)
    ids = random_ids(20, 5)
    assert torch.equal(row_logits(load_model(folder), ids), row_logits(model_of(path), ids))
    assert not load_model(folder).block_position.weight.any()


def test_a_model_from_nothing_draws_the_table_and_all_else_as_without_it(tmp_path):
    path = model_folder(tmp_path / "m", "gpt2")
    (path / "model.safetensors").unlink()
    folder = open_folder(path)
    without = dict(load_model(folder, seed=3).named_parameters())
    add_block_positions(folder)
    found = dict(load_model(folder, seed=3).named_parameters())
    assert float(found.pop("block_position.weight").detach().std()) == pytest.approx(0.02, rel=0.1)
    assert found.keys() == without.keys() and all(torch.equal(found[name], without[name]) for name in found)


# ---- through the commands


@pytest.fixture
def rows(lines):
    """A file of rows as `sft mask` writes them."""
    return lines(*(json.loads(line(row)) for row in ROWS), name="rows.jsonl")


def line(row):

    return encode_row(row, {})


TRAIN = ("--max-steps", 4, "--set", "sample_rows=0", "--set", "batch_rows=2", "--set", "checkpoint_every=2")


def test_training_makes_the_table_and_keeps_it_beside_the_weights(sft, rows, tmp_path):
    base = model_folder(tmp_path / "base", "llama")
    result = sft("train", rows, "-m", base, "-o", tmp_path / "run", "--lr", "1e-2", *TRAIN)
    assert result.code == 0, result.err
    made = tmp_path / "run" / "model"
    names = set(open_folder(made).entries)
    assert names == set(open_folder(base).entries)  # what transformers loads has no key too many
    table = model_of(made).block_position.weight
    assert table.any() and (made / EXTRA).is_file()
    scores = sft("evaluate", rows, "-m", tmp_path / "run")
    assert scores.code == 0, scores.err
    (made / EXTRA).unlink()
    refused = sft("evaluate", rows, "-m", tmp_path / "run")
    assert refused.code == 3 and "needs a table of block positions" in refused.err


def test_a_resumed_run_ends_in_the_same_table(sft, rows, tmp_path):
    base = model_folder(tmp_path / "base", "llama")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sft("train", rows, "-m", base, "-o", whole, *TRAIN).code == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-000004")
    shutil.rmtree(parts / "model")
    assert sft("train", rows, "-m", base, "-o", parts, "--resume", *TRAIN).code == 0
    assert (parts / "model" / EXTRA).read_bytes() == (whole / "model" / EXTRA).read_bytes()


def test_an_adapter_needs_a_base_that_has_the_table(sft, rows, tmp_path):
    base = model_folder(tmp_path / "base", "llama")
    refused = sft("train", rows, "-m", base, "-o", tmp_path / "a", "--adapter", "lora", *TRAIN)
    assert refused.code == 2 and "table of block positions, which the base lacks" in refused.err
    assert sft("train", rows, "-m", base, "-o", tmp_path / "run", *TRAIN).code == 0
    adapted = sft("train", rows, "-m", tmp_path / "run", "-o", tmp_path / "b", "--adapter", "lora", *TRAIN)
    assert adapted.code == 0, adapted.err
    assert sft("evaluate", rows, "-m", tmp_path / "b").code == 0
    assert sft("merge", tmp_path / "b", "-o", tmp_path / "merged").code == 0
    assert (tmp_path / "merged" / EXTRA).read_bytes() == (tmp_path / "run" / "model" / EXTRA).read_bytes()


def test_the_end_of_piece_is_the_stop_token_of_the_model(sft, tmp_path, lines):
    base = model_folder(tmp_path / "base", "llama", controls="glm")
    from sftcli.text.folder import load_codec, stop_ids

    data = lines(*({"input_ids": random_ids(20, n)} for n in range(4)))
    made = tmp_path / "rows.jsonl"
    assert sft("mask", data, "-m", base, "--objective", "glm", "-o", made).code == 0
    assert sft("train", made, "-m", base, "-o", tmp_path / "run", "--max-steps", 1, "--set", "sample_rows=0").code == 0
    assert stop_ids(tmp_path / "run" / "model") == [load_codec(base).added["<|endofpiece|>"]]


@pytest.mark.parametrize("name", ["position_ids", "block_position_ids"])
@pytest.mark.parametrize("value", [-1, 64])
def test_positions_outside_of_the_context_are_refused(sft, tmp_path, lines, name, value):
    base = model_folder(tmp_path / "base", "llama")
    row = json.loads(line(ROWS[0]))
    row[name][3] = value
    result = sft("train", lines(json.loads(line(ROWS[1])), row), "-m", base, "-o", tmp_path / "run", *TRAIN)
    assert result.code == 3 and f"$.{name}" in result.err and "number 2" in result.err, result.err


def test_a_damaged_extra_file_is_named(sft, rows, tmp_path):
    from sftcli.model.tensorfile import write_tensors

    base = model_folder(tmp_path / "base", "llama")
    for tensors, told in (({"x": torch.zeros(1)}, "tensor x"), ({"block_position.weight": torch.zeros(3, 3)}, "shape")):
        write_tensors(base / EXTRA, tensors)
        result = sft("evaluate", rows, "-m", base)
        assert result.code == 5 and told in result.err


def test_transformers_loads_the_folder_and_sees_its_text_causally(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    folder = open_folder(model_folder(tmp_path / "m", "llama"))
    add_block_positions(folder)
    model = load_model(folder)
    save_model(model, folder, tmp_path / "saved")
    assert (tmp_path / "saved" / EXTRA).is_file()
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not told["unexpected_keys"] and not told["missing_keys"]
    ids = random_ids(12, 3)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(row_logits(model, ids), expected, atol=2e-5, rtol=0)
