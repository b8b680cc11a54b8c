"""All rows of a batch in one kernel call: asked as torch's kernel wants it, and only where its answers are right."""

from itertools import pairwise

import pytest
import torch
from model_fixtures import CPU, make_model, make_rows

from sftcli.model import varlen
from sftcli.model.attention import Group, RowAttention, Sight
from sftcli.model.training import accumulate

H, G, D = 4, 2, 8


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Kernel:
    """What torch documents of `varlen_attn`, written out with a loop over rows and queries; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, k, v, ends, key_ends, longest, longest_key, *, scale, window_size, enable_gqa):
        self.calls += 1
        assert ends.dtype == torch.int32
        assert ends is key_ends
        assert enable_gqa == (q.shape[1] != k.shape[1])
        bounds = ends.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        assert longest == longest_key == max(lengths)
        left, right = window_size
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        found = []
        for start, length in zip(bounds, lengths, strict=False):
            for i in range(length):
                first = 0 if left < 0 else max(0, i - left)
                last = length - 1 if right < 0 else min(length - 1, i + right)
                seen = slice(start + first, start + last + 1)
                scores = torch.einsum("hd,khd->hk", q[start + i], k[seen]) * scale
                found.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[seen]))
        return torch.stack(found)


@pytest.fixture
def kernel(monkeypatch):
    """A CPU that has torch's kernel."""
    made = Kernel()
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", made)
    varlen._is_right.cache_clear()
    yield made
    varlen._is_right.cache_clear()


def causal(*groups):
    return [Group(rows, length) for rows, length in groups]


def full(*groups):
    return [Group(rows, length, torch.zeros(rows, length, dtype=torch.long)) for rows, length in groups]


def answers(groups, sight, asked):
    """(output, gradients of q, k and v)."""
    tokens = sum(group.rows * group.length for group in groups)
    q, k, v = (draw(tokens, n, D, seed=i).requires_grad_() for i, n in enumerate((H, G, G)))
    if asked:
        assert varlen.serves(q, k)
    found = RowAttention(groups)(sight, q, k, v)
    return found, *torch.autograd.grad((found * draw(tokens, H, D, seed=9)).sum(), (q, k, v))


@pytest.mark.parametrize("window", [None, 1, 3, 5, 6, 99])
@pytest.mark.parametrize("kind", [causal, full])
def test_one_call_for_all_rows_equals_a_call_for_each_length(kind, window, kernel, monkeypatch):
    sight = Sight(0, 0.3, window)
    ours = answers(kind((2, 1), (1, 3), (3, 6)), sight, asked=True)
    before = kernel.calls
    answers(kind((2, 1), (1, 3), (3, 6)), sight, asked=True)
    assert kernel.calls == before + 1
    monkeypatch.setattr(varlen, "DEVICES", ())
    theirs = answers(kind((2, 1), (1, 3), (3, 6)), sight, asked=False)
    assert kernel.calls == before + 1
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def glm():
    return [Group(1, 3, torch.tensor([[0, 0, 1]])), Group(1, 4)]


@pytest.mark.parametrize(
    ("groups", "sight"),
    [
        (glm, Sight(0, 0.3)),
        (lambda: causal((1, 3)) + full((1, 4)), Sight(0, 0.3)),
        (lambda: causal((1, 3)), Sight(0, 0.3, cap=5.0)),
        (lambda: causal((1, 3)), Sight(0, 0.3, prefix=(draw(G, 2, D, seed=5), draw(G, 2, D, seed=6)))),
    ],
    ids=["an order of its own", "rows of two kinds", "a cap", "a prefix"],
)
def test_what_the_kernel_cannot_do_never_reaches_it(groups, sight, kernel):
    answers(groups(), sight, asked=True)
    before = kernel.calls
    answers(groups(), sight, asked=True)
    assert kernel.calls == before


def off_by_one(kernel):
    return lambda *args, window_size, **named: kernel(*args, window_size=(window_size[0], window_size[1] + 1), **named)


def without_gradient(kernel):
    return lambda q, k, v, *args, **named: kernel(q, k.detach() + 0 * k, v, *args, **named)


def missing(kernel):
    def fail(*args, **named):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")

    return fail


def older(kernel):
    return lambda q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None


@pytest.mark.parametrize("wrong", [off_by_one, without_gradient, missing, older])
def test_a_kernel_that_is_wrong_missing_or_older_is_not_used(wrong, kernel, monkeypatch):
    expected = answers(causal((2, 3)), Sight(0, 0.3), asked=True)
    varlen._is_right.cache_clear()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong(kernel))
    q, k = draw(6, H, D, seed=0), draw(6, G, D, seed=1)
    assert not varlen.serves(q, k)
    for a, b in zip(expected, answers(causal((2, 3)), Sight(0, 0.3), asked=False), strict=True):
        torch.testing.assert_close(a, b)


def test_example_is_tried_where_nothing_may_be_differentiated_too(kernel):
    with torch.inference_mode():
        assert varlen.serves(draw(6, H, D, seed=0), draw(6, G, D, seed=1))


def test_deterministic_runs_other_dtypes_and_a_cpu_do_without(kernel, monkeypatch):
    q, k = draw(6, H, D, seed=0), draw(6, G, D, seed=1)
    assert varlen.serves(q, k)
    assert not varlen.serves(q.double(), k.double())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert not varlen.serves(q, k)
    monkeypatch.undo()  # the fixture's too
    assert not varlen.serves(q.bfloat16(), k.bfloat16())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_model_equal_those_by_length_with_and_without_checkpointing(
    checkpointing, kernel, monkeypatch, tmp_path
):
    model, rows = make_model(tmp_path / "m", "llama"), make_rows([6, 9, 6, 14])
    model.gradient_checkpointing = checkpointing
    model.train()

    def gradients():
        model.zero_grad()
        accumulate(model, rows, 99, CPU)
        return [p.grad.clone() for p in model.parameters()]

    assert not varlen._is_right.cache_info().currsize  # the example runs in the first layer
    ours = gradients()
    assert kernel.calls
    monkeypatch.setattr(varlen, "DEVICES", ())
    for a, b in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
