"""The loss: vocabulary projection, log-softmax and their gradients, chunk by chunk, only where a label is.

The logits of a batch never exist at once. A loss is a sum and a weight; whoever takes a step divides once.

Of a token with logits z (scaled and capped), label y and weight w, with lse = logsumexp(z) and p = softmax(z):

    nll    = lse - z_y                                       what is logged, whatever the options
    loss   = (1 - eps) nll + eps (lse - mean(z)) + c lse^2   label_smoothing eps, z_loss c
    total  = sum of w' loss;  w' = w, under dft w stopgrad(p_y)
    d total / d z = w' ((1 + 2 c lse) p - (1 - eps) onehot(y) - eps / V)

Label smoothing spreads eps over all V labels (arXiv 1512.00567; lse - mean(z) is the mean of -log p); z-loss holds the
normaliser near 1 (arXiv 2204.02311); DFT weighs a token by how likely the model finds it already (arXiv 2508.05629).
The divisor of a step is the sum of w in every case.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sftcli.model.linear import wide_product
from sftcli.recipe import Loss

CHUNK_LOGITS = 1 << 24  # float32 logits formed at once: 64 MiB; with fewer rows the products are slower
BLOCK_LOGITS = 1 << 20  # of them turned into gradients at once on a CPU: what that takes stays near the processor
PLAIN = Loss()


class LossSum(NamedTuple):
    """Sum of weight * loss (differentiable), the sum of the weights, and what is logged of the same positions."""

    total: Tensor  # scalar
    weight: Tensor  # scalar
    nll: Tensor  # (N,) detached, unweighted, without what the options add
    correct: Tensor  # (N,) bool: the label is the most likely token
    entropy: Tensor  # (N,) of the prediction, in nats


class _ProjectedLoss(torch.autograd.Function):
    """Forward forms the gradients at once (of the sum, so they only need scaling in backward)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        scale: float,
        cap: float | None,
        options: Loss,
        left: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = max(64, CHUNK_LOGITS // weight.shape[0])
        block = max(16, BLOCK_LOGITS // weight.shape[0]) if hidden.device.type == "cpu" else rows
        grads = _empty_gradients(ctx.needs_input_grad, hidden, weight, bias)
        learns = any(grad is not None for grad in grads)
        told = torch.empty(4, len(hidden), device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = wide_product(hidden[part], weight, bias).float()  # (n, V)
            of_rows = (t[..., part].split(block, -1) for t in (targets, weights, told))
            for z, y, w, out in zip(logits.split(block), *of_rows, strict=True):
                torch.stack(_scored_(z, y, w, scale, cap, options, learns), out=out)
            if learns:
                _add_gradients(grads, logits, hidden[part], weight, part)
            del logits, z  # or the next chunk needs room beside this one
        loss, nll, correct, entropy = told
        ctx.save_for_backward(*grads)
        ctx.left = left
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll, correct, entropy)
        return loss.sum(), nll, correct, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        hidden, weight, bias = (None if g is None else g.mul_(grad) for g in grads)
        weight = None if weight is None else weight.to(ctx.dtypes[0])
        bias = None if bias is None else bias.to(ctx.dtypes[1])
        if ctx.left is not None and weight is not None:
            ctx.left.append(weight)
            weight = None
        return hidden, weight, bias, None, None, None, None, None, None


def _scored_(
    logits: Tensor, y: Tensor, w: Tensor, scale: float, cap: float | None, options: Loss, learns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n,) each: weighted loss, nll, whether the label is the most likely, entropy; of products with the head (n, V),
    labels y (n,) and weights w (n,). Where something learns, the products become d(loss)/d(product), weighted."""
    slope, y = scaled_and_capped(logits, scale, cap), y[:, None]
    top, best = logits.max(-1, keepdim=True)
    p = logits.softmax(-1)
    log_total = top - p.gather(1, best).log()  # p of the best is 1 / V at least
    nll = (log_total - logits.gather(1, y)).squeeze(1)
    if options.dft:
        w = w * torch.exp(-nll)
    loss = w * token_loss(nll, logits, log_total.squeeze(1), options)
    entropy = log_total.squeeze(1) - logits.mul_(p).sum(-1)  # the logits' last use
    if learns:
        torch.mul(gradient_(p, y, log_total, options), w[:, None] * slope, out=logits)
    return loss, nll, (best == y).squeeze(1).float(), entropy


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden (N, C), weight (V, C) and bias (V,)


def _empty_gradients(needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
    """Room for what is asked; those of weight and bias add up in float32."""
    make = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk fills it
    return (
        torch.empty_like(hidden) if needed[0] else None,
        make(weight, dtype=torch.float32) if needed[1] else None,
        torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None,
    )


def _add_gradients(grads: Gradients, g: Tensor, h: Tensor, weight: Tensor, part: slice) -> None:
    """What a chunk's g = d(loss)/d(h @ weight.T) (n, V) gives to each."""
    hidden, head, bias = grads
    if hidden is not None:
        torch.matmul(g.to(weight.dtype), weight, out=hidden[part])
    if head is not None:
        if part.start:
            head.addmm_(g.T, h.float())
        else:
            torch.mm(g.T, h.float(), out=head)
    if bias is not None:
        bias += g.sum(0)


def token_loss(nll: Tensor, logits: Tensor, log_total: Tensor, options: Loss) -> Tensor:
    """What is minimised of each token, unweighted (n,); logits (n, V), log_total (n,) their logsumexp."""
    loss = nll
    if eps := options.label_smoothing:
        loss = (1 - eps) * loss + eps * (log_total - logits.mean(-1))
    if options.z_loss:
        loss = loss + options.z_loss * log_total.square()
    return loss


def gradient_(p: Tensor, y: Tensor, log_total: Tensor, options: Loss) -> Tensor:
    """Turn probabilities p (n, V) into d(token_loss)/d(logits), in place; y and log_total (n, 1)."""
    eps = options.label_smoothing
    if options.z_loss:
        p *= 1 + 2 * options.z_loss * log_total
    if eps:
        p -= eps / p.shape[1]
    return p.scatter_add_(1, y, torch.full_like(log_total, eps - 1.0))


def scaled_and_capped(logits: Tensor, scale: float, cap: float | None) -> Tensor | float:
    """logits -> cap * tanh(scale * logits / cap), in place (without a cap only scaled); returns the slope there."""
    if scale != 1.0:
        logits *= scale
    if cap is None:
        return scale
    logits /= cap
    logits.tanh_()
    slope = scale * (1 - logits * logits)
    logits *= cap
    return slope


def projected_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    scale: float = 1.0,
    cap: float | None = None,
    options: Loss = PLAIN,
    left: list[Tensor] | None = None,
) -> LossSum:
    """The loss of `hidden @ weight.T + bias` (scaled, soft-capped) against `targets`, in float32, as a sum.

    hidden (N, C): the positions that have a label, and only they. weight (V, C). targets (N,) ids below V.
    weights (N,) >= 0. Gradients reach hidden, weight and bias. Backward may be called once. `left`: that of the weight
    is put there instead, for what comes later in backward to add to it.
    """
    weights = weights.float()
    if not torch.is_grad_enabled():  # else autograd would still ask for gradients of the parameters
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    elif weight.dtype != hidden.dtype:  # frozen, of 16 bits
        weight = weight.to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        total, nll, correct, entropy = _ProjectedLoss.apply(
            hidden, weight, bias, targets, weights, scale, cap, options, left
        )
    return LossSum(total, weights.sum(), nll, correct, entropy)
