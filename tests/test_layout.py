"""Weights laid out for decoding: the same numbers in other memory, and int8 beside the floats that it stands for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import PRESETS, make_model, model_folder, random_ids, read_jsonl, row_logits, write_jsonl
from test_decoding import assert_equal_outputs, complete, prompts_of

from sftcli.errors import UsageError
from sftcli.model import int8, layout
from sftcli.model.adapters.lora import adapt, merge
from sftcli.model.checkpoint import load_model, open_folder
from sftcli.model.gpt import Linear
from sftcli.model.int8 import LARGEST, MANY, MOST, Int8Linear, quantized
from sftcli.model.layout import Product, laid_out
from sftcli.recipe import Generate, Lora


@pytest.fixture(params=PRESETS)
def preset(request):
    return request.param


@pytest.fixture
def model(preset, tmp_path):
    return make_model(tmp_path / preset, preset)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def linear(inside, out, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    layer = Linear(inside, out, bias=bias)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


# ---- float weights


@pytest.fixture(params=["half", "onednn", "mkl", "onednn stored", "transposed"])
def way(request, monkeypatch):
    """Each way to multiply that torch has here, whatever the processor."""
    name = request.param
    monkeypatch.setattr(layout, "prefers_onednn", lambda: name.startswith("onednn"))
    if name == "mkl" and not torch.backends.mkl.is_available():
        pytest.skip("torch without MKL")
    if name == "half" and layout.by_half(torch.ones(2, 2), None) is None:
        pytest.skip("torch without FBGEMM")
    if name in ("onednn stored", "transposed"):
        monkeypatch.setattr(layout, "TWICE", 0)
    return name


@torch.no_grad()
def rounded(module, way):
    """With the weights of a checkpoint in bfloat16, where that is the way."""
    for parameter in module.parameters():
        if way == "half" and parameter.ndim == 2:
            parameter.copy_(parameter.bfloat16())
    return module


WAYS = {
    "half": "by_half",
    "onednn": "by_onednn",
    "onednn stored": "by_onednn",
    "mkl": "by_mkl",
    "transposed": "_stored",
}


def test_parameters_keep_their_values_and_become_views_of_the_joined_memory(model, way):
    rounded(model, way)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    laid_out(model, 3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    attention, mlp = model.blocks[0].attention, model.blocks[0].mlp
    for joined, layers in (
        (attention.joined, (attention.q, attention.k, attention.v)),
        (mlp.joined, (mlp.gate, mlp.up)),
    ):
        for layer in layers if joined else ():
            assert layer.weight.untyped_storage().data_ptr() == joined.weight.untyped_storage().data_ptr()
    for layer in (attention.q, attention.o, mlp.down, model.head):
        assert layer.weight.stride(0 if way == "transposed" else 1) == 1
    for multiply in (attention.o.product.multiply, attention.joined.multiply, model.head.product.multiply):
        assert multiply.__qualname__.split(".")[0] == WAYS[way]
    assert (model.head.weight is model.embedding.weight) == model.config.tied


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_one_product_for_several_layers_equals_theirs_however_many_rows_come(rows, bias, way):
    for inside in (96, 48):  # more inputs than outputs, and fewer
        layers = [rounded(linear(inside, out, out, bias), way) for out in (40, 24)]
        product = Product(layers, rows, twice=layout.TWICE > 0)
        for count in (1, 2, 3, 7, 8, 9, 32, 33, 34, 100):
            x = torch.randn(count, inside, generator=torch.Generator().manual_seed(count))
            for found, layer in zip(product(x).split((40, 24), -1), layers, strict=True):
                close(found, F.linear(x, layer.weight, layer.bias))
            close(product(x.view(1, count, inside))[0], product(x))


@pytest.mark.parametrize("shape", [(24, 96), (96, 24)])
@pytest.mark.parametrize("power", [-30, 0, 20])
def test_half_has_every_bit_of_weights_of_16_bits_however_large_they_are(shape, power):
    generator = torch.Generator().manual_seed(power)
    weight = torch.randint(-255, 256, shape, generator=generator) * 2.0**power  # 8 bits, as in bfloat16
    weight[0, 0], weight[1, 1] = 255 * 2.0 ** (power + 10), 2.0 ** (power - 5)
    x, bias = torch.randint(-9, 10, (5, shape[1]), generator=generator).float(), torch.full(shape[:1], 2.0**power)
    multiply = layout.by_half(weight, bias)
    if multiply is None:
        pytest.skip("torch without FBGEMM")
    # sums of whole numbers round nothing in float32 either
    assert torch.equal(multiply(x).double(), x.double() @ weight.double().t() + bias.double())


@pytest.mark.parametrize("value", [1 + 2.0**-12, 1.5 * 2.0**-38, torch.inf, torch.nan], ids=str)
def test_half_is_not_taken_where_one_weight_would_change(value):
    weight = torch.ones(700, 500)
    if layout.by_half(weight, None) is None:
        pytest.skip("torch without FBGEMM")
    weight[-1, -1] = value
    assert layout.by_half(weight, None) is None
    assert layout.by_half(torch.full((2, 2), 2.0**-140), None) is None  # too small to be moved into its range


def test_logits_and_tokens_stay_as_they_are_laid_out_once_or_twice(model, way):
    plain = copy.deepcopy(rounded(model, way))
    prompts, ids = prompts_of(9, 1, 30, 4), random_ids(20, 3)
    for rows in (1, 3):
        laid_out(model, rows)
        close(row_logits(model, ids), row_logits(plain, ids))
        for size in (1, 3):
            given = {"max_new_tokens": 10, "batch_size": size}
            found, expected = (complete(m, prompts, **given) for m in (model, plain))
            assert assert_equal_outputs(plain, prompts, Generate(**given), found, expected) == 0


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["gate_proj", "o_proj"]], ids=str)
def test_layers_with_an_adapter_beside_them_are_not_joined(tmp_path, targets):
    folder = open_folder(model_folder(tmp_path / "m", "llama"))
    model = adapted(folder, targets)
    expected = row_logits(model, random_ids(20, 3))
    laid_out(model, 1)
    close(row_logits(model, random_ids(20, 3)), expected)
    assert (model.blocks[0].attention.joined is None) == (targets != ["gate_proj", "o_proj"])
    assert (model.blocks[0].mlp.joined is None) == (targets != ["q_proj"])


def adapted(folder, targets="all-linear", dora=False):
    model = load_model(folder)
    adapt(model, folder.family, Lora(targets=targets, rank=2, dora=dora), 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


# ---- int8


@pytest.fixture(params=["by_fbgemm", "by_onednn"])
def whole_products(request, monkeypatch):
    """Each way to multiply whole numbers that torch has here."""
    if request.param == "by_fbgemm" and int8.exact_products() is not int8.by_fbgemm:
        pytest.skip("torch without FBGEMM, or a processor that does not add exactly")
    monkeypatch.setattr(int8, "exact_products", lambda: getattr(int8, request.param))


@pytest.fixture
def chosen_anew():
    int8.exact_products.cache_clear()
    yield
    int8.exact_products.cache_clear()


def test_a_way_whose_sums_overflow_is_not_taken(monkeypatch, chosen_anew):
    def saturated(weight, scale):
        return lambda digits: int8.by_onednn(weight, scale)(digits).clamp(-32768, 32767)

    assert not int8._is_exact(saturated)
    monkeypatch.setattr(int8, "by_fbgemm", saturated)
    assert int8.exact_products() is int8.by_onednn


def by_pairs(weight, scale):
    """As AVX2 multiplies: unsigned by signed, the sums of two products cut off at 16 bits."""

    def products(digits):
        terms = (digits + int8.HALF).round().clamp(0, 255)[:, None] * weight.float()  # (N, out, in)
        pairs = terms.unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767)
        return (pairs.sum(-1) - int8.HALF * weight.float().sum(1)) * scale

    return products


def test_digits_are_small_enough_for_processors_that_add_two_products_in_16_bits(monkeypatch):
    assert int8._is_exact(by_pairs)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(3))
    found = []
    for way in (by_pairs, int8.by_onednn):
        monkeypatch.setattr(int8, "exact_products", lambda way=way: way)
        found.append(Int8Linear([linear(96, 24, 5, False)])(x))
    assert torch.equal(*found)
    monkeypatch.setattr(int8, "HALF", 128)
    assert not int8._is_exact(by_pairs)  # digits of 8 bits are too large


def of_whole_numbers(weight):
    whole, scale = quantized(weight)
    return whole * scale[:, None]


def test_quantized_weights_are_within_half_a_step_and_keep_their_largest():
    weight = linear(64, 32).weight.detach()
    whole, scale = quantized(weight)
    assert whole.abs().amax(1).tolist() == [LARGEST] * 32
    assert bool(((whole * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all())
    assert torch.equal(quantized(torch.zeros(2, 3))[0], torch.zeros(2, 3, dtype=torch.int8))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, MANY, MANY + 1])
def test_int8_layer_equals_a_float_product_with_the_weights_it_stands_for(rows, bias, whole_products):
    layers = [linear(96, out, out, bias) for out in (40, 24)]
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 4, rows)[:, None]
    x[0, 3] = 50 * x[0].abs().max()  # an outlier takes the digits of the others
    expected = [x.double() @ of_whole_numbers(m.weight.detach()).double().t() for m in layers]
    joined = Int8Linear(layers)
    error = x.abs().amax(1, keepdim=True) / MOST * 96  # half a step for each number, at the most
    for found, product, layer in zip(joined(x).split((40, 24), -1), expected, layers, strict=True):
        product = product + (layer.bias.detach() if bias else 0)
        assert found.dtype == torch.float32
        assert bool(((found - product).abs() <= error * layer.weight.abs().max() / 2 + 1e-5 * product.abs()).all())


@pytest.mark.parametrize("largest", [1e-20, 1e-28, 1e-30, 1e-35])
def test_int8_products_of_tiny_numbers_are_theirs_or_nearly_nothing(whole_products, largest):
    layer = linear(4, 3, bias=False)
    x = largest * torch.tensor([[1.0, 0.5, -0.25, 0.0]])
    expected = x.double() @ of_whole_numbers(layer.weight.detach()).double().t()
    error = (Int8Linear([layer])(x).double() - expected).abs().max()
    assert float(error) <= 4 * (largest / MOST + int8.LEAST) * float(layer.weight.abs().max())


def test_int8_products_have_the_same_bits_however_many_rows_there_are(whole_products):
    layer, x = Int8Linear([linear(200, 64)]), torch.randn(64, 200)
    x[5] = 0
    together = layer(x)
    for i in range(64):
        assert torch.equal(layer(x[i : i + 1])[0], together[i])
    assert torch.equal(layer(x[:60].view(3, 4, 5, 200)), together[:60].view(3, 4, 5, 64))
    assert torch.equal(together[5], layer.bias)


def test_largest_numbers_do_not_overflow(whole_products):
    layer = Linear(4096, 8, bias=False)
    layer.weight.data = torch.ones(8, 4096)
    for x in (torch.ones(2, 4096), -torch.ones(2, 4096)):
        close(Int8Linear([layer])(x), 4096 * x[:, :8])


@torch.no_grad()
def with_whole_weights(model):
    """A float model whose linear layers have the weights that int8 stands for; a tied embedding keeps its own."""
    found = copy.deepcopy(model)
    if found.config.tied:
        found.head.weight = torch.nn.Parameter(found.head.weight.clone())
    for layer in found.modules():
        if isinstance(layer, Linear):
            layer.weight.copy_(of_whole_numbers(layer.weight))
    return found


def test_int8_model_equals_a_float_model_of_the_weights_it_stands_for(model, whole_products):
    reference = with_whole_weights(model)
    plain, expected = (row_logits(m, random_ids(20, 3)) for m in (model, reference))
    laid_out(model, 1, "int8")
    found = row_logits(model, random_ids(20, 3))
    cost = float((expected - plain).abs().max())
    assert float((found - expected).abs().max()) < 0.06 * cost  # 14 bits of what meets the weights are nearly all of it
    prompts, given = prompts_of(9, 1, 30, 4, 12), {"max_new_tokens": 12}
    apart = complete(model, prompts, batch_size=1, **given)
    for size in (2, 32):
        together = complete(model, prompts, batch_size=size, **given)
        assert assert_equal_outputs(reference, prompts, Generate(**given), together, apart) == 0


@pytest.mark.parametrize("dora", [False, True])
def test_int8_has_an_adapters_update_in_its_whole_numbers(tmp_path, dora):
    folder = open_folder(model_folder(tmp_path / "m", "llama"))
    model, merged = adapted(folder, dora=dora), adapted(folder, dora=dora)
    merge(merged)
    laid_out(model, 1, "int8")
    laid_out(merged, 1, "int8")
    close(row_logits(model, random_ids(20, 3)), row_logits(merged, random_ids(20, 3)), 2e-3)


def test_int8_holds_no_float_weights_but_the_embedding(model):
    laid_out(model, 1, "int8")
    kept = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n and "position" not in n
    )
    assert kept == 0


def test_int8_is_refused_where_it_cannot_be(model, tmp_path, monkeypatch, chosen_anew):
    with pytest.raises(UsageError, match="not on meta"):
        laid_out(model.to("meta"), 1, "int8")
    monkeypatch.setattr(int8, "_is_exact", lambda make: False)
    with pytest.raises(UsageError, match="does not multiply int8 exactly"):
        laid_out(make_model(tmp_path / "m", "llama"), 1, "int8")


# ---- the commands


def test_generate_and_chat_decode_with_int8(sft, tmp_path):
    folder = model_folder(tmp_path / "m", "llama")
    prompts = write_jsonl(tmp_path / "q.jsonl", [{"prompt": text} for text in ("Why?", "Name a river.", "Who")])
    given = ("--quantize", "int8", "--max-new-tokens", 6)
    outputs = []
    for size in (1, 3):
        result = sft("generate", prompts, "-m", folder, *given, "--batch-size", size, "-o", tmp_path / f"{size}.jsonl")
        assert result.code == 0, result.err
        outputs.append(read_jsonl(tmp_path / f"{size}.jsonl"))
    assert outputs[0] == outputs[1]
    talk = sft("chat", folder, *given, stdin=b"Why?\n")
    assert talk.code == 0 and talk.out.strip(), talk.err
    result = sft("generate", prompts, "-m", folder, "--quantize", "int4")
    assert result.code == 2 and "int8" in result.err
    result = sft("generate", prompts, "-m", folder, *given, "--adapter", "none", "--adapter", "none")
    assert result.code == 2 and "one adapter at a time" in result.err
