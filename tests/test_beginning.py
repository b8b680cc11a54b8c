"""A beginning that rows have in common, computed once: the same losses and gradients as when every row has its own."""

from dataclasses import replace

import pytest
import torch
from model_fixtures import (
    CPU,
    assert_equal_gradients,
    gradients,
    make_model,
    make_row,
    make_rows,
    model_folder,
    random_ids,
)
from test_training import steps_of_weights

from sftcli.model import training
from sftcli.model.adapters.lora import adapt
from sftcli.model.attention import Group, RowAttention, Sight, attend
from sftcli.model.batches import WORTH_SHARING, common_beginning, forwards
from sftcli.model.checkpoint import load_model, open_folder
from sftcli.model.scoring import score_rows
from sftcli.model.training import accumulate
from sftcli.recipe import Lora, Loss
from sftcli.rows import IGNORE

BEGINNING = random_ids(WORTH_SHARING + 3, 99)


def rows_of(rests=(5, 9, 2, 9, 30), untrained=2, **columns):
    """Rows with one beginning; of each rest the first tokens are not trained."""
    rows = []
    for i, n in enumerate(rests):
        ids = random_ids(n, i)
        labels = [IGNORE] * (len(BEGINNING) + min(untrained, n - 1)) + ids[min(untrained, n - 1) :]
        rows.append(make_row([*BEGINNING, *ids], labels, f"r{i}", **columns))
    return rows


def step_of(model, rows, share, limit=1000, options=None):
    model.train()
    model.zero_grad()
    sums = accumulate(model, rows, limit, CPU, options or Loss(), share=share)
    return sums, gradients(model)


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tmp_path):
    return make_model(tmp_path / "m", request.param)


