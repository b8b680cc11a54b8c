"""The loss core against the vectors of GPT-NeoX, Hugging Face and MiniMind, torch's own function and autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import make_row

from sftcli.model import loss as loss_module
from sftcli.model.batches import make_batch, weight_of
from sftcli.model.loss import LossSum, projected_loss
from sftcli.rows import IGNORE, Row

LOGITS = torch.tensor([[2, 1, 0.1], [0.5, 2.5, 0.3], [1.5, 0.5, 2]])
#              <bos> where is the capital of China <sep> The capital is Beijing <eos>
HF2 = [1, 4, 5, 6, 7, 8, 9, 3, 10, 7, 5, 11, 2]
HF2_LABELS = [IGNORE] * 8 + [10, 7, 5, 11, 2]
HF4_B = [1, 4, 5, 6, 7, 8, 9, 3, 10, 2]
HF4_B_LABELS = [IGNORE] * 8 + [10, 2]


def z(b: int, length: int, classes: int = 12) -> torch.Tensor:
    """The deterministic test logits (length, classes)."""
    t, v = torch.arange(length)[:, None], torch.arange(classes)
    return ((3 * b + 5 * t + 7 * v + t * v) % 13) / 5


def score(logits: torch.Tensor, scored: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> LossSum:
    """The loss of given logits (T, V): one-hot hidden states make `hidden @ weight.T` equal to them."""
    return projected_loss(torch.eye(len(logits))[scored], logits.T.contiguous(), None, targets, weights)


def score_rows(rows: list[Row], numbers: list[int]) -> LossSum:
    """The loss of rows through the batch (which shifts), row i with the logits Z(numbers[i])."""
    batch = make_batch(rows)
    number_of = {row.id: number for row, number in zip(rows, numbers, strict=True)}
    logits = torch.cat([z(number_of[row.id], len(row.input_ids)) for row in batch.rows])
    return score(logits, batch.scored, batch.targets, batch.weights)


def mean(found: LossSum) -> float:
    return float(found.total / found.weight)


def test_neox_mask_gives_the_masked_mean():  # NX-1
    weights = torch.tensor([1.0, 0, 1])
    found = score(LOGITS, torch.arange(3), torch.tensor([0, 0, 2]), weights)
    assert found.nll.tolist() == pytest.approx([0.4170299, 2.2200496, 0.6041306], abs=1e-6)
    assert mean(found) == pytest.approx(0.5105803, abs=1e-6)
    assert float(found.nll.mean()) == pytest.approx(1.0804033, abs=1e-6)


def test_unmasked_labels_give_the_huggingface_mean():  # HF-1: labels [0, -100, 2]
    scored = torch.tensor([0, 2])
    found = score(LOGITS, scored, torch.tensor([0, 2]), torch.ones(2))
    assert found.nll.tolist() == pytest.approx([0.4170299, 0.6041306], abs=1e-6)
    assert float(found.total) == pytest.approx(1.0211606, abs=1e-6)
    assert mean(found) == pytest.approx(0.51058030128479, abs=1e-6)
    assert float(found.total) / 4 == pytest.approx(0.2552902, abs=1e-6)  # num_items_in_batch 4


def test_all_labels_ignored_is_a_sum_of_zero_and_not_nan():  # HF-1: all -100
    found = score(LOGITS, torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0))
    assert (float(found.total), float(found.weight)) == (0, 0)


def test_gradient_of_the_mean_is_the_one_written_down():  # HF-1
    weight = LOGITS.T.contiguous().requires_grad_()
    found = projected_loss(torch.eye(3)[[0, 2]], weight, None, torch.tensor([0, 2]), torch.ones(2))
    (found.total / found.weight).backward()
    expected = torch.tensor([[-0.1704994, 0.1212165, 0.0492829], [0, 0, 0], [0.1657495, 0.0609758, -0.2267253]])
    torch.testing.assert_close(weight.grad.T, expected, atol=1e-6, rtol=0)


def test_question_and_answer_row_has_the_loss_written_down():  # HF-2
    found = score_rows([make_row(HF2, HF2_LABELS)], [0])
    assert found.nll.tolist() == pytest.approx([2.738497, 3.412672, 2.397692, 3.355834, 3.855863], abs=1e-6)
    assert float(found.total) == pytest.approx(15.7605576, abs=2e-6)
    assert mean(found) == pytest.approx(3.1521115, abs=1e-6)


WRONG = {  # HF-3: name -> (labels, align, loss)
    "no shift": (HF2_LABELS, "same", 2.8451595),
    "mask not shifted": ([IGNORE] * 9 + HF2[9:], "next", 3.2555151),
    "double shift": ([*HF2_LABELS[1:], IGNORE], "next", 2.8379202),
    "<sep> also trained": ([IGNORE] * 7 + HF2[7:], "next", 3.0409107),
    "all tokens": (HF2, "next", 2.9353752),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_variants_have_their_own_numbers(name):
    labels, align, expected = WRONG[name]
    found = mean(score_rows([make_row(HF2, labels, align=align)], [0]))
    assert found == pytest.approx(expected, abs=1e-6)
    assert abs(found - 3.1521115) > 0.05


def test_accumulated_loss_divides_once_by_the_window():  # HF-4
    rows = [make_row(HF2, HF2_LABELS, "a"), make_row(HF4_B, HF4_B_LABELS, "b")]
    parts = [score_rows([row], [b]) for b, row in enumerate(rows)]
    assert float(parts[1].total) == pytest.approx(4.4596004, abs=1e-6)
    assert mean(parts[1]) == pytest.approx(2.2298002, abs=1e-6)
    window = sum(float(part.total) for part in parts) / weight_of(rows)
    assert window == pytest.approx(2.8885939, abs=1e-6)
    assert mean(score_rows(rows, [0, 1])) == pytest.approx(window, abs=1e-6)
    assert sum(map(mean, parts)) / 2 == pytest.approx(2.6909558, abs=1e-6)  # mean of means: wrong


def test_mask_after_a_reduced_loss_has_no_effect_and_ours_has():  # MM-3
    targets, mask = torch.tensor([0, 0, 2]), torch.tensor([1.0, 0, 1])
    reduced = F.cross_entropy(LOGITS, targets)  # the bug: reduction="none" forgotten
    assert float((reduced * mask).sum() / mask.sum()) == pytest.approx(1.0804033, abs=1e-6)
    assert mean(score(LOGITS, torch.arange(3), targets, mask)) == pytest.approx(0.5105803, abs=1e-6)


# ---- against torch and autograd


def case(bias: bool, n: int = 200, width: int = 24, classes: int = 50) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(n + bias)
    hidden = torch.randn(n, width, generator=generator).requires_grad_()
    weight = torch.randn(classes, width, generator=generator).requires_grad_()
    offset = torch.randn(classes, generator=generator).requires_grad_() if bias else None
    targets = torch.randint(0, classes, (n,), generator=generator)
    weights = torch.rand(n, generator=generator)
    weights[::5] = 0
    return [hidden, weight, offset, targets, weights]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 22], ids=["chunks of 64", "one chunk"])
def test_loss_and_gradients_equal_float64_autograd(bias, chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk)
    hidden, weight, offset, targets, weights = case(bias)
    found = projected_loss(hidden, weight, offset, targets, weights)
    (3 * found.total).backward()
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, offset)]
    logits = F.linear(*exact)
    nll = logits.logsumexp(-1) - logits.gather(1, targets[:, None]).squeeze(1)
    (3 * (nll * weights).sum()).backward()
    torch.testing.assert_close(found.total.double(), (nll * weights).sum(), atol=0, rtol=1e-6)
    torch.testing.assert_close(found.nll.double(), nll, atol=1e-5, rtol=0)
    for ours, reference in zip((hidden, weight, offset), exact, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), reference.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_loss_equals_torch_linear_cross_entropy(bias, monkeypatch):
    oracle = getattr(F, "linear_cross_entropy", None)
    if oracle is None:
        pytest.skip("this torch has no linear_cross_entropy")
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 1)
    hidden, weight, offset, targets, weights = case(bias)
    found = projected_loss(hidden, weight, offset, targets, weights)
    nll = oracle(hidden, weight, targets, linear_bias=offset, reduction="none")
    torch.testing.assert_close(found.nll, nll.detach(), atol=1e-5, rtol=1e-6)
    (ours,) = torch.autograd.grad(found.total, hidden)
    (theirs,) = torch.autograd.grad((nll * weights).sum(), hidden)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_accuracy_and_entropy_are_those_of_the_softmax():
    hidden, weight, _, targets, weights = case(bias=False)
    found = projected_loss(hidden, weight, None, targets, weights)
    p = (hidden @ weight.T).detach().double().softmax(-1)
    assert torch.equal(found.correct.bool(), p.argmax(-1) == targets)
    torch.testing.assert_close(found.entropy.double(), -(p * p.log()).sum(-1), atol=1e-4, rtol=0)
    flat = projected_loss(torch.zeros(1, 4), torch.zeros(7, 4), None, torch.tensor([3]), torch.ones(1))
    assert float(flat.entropy) == pytest.approx(math.log(7), abs=1e-6)


def test_weight_of_one_half_twice_equals_weight_one_once():
    hidden, weight, _, targets, weights = case(bias=False)
    once = projected_loss(hidden, weight, None, targets, weights)
    (one,) = torch.autograd.grad(once.total, weight)
    twice = projected_loss(
        torch.cat([hidden, hidden]), weight, None, targets.repeat(2), torch.cat([weights, weights]) / 2
    )
    (two,) = torch.autograd.grad(twice.total, weight)
    torch.testing.assert_close(twice.total, once.total)
    torch.testing.assert_close(twice.weight, once.weight)
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)


def test_frozen_head_gets_no_gradient_and_hidden_states_get_the_same():
    hidden, weight, _, targets, weights = case(bias=False)
    (full,) = torch.autograd.grad(projected_loss(hidden, weight, None, targets, weights).total, hidden)
    frozen = weight.detach()
    projected_loss(hidden, frozen, None, targets, weights).total.backward()
    assert frozen.grad is None
    assert torch.equal(hidden.grad, full)


def test_loss_under_bfloat16_autocast_is_near_the_float32_one():
    hidden, weight, offset, targets, weights = case(bias=True)
    exact = projected_loss(hidden, weight, offset, targets, weights)
    exact_grads = torch.autograd.grad(exact.total, (hidden, weight, offset))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = projected_loss(hidden, weight, offset, targets, weights)
    grads = torch.autograd.grad(found.total, (hidden, weight, offset))
    assert found.total.dtype == found.nll.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.float32] * 3
    assert found.total.item() == pytest.approx(exact.total.item(), rel=0.01)
    assert not torch.equal(found.nll, exact.nll)
    for ours, reference in zip(grads, exact_grads, strict=True):
        assert float((ours - reference).norm() / reference.norm()) < 0.02
