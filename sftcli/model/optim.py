"""Optimisers over the right parameters, and the learning rate over the run."""

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from sftcli import recipe
from sftcli.model.gpt import GPT
from sftcli.model.shards import TensorFiles, is_shared_out

LR_FROM_NOTHING, LR_PRETRAINED, LR_ADAPTER = 1e-3, 2e-5, 2e-4
LR_TABLE = 1e-2  # of a prefix by itself: no matrix multiplies what it learns
RMS = 0.2  # of an update of AdamW, nearly
NEWTON_STEPS, EPS, COEFFICIENTS = 5, 1e-7, (3.4445, -4.775, 2.0315)  # torch's defaults
TOGETHER = 1 << 22  # numbers of matrices that Muon works on at once
MOMENTS = 8  # bytes of AdamW's state for a parameter
BUCKET = 1 << 26  # parameters whose state an offloaded step has on the device at once: 512 MiB of AdamW's


class _WithoutCompiler(Optimizer):
    """torch's decorators import its compiler only to tell it to stay away: two seconds before every first step."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)


class AdamW(_WithoutCompiler, optim.AdamW):
    """torch.optim.AdamW."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        inspect.unwrap(optim.AdamW.step)(self)


class Muon(_WithoutCompiler, optim.Muon):
    """torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, for matrices of one shape at once, and in float32 on a
    CPU: products of bfloat16 take ten times as long on those without units for them."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for alike in _alike([p for p in group["params"] if p.grad is not None]):
                updates = [self._averaged(p, group["momentum"]) for p in alike]
                made = [orthogonal(updates[0])] if len(updates) == 1 else orthogonal(torch.stack(updates))
                lr = group["lr"] * RMS * math.sqrt(max(alike[0].shape))
                for p, update in zip(alike, made, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-lr)

    def _averaged(self, p: Tensor, momentum: float) -> Tensor:
        """The gradient under Nesterov's momentum."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        average: Tensor = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return torch.lerp(p.grad, average, momentum)


