"""Choosing the next token: the distributions that the options promise, and streams that know only their row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcli.model.sampling import choose, filtered, gumbel_noise, repetition_penalised, stream
from sftcli.recipe import Generate

DRAWS = 4000


def draws(logits, options, seed=0):
    """How often each id is chosen over many independent rows."""
    streams = [stream(seed, "row", sample) for sample in range(DRAWS)]
    chosen = choose(logits.expand(DRAWS, -1), options, streams)
    return torch.bincount(chosen, minlength=len(logits)).double()


def chi_square(counts, p):
    expected = p.double() * counts.sum()
    likely = expected > 5
    assert counts[p == 0].sum() == 0
    return float(((counts - expected) ** 2 / expected)[likely].sum()), int(likely.sum()) - 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choices_follow_the_softmax(temperature):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, 0.2])
    counts = draws(logits, Generate(temperature=temperature))
    found, freedom = chi_square(counts, (logits / temperature).softmax(-1))
    assert found < freedom + 5 * math.sqrt(2 * freedom)
    wrong, _ = chi_square(counts, (logits / (2 * temperature)).softmax(-1))
    assert wrong > 5 * (freedom + 5 * math.sqrt(2 * freedom))


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}], ids=str)
def test_filtered_choices_follow_the_softmax_of_what_is_left(options):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, 0.2])
    p = logits.softmax(-1)
    kept = {"top_k": p >= 0.14, "top_p": p >= 0.2, "min_p": p >= 0.3 * p.max()}[next(iter(options))]
    assert 1 < int(kept.sum()) < 5
    counts = draws(logits, Generate(temperature=1.0, **options))
    found, freedom = chi_square(counts, torch.where(kept, p, 0) / p[kept].sum())
    assert found < freedom + 5 * math.sqrt(2 * freedom)


def test_temperature_zero_is_the_best_score_and_uses_no_noise():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert choose(logits, Generate(), []).tolist() == [1, 0]


def test_top_k_keeps_the_k_best():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert filtered(logits, Generate(temperature=1, top_k=2)).isfinite().tolist() == [[False, True, False, True]]
    assert filtered(logits, Generate(temperature=1, top_k=99)).isfinite().all()
    assert filtered(logits, Generate(temperature=1, top_k=0)).isfinite().all()


scores = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(scores, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_of_the_best_that_holds_the_mass(values, top_p):
    logits = torch.tensor([values])
    kept = filtered(logits, Generate(temperature=1, top_p=top_p)).isfinite()[0]
    p = logits.softmax(-1)[0].double()
    assert kept.any()
    assert float(p[kept].sum()) >= top_p - 1e-5
    if bool((~kept).any()):
        assert float(p[kept].min()) >= float(p[~kept].max())
    without_the_last = float(p[kept].sum() - p[kept].min())
    assert int(kept.sum()) == 1 or without_the_last < top_p + 1e-5


@settings(max_examples=100, deadline=None)
@given(scores, st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_at_least_that_share_of_the_best(values, min_p):
    logits = torch.tensor([values])
    kept = filtered(logits, Generate(temperature=1, min_p=min_p)).isfinite()[0]
    p = logits.softmax(-1)[0]
    assert bool(kept[p.argmax()])
    near = (p - min_p * p.max()).abs() < 1e-6
    assert torch.equal(kept | near, (p >= min_p * p.max()) | near)


def test_filters_treat_every_row_by_itself():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 20, generator=generator)
    options = Generate(temperature=0.7, top_k=8, top_p=0.8, min_p=0.02)
    together = filtered(logits, options)
    assert torch.equal(together, torch.cat([filtered(row[None], options) for row in logits]))


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    logits = torch.tensor([[4.0, -4.0, 4.0, -4.0, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    assert repetition_penalised(logits, seen, 2.0).tolist() == [[2.0, -8.0, 4.0, -4.0, 0.0]]
    assert torch.equal(repetition_penalised(logits, seen, 1.0), logits)


def test_stream_is_a_function_of_seed_row_and_sample():
    def noise(*which):
        return tuple(gumbel_noise([stream(*which)], 4)[0].tolist())

    assert noise(0, "a", 0) == noise(0, "a", 0)
    different = {noise(s, r, n) for s in (0, 1) for r in ("a", "b", "0") for n in (0, 1)}
    assert len(different) == 12


def test_noise_of_a_row_does_not_depend_on_its_neighbours():
    alone = gumbel_noise([stream(0, "b", 0)], 7)
    among = gumbel_noise([stream(0, name, 0) for name in "abc"], 7)
    assert torch.equal(among[1:2], alone)


def test_sampling_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    choose(
        torch.randn(2, 5, generator=torch.Generator().manual_seed(1)), Generate(temperature=1), [stream(0, "a", 0)] * 2
    )
    assert torch.equal(before, torch.get_rng_state())