@pytest.mark.parametrize("heads", [(6, 6), (6, 2)], ids=str)
def test_attention_of_a_shared_beginning_equals_that_of_whole_rows_forward_and_backward(heads):
    shared, rests = 20, [3, 3, 50]
    generator = torch.Generator().manual_seed(1)

    def drawn(count):
        return torch.randn(shared + sum(rests), count, 16, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = drawn(heads[0]), drawn(heads[1]), drawn(heads[1])
    grad = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    attention = RowAttention([Group(2, 3), Group(1, 50)], shared)
    found = attention(Sight(0, 0.3), q, k, v)

    def whole_rows():
        parts = [t[shared:].split(rests) for t in (q, k, v)]
        mixed = []
        for row in zip(*parts, strict=True):
            whole = (
                torch.cat([t[:shared], rest]).transpose(0, 1)[None] for t, rest in zip((q, k, v), row, strict=True)
            )
            mixed.append(attend(*whole, None, Sight(0, 0.3))[0].transpose(0, 1))
        return torch.cat([mixed[0][:shared], *(row[shared:] for row in mixed)])

    expected = whole_rows()
    torch.testing.assert_close(found, expected)
    of_found, of_expected = (torch.autograd.grad(result, (q, k, v), grad) for result in (found, expected))
    for one, other in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(one, other)


def test_shared_beginning_gives_the_losses_and_gradients_of_whole_rows(model):
    rows = rows_of()
    assert common_beginning(rows) == len(BEGINNING)
    for options in (Loss(), Loss(label_smoothing=0.1, z_loss=1e-2, reduction="example")):
        whole, expected = step_of(model, rows, False, options=options)
        shared, found = step_of(model, rows, True, options=options)
        assert shared.loss == pytest.approx(whole.loss, rel=1e-6)
        assert_equal_gradients(found, expected, 1e-5)
        assert (shared.tokens, shared.trained, shared.weight) == (whole.tokens, whole.trained, whole.weight)


def test_shared_beginning_is_computed_once(model):
    rows, seen = rows_of(), []
    hook = model.blocks[0].mlp.register_forward_hook(lambda module, x, y: seen.append(len(x[0])))
    for share in (True, False):
        step_of(model, rows, share)
    hook.remove()
    rests = sum(len(row.input_ids) - len(BEGINNING) for row in rows)
    assert seen == [len(BEGINNING) + rests, 5 * len(BEGINNING) + rests]


def test_adapter_under_a_shared_beginning_has_the_gradients_of_whole_rows(tmp_path):
    folder = open_folder(model_folder(tmp_path / "m", "llama"))
    model = load_model(folder)
    adapt(model, folder.family, Lora(targets="all-linear", rank=2), 0)
    model.gradient_checkpointing = True
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    (_, expected), (_, found) = (step_of(model, rows_of(), share, 60) for share in (False, True))
    assert_equal_gradients(found, expected, 1e-5)


def test_forwards_hold_more_rows_where_a_beginning_stands_once():
    lengths = [len(row.input_ids) for row in rows_of()]  # 19 and 2, 5, 9, 9, 30
    assert [sorted(part) for part in forwards(lengths, 50)] == [[0, 2], [1], [3], [4]]
    assert [sorted(part) for part in forwards(lengths, 50, len(BEGINNING))] == [[0, 1, 2, 3], [4]]


def test_scores_of_rows_with_one_beginning_equal_those_of_each_row_alone(model):
    rows = rows_of()
    alone = [score for row in rows for score in score_rows(model, [row], 1000, CPU)]
    for together, one in zip(score_rows(model, rows, 1000, CPU), alone, strict=True):
        assert together.row is one.row
        assert together.nll == pytest.approx(one.nll, abs=1e-5)


def test_no_more_is_shared_than_rows_have_alike_before_they_are_scored():
    rows = rows_of()
    assert common_beginning(rows) == len(BEGINNING)
    assert common_beginning(rows[:1]) == 0
    for place in (len(BEGINNING) - 1, WORTH_SHARING):
        other = make_row([*BEGINNING[:place], 3 + (BEGINNING[place] == 3), *random_ids(4, 8)], id="other")
        other.labels = [IGNORE] * place + other.input_ids[place:]
        # its label at `place` is scored one before
        assert common_beginning([*rows, other]) == (place - 1 if place > WORTH_SHARING else 0)
    short = make_row(BEGINNING[: WORTH_SHARING + 1], [IGNORE] * (WORTH_SHARING + 1), "short")
    assert common_beginning([*rows, short]) == WORTH_SHARING  # one of its tokens is left
    assert common_beginning(make_rows([40] * 3)) == 0
    assert common_beginning([*rows, make_row([*BEGINNING, *random_ids(2000, 5)])]) == 0  # it saves too little


@pytest.mark.parametrize(
    "columns",
    [{"align": "same"}, {"order": 0}, {"position_ids": 0}, {"block_position_ids": 0}, {"token_type_ids": 0}],
    ids=str,
)
def test_rows_that_are_not_plainly_causal_share_nothing(columns):
    rows = rows_of()
    for name, value in columns.items():
        setattr(rows[1], name, value if name == "align" else list(range(len(rows[1].input_ids))))
    assert common_beginning(rows) == 0
    rows = rows_of()
    rows[0].next_sentence_label = 1
    assert common_beginning(rows) == 0


def test_models_with_windows_caps_or_prefixes_share_nothing(tmp_path):
    model = make_model(tmp_path / "m", "llama")
    assert model.can_share
    config = model.config
    for changed in (
        replace(config, windows=(4,) * config.layers),
        replace(config, attention_cap=30.0),
    ):
        model.config = changed
        assert not model.can_share
    model.config = config
    model.prefix = torch.nn.Identity()
    assert not model.can_share


def test_noise_is_drawn_for_whole_rows(model, monkeypatch):
    def refused(*given):
        raise AssertionError("a beginning was shared")

    monkeypatch.setattr(training, "common_beginning", refused)
    step_of(model, rows_of(), True, options=Loss(neftune=5.0))
    step_of(model, rows_of(), False)
    with pytest.raises(AssertionError, match="shared"):
        step_of(model, rows_of(), True)


def test_dropout_is_drawn_for_whole_rows_and_a_run_without_it_shares(tmp_path, monkeypatch):
    base, given = model_folder(tmp_path / "m", "llama"), []
    real = training.accumulate

    def accumulate(*rest, share):
        given.append(share)
        return real(*rest, share=share)

    monkeypatch.setattr(training, "accumulate", accumulate)
    for settings in ((), ("dropout=0.1",)):
        steps_of_weights(base, rows_of(), "batch_rows=5", *settings)
    assert given == [True, False]
