"""The cache under the decoding loop: what prompts share is encoded once, and memory is moved only where it must."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import PRESETS, make_model, random_ids, row_logits
from test_decoding import assert_equal_outputs, complete, table_for
from test_prefix import prefixed

from sftcli.model.cache import WORTH_SHARING, Held, Table, can_continue, hold_beginning, prefill
from sftcli.model.decoding import _closed_up
from sftcli.model.growth import Blanks, Grown, Prompt
from sftcli.model.rope import Dynamic, Rope
from sftcli.recipe import Generate

START = random_ids(20, 99)
PROMPTS = [Prompt(START + random_ids(n, n), str(n)) for n in (3, 11, 6, 1, 17, 8, 2)]


@cache
def model_for(kind, preset):
    with TemporaryDirectory() as folder:
        model = make_model(Path(folder, "m"), preset)
    for block in model.blocks:
        changed = {"window": 7 if kind == "window" else None, "cap": 5.0 if kind == "cap" else None}
        block.attention.sight = replace(block.attention.sight, **changed)
    return prefixed(model) if kind == "prefix" else model


@cache
def alone(kind, preset, **options):
    """Every prompt decoded by itself."""
    return [complete(model_for(kind, preset), [prompt], **options)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["plain", "window", "cap", "prefix"])
def test_a_common_beginning_is_encoded_once_and_the_answers_stay(kind, preset, side, monkeypatch):
    model, options = model_for(kind, preset), {"max_new_tokens": 7}
    apart = [replace(completion) for completion in alone(kind, preset, **options)]
    options["pad_side"] = side
    fed, hidden = [], model.hidden

    def counting(ids, positions, attention, blocks=None):
        fed.append(0 if isinstance(attention, Table) else len(ids))
        return hidden(ids, positions, attention, blocks)

    monkeypatch.setattr(model, "hidden", counting)
    together = complete(model, PROMPTS, batch_size=3, **options)
    assert sum(fed) == len(START) + sum(len(prompt.ids) - len(START) for prompt in PROMPTS)
    fed.clear()
    complete(model, PROMPTS, batch_size=3, deterministic=True, **options)
    assert sum(fed) == sum(len(prompt.ids) for prompt in PROMPTS)  # nothing depends on the others there
    monkeypatch.undo()
    for found, other in zip(together, apart, strict=True):
        other.number = found.number
    assert assert_equal_outputs(model, PROMPTS, Generate(**options), together, apart) == 0


def test_the_same_prompt_several_times_is_encoded_up_to_its_last_token(tmp_path):
    model, held, table = make_model(tmp_path / "m", "llama").eval(), Held(), None
    rows = [Grown(START), Grown(START), Grown([*START, 7])]
    with torch.no_grad():
        hold_beginning(model, rows, held)
        assert held.ids == START[:-1]
        table, other = Table(model, "left"), Table(model, "left")
        found, expected = prefill(model, table, rows, held), prefill(model, other, rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(table.mask, other.mask)
    for mine, theirs in zip(table.keys + table.values, other.keys + other.values, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_short_beginnings_blanks_and_lengths_that_rotate_are_encoded_whole(tmp_path):
    model, held = make_model(tmp_path / "m", "llama").eval(), Held()
    begun = START[: WORTH_SHARING - 1]
    hold_beginning(model, [Grown([*begun, 7, 8]), Grown([*begun, 9, 8])], held)
    filling = Blanks((2,), 4)
    hold_beginning(model, [Grown(START, filling), Grown(START, filling)], held)
    assert held == Held()
    ropes = (None, Rope(8, 1e4, scaling=Dynamic(2.0, 16)))
    turning = SimpleNamespace(config=replace(model.config, ropes=ropes))
    assert not can_continue(turning, [Grown(START)])


# ---- memory


@settings(max_examples=80)
@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 30))
def test_rows_from_the_end_take_the_places_of_those_that_left(stays, steps):
    table, lengths = table_for("left"), range(1, len(stays) + 1)
    flat = torch.cat([torch.full((length, 1, 1), float(length)) for length in lengths])
    table.add(lengths, [flat], [-flat])
    for _ in range(steps):
        table.open_column()
    before = table.keys[0].untyped_storage().data_ptr()
    staying = [i for i, stay in enumerate(stays) if stay]
    places = _closed_up(list(staying))
    assert sorted(places) == staying
    assert sum(to != slot for to, slot in enumerate(places)) <= len(stays) - len(staying)
    table.keep(places)
    assert table.keys[0].untyped_storage().data_ptr() == before
    for i, slot in enumerate(places):
        real = table.keys[0][i, 0, : table.width, 0][table.mask[i, : table.width]]
        assert real.tolist() == [slot + 1.0] * (slot + 1) + [0.0] * steps
        assert torch.equal(table.values[0][i], -table.keys[0][i])


def test_a_row_that_fits_enters_and_columns_open_without_new_memory():
    table, flat = table_for("left"), torch.ones(30, 1, 1)
    table.add([10, 20], [flat], [flat])
    before = table.keys[0].untyped_storage().data_ptr()
    for length in (20, 5, 12, 20):
        table.keep([1])
        table.add([length], [flat[:length]], [flat[:length]])
        for _ in range(8):
            table.open_column()
        assert table.keys[0].untyped_storage().data_ptr() == before


@pytest.mark.parametrize("preset", PRESETS)
def test_a_prefix_stays_before_the_columns_when_the_longest_row_leaves(preset, tmp_path):
    model = prefixed(make_model(tmp_path / "m", preset)).eval()
    ids, table = random_ids(4, 1), Table(model, "left")
    with torch.no_grad():
        prefill(model, table, [random_ids(25, 2), ids])
        table.keep([1])
        assert table.width == 4
        found = model.logits(model.hidden(torch.tensor([7]), table.open_column(), table))
    torch.testing.assert_close(found[0], row_logits(model, [*ids, 7])[-1], atol=1e-5, rtol=1e-5)
