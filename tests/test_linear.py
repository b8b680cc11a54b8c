"""Several products of one input: values and gradients are those of layers by themselves, what does not learn gets none."""

import pytest
import torch
import torch.nn.functional as F

from sftcli.model.adapters.lora import LoraLinear
from sftcli.model.linear import MANY, NARROW, Linear, of_one_input, products, wide_product
from sftcli.model.pieces import ACTIVATIONS, gated, rms_norm


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(inside, out, seed, bias=False, rank=0, scale=2.0, dropout=0.0):
    layer = Linear(inside, out, bias=bias)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed + i)
    if rank:
        layer.requires_grad_(False)
        layer = LoraLinear(layer, torch.nn.Parameter(draw(rank, inside, seed=seed + 5)), scale, dropout, False)
        layer.lora_B.data = draw(out, rank, seed=seed + 6)
    return layer


def plain(layer, x):
    """The layer's formula, in float64."""
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    y = F.linear(x, weight, bias)
    if isinstance(layer, LoraLinear):
        y = y + layer.scale * (x @ layer.lora_A.double().t() @ layer.lora_B.double().t())
    return y


def learned(layers):
    return [p for layer in layers for p in layer.parameters() if p.requires_grad]


LAYERS = {
    "plain": [{}, {}, {}],
    "bias in the second": [{}, {"bias": True}, {}],
    "adapters": [{"rank": 2}, {"rank": 3, "scale": 0.3}, {"rank": 4, "bias": True}],
    "an adapter beside two": [{}, {"rank": 3}, {}],
}


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)], ids=str)
@pytest.mark.parametrize("case", LAYERS)
def test_layers_with_one_input_equal_each_by_itself_in_float64(case, shape):
    outs = (
        NARROW + 6,
        NARROW + 2,
        8,
    )  # an output layer of few units is no adapter: it may have a narrow group of its own
    layers = [layer_of(24, out, 10 * i, **given) for i, (out, given) in enumerate(zip(outs, LAYERS[case], strict=True))]
    x = draw(*shape, seed=99).requires_grad_()
    exact = x.detach().double().requires_grad_()
    weighings = [draw(*shape[:-1], out, seed=50 + i) for i, out in enumerate(outs)]
    found, expected = of_one_input(x, layers), [plain(layer, exact) for layer in layers]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    of = (x, *learned(layers))
    ours = torch.autograd.grad(sum((y * w).sum() for y, w in zip(found, weighings, strict=True)), of)
    total = sum((y * w.double()).sum() for y, w in zip(expected, weighings, strict=True))
    theirs = torch.autograd.grad(total, (exact, *learned(layers)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-4)


def test_an_output_that_nobody_uses_adds_nothing():
    layers, x = [layer_of(24, 8, 0), layer_of(24, 8, 5)], draw(6, 24).requires_grad_()
    of_one_input(x, layers)[1].sum().backward()
    torch.testing.assert_close(x.grad, layers[1].weight.sum(0).expand(6, 24))
    assert not layers[0].weight.grad.any()


def test_input_that_needs_no_gradient_and_weights_that_do_not_learn_get_none():
    layers = [layer_of(24, 8, 0), layer_of(24, 8, 5, rank=2)]
    layers[0].requires_grad_(False)
    x = draw(6, 24)
    sum(y.sum() for y in of_one_input(x, layers)).backward()
    assert x.grad is None and layers[0].weight.grad is None and layers[1].weight.grad is None
    assert layers[1].lora_A.grad.any() and layers[1].lora_B.grad.any()


def test_frozen_layers_keep_nothing_of_their_input():
    frozen = layer_of(24, 100, 0).requires_grad_(False)
    x = draw(6, 24).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        of_one_input(x * 1.0, [frozen, frozen])
    assert {tuple(t.shape) for t in kept} == {(100, 24)}


def test_what_a_piece_has_made_is_made_again_instead_of_kept():
    x, up, weight = draw(40, 64).requires_grad_(), draw(40, 64, seed=1).requires_grad_(), draw(64, seed=2)
    layers = [layer_of(64, 48, 0), layer_of(64, 40, 5)]
    for piece in (lambda: rms_norm(x, weight, 1e-5), lambda: gated(x, up, ACTIVATIONS["silu"])):
        kept: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            made = piece()
            out = sum(y.square().sum() for y in of_one_input(made, layers))
        assert made.data_ptr() not in kept and x.data_ptr() in kept
        of = (x, *learned(layers))
        found = torch.autograd.grad(out, of)
        plain_out = sum(F.linear(piece().clone(), layer.weight).square().sum() for layer in layers)
        for ours, theirs in zip(found, torch.autograd.grad(plain_out, of), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)


def test_what_was_changed_since_a_piece_made_it_is_kept_as_it_is():
    x, layer = draw(40, 64).requires_grad_(), layer_of(64, 48, 0)
    made = rms_norm(x, draw(64, seed=2), 1e-5)
    made.mul_(2)
    of_one_input(made, [layer])[0].sum().backward()
    torch.testing.assert_close(layer.weight.grad, made.detach().sum(0).expand(48, 64), rtol=1e-5, atol=1e-4)


def test_dropout_before_an_adapter_leaves_the_base_as_it_is():
    layer, x = layer_of(24, 40, 0, rank=2, dropout=0.999999), draw(6, 24)
    other = layer_of(24, 40, 7)
    found = of_one_input(x, [layer.train(), other])
    torch.testing.assert_close(found[0], F.linear(x, layer.weight))
    torch.testing.assert_close(found[1], F.linear(x, other.weight))
    torch.testing.assert_close(layer.eval()(x).double(), plain(layer, x.double()), rtol=1e-5, atol=1e-4)


def test_under_autocast_products_are_those_of_autocast():
    layers, x = [layer_of(24, 8, 0), layer_of(24, 8, 5)], draw(6, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, layer in zip(products(x, [m for own in layers for m in own.matrices()]), layers, strict=True):
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, F.linear(x, layer.weight))


@pytest.mark.parametrize("rows", [MANY - 1, MANY, MANY + 5])
@pytest.mark.parametrize("bias", [None, draw(96, seed=3)])
def test_wide_products_equal_those_of_plain_layers(rows, bias):
    x, weight = draw(rows, 24), draw(96, 24, seed=1)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(wide_product(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