def _alike(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape, not too many numbers at a time; by themselves where each process has a share."""
    shapes: dict[tuple[torch.Size, bool], list[Tensor]] = {}
    for p in parameters:
        shapes.setdefault((p.shape, is_shared_out(p)), []).append(p)
    for (shape, spread), same in shapes.items():
        count = 1 if spread else max(1, TOGETHER // shape.numel())
        yield from (same[i : i + count] for i in range(0, len(same), count))


def orthogonal(x: Tensor) -> Tensor:
    """A matrix (R, C), or several (N, R, C), with singular values near 1 instead of their own: five steps of Newton and
    Schulz (kellerjordan.github.io/posts/muon)."""
    a, b, c = COEFFICIENTS
    wide = x.shape[-2] <= x.shape[-1]
    x = x.to(torch.bfloat16 if x.device.type == "cuda" else torch.float32)
    x = x if wide else x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    plus_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(NEWTON_STEPS):
        gram = x @ x.mT
        x = plus_product(x, plus_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def build(
    model: GPT,
    options: recipe.AdamW | recipe.Muon,
    lr: float,
    lora_plus: float | None = None,
    offload: bool = False,
) -> list[Optimizer]:
    """The optimisers of a run. Weight decay acts on matrices, never on norms and biases.

    Muon takes the matrices of the blocks (its update rescaled to AdamW's size, arXiv 2502.16982, so that one lr serves
    both); embeddings, head, norms and biases stay with AdamW. `lora_plus`: LoRA's B learns at this multiple of the lr.
    `offload`: state lies in main memory and is on the device only for a step, that of one optimizer after the other.
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
    for part in _buckets(groups, offload):
        found.append(AdamW(part, lr=lr, betas=options.betas, eps=options.eps, fused=True))
    if muon:
        assert isinstance(options, recipe.Muon)
        groups = _groups(muon, options.weight_decay, faster, lora_plus)
        for part in _buckets(groups, offload):
            found.append(Muon(part, lr=lr, momentum=options.momentum, adjust_lr_fn="match_rms_adamw"))
    set_lr(found, lr)
    return found


def _groups(
    parameters: list[nn.Parameter], decay: float, faster: set[int], ratio: float | None
) -> list[dict[str, Any]]:
    """Parameter groups, none of them empty; `lr_ratio` is the group's share of the run's learning rate."""
    slow, fast = [p for p in parameters if id(p) not in faster], [p for p in parameters if id(p) in faster]
    groups = [(slow, 1.0), (fast, ratio or 1.0)]
    return [{"params": ps, "weight_decay": decay, "lr_ratio": share} for ps, share in groups if ps]


def _buckets(groups: list[dict[str, Any]], offload: bool) -> Iterator[list[dict[str, Any]]]:
    """The groups of each optimizer: all of them, or some BUCKET parameters."""
    if not offload:
        yield from [groups] if groups else []
        return
    for group in groups:
        part: list[nn.Parameter] = []
        for p in group["params"]:
            if part and sum(own.numel() for own in part) + p.numel() > BUCKET:
                yield [{**group, "params": part, "offload": True}]
                part = []
            part.append(p)
        yield [{**group, "params": part, "offload": True}]


def step(optimizers: Sequence[Optimizer]) -> None:
    """A step of each; state that is offloaded comes to the device for it, and goes back. The bits stay as they are."""
    for optimizer in optimizers:
        if not _is_offloaded(optimizer):
            optimizer.step()
            continue
        kept = {name: tensor for name, tensor in _large(optimizer) if _serves(tensor, name[0].device)}
        for (p, key), tensor in _large(optimizer):
            optimizer.state[p][key] = tensor.to(p.device, non_blocking=True, copy=True)
        optimizer.step()
        homes = _in_main_memory({name: tensor for name, tensor in _large(optimizer) if name not in kept}) | kept
        for (p, key), tensor in _large(optimizer):
            optimizer.state[p][key] = homes[p, key].copy_(tensor, non_blocking=tensor.is_cuda)


def _is_offloaded(optimizer: Optimizer) -> bool:
    return any(group.get("offload") for group in optimizer.param_groups)


def _large(optimizer: Optimizer) -> list[tuple[tuple[Tensor, str], Tensor]]:
    """The state of an optimizer by parameter and name, without the counts of steps."""
    states = [((p, key), value) for p, state in optimizer.state.items() for key, value in state.items()]
    return [(name, value) for name, value in states if isinstance(value, Tensor) and value.ndim]


def _serves(home: Tensor, device: torch.device) -> bool:
    """Whether a device can fetch a tensor from there by itself (what was read from a file lies elsewhere)."""
    return home.is_pinned() if device.type == "cuda" else home.device.type == "cpu"


def _in_main_memory(tensors: dict[tuple[Tensor, str], Tensor]) -> dict[tuple[Tensor, str], Tensor]:
    """Room for tensors, in one piece: torch takes a power of two for each that it pins."""
    pinned = any(tensor.is_cuda for tensor in tensors.values())
    whole = torch.empty(sum(tensor.numel() for tensor in tensors.values()), pin_memory=pinned)
    pieces = whole.split([tensor.numel() for tensor in tensors.values()])
    return {name: piece.view_as(own) for (name, own), piece in zip(tensors.items(), pieces, strict=True)}


def state_to_come(optimizers: Sequence[Optimizer]) -> int:
    """Bytes of state that come to the device with the first step and stay."""
    if any(o.state or _is_offloaded(o) for o in optimizers):
        return 0
    return MOMENTS * sum(p.numel() for o in optimizers for group in o.param_groups for p in group["params"])


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
    if model.device.type == "cuda" and any(map(_is_offloaded, optimizers)):
        torch.cuda.synchronize(model.device)  # what it was told to copy may still be under way
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
        there = bool(stored.shape(name)) and _is_offloaded(owner[id(p)])
        owner[id(p)].state[p][key] = value.cpu() if there else value
