"""Optimisers over the right parameters, and the learning rate over the run."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from sftcli import recipe
from sftcli.model.gpt import GPT
from sftcli.model.shards import TensorFiles

LR_FROM_NOTHING, LR_PRETRAINED, LR_ADAPTER = 1e-3, 2e-5, 2e-4
LR_TABLE = 1e-2  # of a prefix by itself: no matrix multiplies what it learns


def build(
    model: GPT, options: recipe.AdamW | recipe.Muon, lr: float, lora_plus: float | None = None
) -> list[Optimizer]:
    """The optimisers of a run. Weight decay acts on matrices, never on norms and biases.

    Muon takes the matrices of the blocks (its update rescaled to AdamW's size, arXiv 2502.16982, so that one lr serves
    both); embeddings, head, norms and biases stay with AdamW. `lora_plus`: LoRA's B learns at this multiple of the lr.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon: list[nn.Parameter] = []
    if isinstance(options, recipe.Muon):
        muon = [p for name, p in trained if name.startswith("blocks.") and p.ndim == 2]
    taken = {id(p) for p in muon}
    faster = {id(p) for name, p in trained if lora_plus and name.endswith(".lora_B")}
    rest = [p for _, p in trained if id(p) not in taken]
    groups = _groups([p for p in rest if p.ndim >= 2], options.weight_decay, faster, lora_plus)
    groups += _groups([p for p in rest if p.ndim < 2], 0.0, faster, lora_plus)
    found: list[Optimizer] = []
    if groups:
        found.append(AdamW(groups, lr=lr, betas=options.betas, eps=options.eps, fused=True))
    if muon:
        assert isinstance(options, recipe.Muon)
        groups = _groups(muon, options.weight_decay, faster, lora_plus)
        found.append(Muon(groups, lr=lr, momentum=options.momentum, adjust_lr_fn="match_rms_adamw"))
    set_lr(found, lr)
    return found


def _groups(
    parameters: list[nn.Parameter], decay: float, faster: set[int], ratio: float | None
) -> list[dict[str, Any]]:
    """Parameter groups, none of them empty; `lr_ratio` is the group's share of the run's learning rate."""
    slow, fast = [p for p in parameters if id(p) not in faster], [p for p in parameters if id(p) in faster]
    groups = [(slow, 1.0), (fast, ratio or 1.0)]
    return [{"params": ps, "weight_decay": decay, "lr_ratio": share} for ps, share in groups if ps]


def lr_share(step: int, steps: int, schedule: recipe.Schedule) -> float:
    """The share of the peak learning rate at `step` (from 0) of `steps`.

    Warm-up is a share of the run, clamped so that at least one step runs at the peak; a run of any length reaches it.
    """
    warmup = min(math.ceil(schedule.warmup * steps), steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (steps - warmup)  # 0 .. < 1
    if schedule.kind == "linear":
        shape = 1 - progress
    elif schedule.kind == "cosine":
        shape = 0.5 + 0.5 * math.cos(math.pi * progress)
    elif schedule.kind == "wsd":
        decay = min(round(schedule.decay * steps), steps - warmup - 1)  # the step after warm-up stays at the peak
        shape = min(1.0, (steps - step) / (decay + 1))
    else:
        return 1.0
    return schedule.floor + (1 - schedule.floor) * shape


def set_lr(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]


def state_tensors(model: GPT, optimizers: list[Optimizer]) -> dict[str, torch.Tensor]:
    """Optimizer state as named tensors: `<parameter>/<key>`."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": torch.as_tensor(value)
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_state_tensors(model: GPT, optimizers: list[Optimizer], stored: TensorFiles) -> None:
    """Put back what `state_tensors` took. Raises KeyError, ValueError."""
    parameters = dict(model.named_parameters())
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name in filter(lambda name: "/" in name, stored):  # others are no parameter's
        parameter, _, key = name.rpartition("/")
        p = parameters[parameter]
        # fused AdamW counts its steps (a number) on the device, too
        value = stored.read_like(name, p) if stored.shape(name) else stored.read(name).to(p.device)
        owner[id(p)].state[p][key] = value
