"""Pieces with backward passes of their own equal torch's composed functions: values, gradients, and less that is kept."""

import pytest
import torch
import torch.nn.functional as F

from sftcli.model.loss import projected_loss
from sftcli.model.pieces import ACTIVATIONS, embed, gated, rms_norm, turned_


def gradients(function, *inputs):
    """(value, gradients of a random weighing of it) in the inputs' own dtype."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    weighing = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, inputs, weighing)


def assert_equal_to_float64(ours, plain, *inputs):
    value, found = gradients(ours, *inputs)
    exact, expected = gradients(plain, *(t.double() for t in inputs))
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    for ours_, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_.double(), theirs, rtol=1e-5, atol=2e-6)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 24), (1, 24)])
def test_norm_and_its_gradients_equal_the_formula_in_float64(shape):
    x, weight = 3 * draw(*shape), draw(24, seed=1)
    assert_equal_to_float64(
        lambda x, w: rms_norm(x, w, 1e-2),
        lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt() * w,
        x,
        weight,
    )


def test_norm_has_the_bits_of_torchs_own():
    x, weight = draw(64, 96), draw(96, seed=1)
    assert torch.equal(rms_norm(x, weight, 1e-5), F.rms_norm(x, (96,), weight, 1e-5))


def test_norm_of_bfloat16_is_computed_in_float32():
    x, weight = draw(64, 96).bfloat16(), draw(96, seed=1)
    assert torch.equal(rms_norm(x, weight, 1e-5), F.rms_norm(x.float(), (96,), weight, 1e-5).bfloat16())


def test_frozen_norm_passes_the_gradient_on_and_gets_none():
    x, weight = draw(5, 24).requires_grad_(), draw(24, seed=1)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is None
    weight.requires_grad_()
    rms_norm(x.detach(), weight, 1e-5).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gate_and_its_gradients_equal_the_formula_in_float64(name):
    activation = ACTIVATIONS[name]
    assert_equal_to_float64(
        lambda a, b: gated(a, b, activation), lambda a, b: activation(a) * b, draw(6, 40), draw(6, 40, seed=1)
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 12])
def test_turn_and_its_gradient_equal_complex_numbers_in_float64(interleaved, dim):
    """Each pair is a complex number times e^(i angle); what is beyond `dim` stays."""
    angle = draw(5, 1, dim // 2, seed=2)

    def ours(x):
        cos, sin = angle.cos(), angle.sin()
        halves = ((cos, cos), (-sin, sin))
        if interleaved:
            return turned_(x.clone(), *(torch.stack(pair, -1).flatten(-2) for pair in halves), True)
        return turned_(x.clone(), *(torch.cat(pair, -1) for pair in halves), False)

    def plain(x):
        turning = x[..., :dim]
        pairs = turning.unflatten(-1, (-1, 2)) if interleaved else turning.unflatten(-1, (2, -1)).transpose(-1, -2)
        product = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angle.double())
        found = torch.view_as_real(product)
        found = found if interleaved else found.transpose(-1, -2)
        return torch.cat([found.flatten(-2), x[..., dim:]], -1)

    assert_equal_to_float64(ours, plain, draw(5, 3, 12))


@pytest.mark.parametrize("scored", [True, False], ids=["head learns", "no head"])
def test_gradient_of_a_table_that_is_embedding_and_head_equals_the_sum_of_both(scored):
    ids, targets, weights = torch.tensor([3, 1, 3, 3, 0]), torch.tensor([2, 3, 3, 0, 1]), torch.ones(5)
    weighing = draw(5, 8, seed=3)

    def ours(table):
        head = []
        x = embed(ids, table, head)
        total = (x * weighing).sum()
        return total + projected_loss(x, table, None, targets, weights, left=head).total if scored else total

    def plain(table):
        x = F.embedding(ids, table)
        total = (x * weighing.to(x.dtype)).sum()
        return total + F.cross_entropy(x @ table.t(), targets, reduction="sum") if scored else total

    assert_equal_to_float64(ours, plain, draw(6, 8))


def numbers_kept(function, *inputs):
    """How many numbers the backward pass needs, each storage counted once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        function(*(t.requires_grad_() for t in inputs))
    return sum(t.numel() for t in kept.values())


def test_only_inputs_are_kept_for_the_backward_pass():
    x, weight, up = draw(50, 64), draw(64, seed=1), draw(50, 64, seed=2)
    table = draw(50, 1, 8)
    assert numbers_kept(lambda x, w: rms_norm(x, w, 1e-5), x, weight) == x.numel() + 50 + 64
    assert numbers_kept(lambda a, b: gated(a, b, ACTIVATIONS["silu"]), x, up) == 2 * x.numel()
    assert numbers_kept(lambda x: turned_(x.clone(), table, table, False), draw(50, 4, 16)) <= 2 * table.numel()
