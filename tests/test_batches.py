"""Rows -> steps -> padding-free batches, against lists written by hand."""

from itertools import chain, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import make_row, make_rows

from sftcli.model.batches import (
    aligned,
    groups_of,
    make_batch,
    micro_batches,
    shuffled,
    steps_in_run,
    steps_of,
    weight_of,
)
from sftcli.model.training import Plan
from sftcli.recipe import Train
from sftcli.rows import IGNORE

LENGTHS = [5, 3, 8, 2, 9, 4, 7, 1, 6, 3, 2]


# ---- the shift


def test_labels_of_a_causal_row_are_scored_one_position_earlier():
    row = make_row([4, 5, 6, 7], [IGNORE, IGNORE, 6, 7], align="next")
    assert list(aligned(row)) == [(1, 6, 1.0), (2, 7, 1.0)]


def test_labels_of_a_same_aligned_row_are_not_shifted():
    row = make_row([4, 5, 6, 7], [IGNORE, 9, IGNORE, 8], align="same")
    assert list(aligned(row)) == [(1, 9, 1.0), (3, 8, 1.0)]


def test_label_on_the_first_token_has_nothing_before_it_and_is_not_scored():
    row = make_row([4, 5, 6], [4, IGNORE, 6])
    assert list(aligned(row)) == [(1, 6, 1.0)]
    assert row.trained() == 1


def test_weights_move_with_their_labels():
    row = make_row([4, 5, 6], [IGNORE, 5, 6], loss_weight=[0.0, 0.5, 2.0])
    assert list(aligned(row)) == [(0, 5, 0.5), (1, 6, 2.0)]
    assert weight_of([row, make_row([1, 2])]) == 3.5


def test_batch_is_the_hand_written_table():
    rows = [make_row([4, 5, 6], [IGNORE, 5, 6], "a"), make_row([7, 8], [IGNORE, 8], "b")]
    batch = make_batch(rows)
    assert [row.id for row in batch.rows] == ["b", "a"]
    assert batch.ids.tolist() == [7, 8, 4, 5, 6]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2]
    assert batch.scored.tolist() == [0, 2, 3]
    assert batch.targets.tolist() == [8, 5, 6]
    assert batch.weights.tolist() == [1, 1, 1]
    assert batch.scored_per_row == [1, 2]
    assert [(g.rows, g.length, g.order) for g in batch.attention.groups] == [(1, 2, None), (1, 3, None)]


def test_positions_of_a_row_go_before_the_default():
    batch = make_batch([make_row([4, 5, 6], position_ids=[0, 0, 5])])
    assert batch.positions.tolist() == [0, 0, 5]


def test_rows_with_an_order_of_their_own_see_by_the_general_rule():
    (group,) = groups_of([make_row([1, 2, 3]), make_row([1, 2, 3], order=[0, 0, 1])])
    assert group.seen(None, torch.device("cpu"))[:, 0].int().tolist() == [
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]],
    ]


# ---- steps


def test_steps_are_the_next_rows_that_fit_and_at_least_one():
    lengths = [4, 4, 9, 1, 30, 2, 8]
    order = [0, 1, 2, 3, 4, 5, 6]
    assert list(steps_of(order, lengths, Train(batch_tokens=10))) == [[0, 1], [2, 3], [4], [5, 6]]
    assert list(steps_of(order, lengths, Train(batch_rows=3))) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(steps_of([], lengths, Train())) == []


options_of_a_run = st.one_of(
    st.builds(
        lambda n, e, s: Train(batch_tokens=n, epochs=e, seed=s),
        st.integers(1, 30),
        st.integers(1, 3),
        st.integers(0, 99),
    ),
    st.builds(
        lambda n, e, s: Train(batch_rows=n, epochs=e, seed=s), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99)
    ),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), options_of_a_run)
def test_every_row_comes_exactly_once_an_epoch_and_no_step_outgrows_its_limit(lengths, options):
    plan = Plan(lengths, options)
    seen: list[int] = []
    epochs = 0
    for rows, _, ends in plan.from_step(0):
        seen += rows
        tokens = sum(lengths[i] for i in rows)
        assert len(rows) == 1 or (
            len(rows) <= options.batch_rows if options.batch_rows else tokens <= options.batch_tokens
        )
        if ends:
            assert sorted(seen) == list(range(len(lengths)))
            seen, epochs = [], epochs + 1
    assert (seen, epochs) == ([], options.epochs)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), options_of_a_run, st.integers(0, 70))
def test_plan_from_a_later_step_is_the_rest_of_the_whole_plan(lengths, options, step):
    whole = list(Plan(lengths, options).from_step(0))
    assert list(Plan(lengths, options).from_step(step)) == whole[step:]
    assert len(whole) == Plan(lengths, options).steps == steps_in_run(lengths, options)


def test_order_is_a_function_of_seed_and_epoch_only():
    assert shuffled(50, 3, 2) == shuffled(50, 3, 2)
    orders = [tuple(shuffled(50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    torch.manual_seed(1)
    before = torch.get_rng_state()
    shuffled(50, 3, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_micro_batch_tokens_never_changes_a_step():
    plans = [
        list(Plan(LENGTHS, Train(batch_tokens=12, micro_batch_tokens=n, epochs=2)).from_step(0)) for n in (1, 7, 999)
    ]
    assert plans[0] == plans[1] == plans[2]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 30))
def test_micro_batches_hold_every_row_of_the_step_within_the_limit(lengths, limit):
    rows = make_rows(lengths)
    parts = list(micro_batches(rows, limit))
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in rows)
    assert all(len(part) == 1 or sum(len(row.input_ids) for row in part) <= limit for part in parts)


@pytest.mark.parametrize("epochs", [0.25, 1.0, 1.5, 2.01])
def test_fractional_epochs_end_inside_an_epoch(epochs):
    options = Train(batch_rows=2, epochs=epochs)  # 11 rows: 6 steps an epoch
    plan = list(Plan(LENGTHS, options).from_step(0))
    assert len(plan) == {0.25: 2, 1.0: 6, 1.5: 9, 2.01: 13}[epochs]
    assert plan[-1][1] >= epochs > plan[-1][1] - 1 / 6 - 1e-9
    assert sum(ends for *_, ends in plan) == int(epochs)


def test_max_steps_is_exactly_so_many_whatever_the_epochs():
    for steps in (1, 5, 20):
        options = Train(batch_rows=2, epochs=1, max_steps=steps)
        plan = list(Plan(LENGTHS, options).from_step(0))
        assert len(plan) == steps
    repeated = [rows for rows, _, _ in plan]
    assert sorted(chain(*repeated[:6])) == sorted(chain(*repeated[6:12])) == list(range(11))
    assert repeated[:6] != repeated[6:12]  # another order in the second epoch


def test_epochs_seen_grow_evenly():
    shares = [epoch for _, epoch, _ in islice(Plan(LENGTHS, Train(batch_rows=2)).from_step(0), 7)]
    assert shares == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 7 / 6])
