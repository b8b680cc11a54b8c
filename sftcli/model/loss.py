"""The loss: vocabulary projection, log-softmax and their gradients, chunk by chunk, only where a label is.

The logits of a batch never exist at once. A loss is a sum and a weight; whoever takes a step divides once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 1 << 22  # float32 logits formed at once: 16 MiB


@dataclass
class LossSum:
    """Sum of weight * nll (differentiable), the sum of the weights, and what is logged of the same positions."""

    total: Tensor  # scalar
    weight: Tensor  # scalar
    nll: Tensor  # (N,) detached, unweighted
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = max(64, CHUNK_LOGITS // weight.shape[0])
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        )
        nll, correct, entropy = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            h, y = hidden[part], targets[part, None]
            logits = F.linear(h, weight, bias).float()  # (n, V)
            slope = scaled_and_capped(logits, scale, cap)
            top = logits.argmax(-1, keepdim=True)
            log_total = logits.logsumexp(-1, keepdim=True)
            nll[part] = (log_total - logits.gather(1, y)).squeeze(1)
            correct[part] = (top == y).squeeze(1).float()
            p = torch.exp(logits - log_total)
            entropy[part] = log_total.squeeze(1) - torch.linalg.vecdot(p, logits)
            if grad_hidden is None and grad_weight is None:
                continue
            p.scatter_add_(1, y, torch.full_like(log_total, -1.0))
            p *= weights[part, None]  # d(sum)/d(logits)
            if isinstance(slope, Tensor) or slope != 1.0:
                p *= slope  # d(logits)/d(h @ weight)
            g = p.to(weight.dtype)
            if grad_hidden is not None:
                torch.matmul(g, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(p.T, h.float())
            if grad_bias is not None:
                grad_bias += p.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll, correct, entropy)
        return (nll * weights).sum(), nll, correct, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        hidden, weight, bias = (None if g is None else g.mul_(grad) for g in grads)
        weight = None if weight is None else weight.to(ctx.dtypes[0])
        bias = None if bias is None else bias.to(ctx.dtypes[1])
        return hidden, weight, bias, None, None, None, None


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
) -> LossSum:
    """Cross-entropy of `hidden @ weight.T + bias` (scaled, soft-capped) against `targets`, in float32, as a sum.

    hidden (N, C): the positions that have a label, and only they. weight (V, C). targets (N,) ids below V.
    weights (N,) >= 0. Gradients reach hidden, weight and bias. Backward may be called once.
    """
    weights = weights.float()
    if not torch.is_grad_enabled():  # else autograd would still ask for gradients of the parameters
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        total, nll, correct, entropy = _ProjectedLoss.apply(hidden, weight, bias, targets, weights, scale, cap)
    return LossSum(total, weights.sum(), nll, correct, entropy)
