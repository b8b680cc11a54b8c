"""LoRA: a low-rank update beside frozen linear layers.

    h = W0 x + b + scale * B A dropout(x)      A (r, in), B (out, r) = 0 at the start, scale = alpha / r

A layer of the family's files may be several of ours (GPT-2's c_attn is q, k and v): they share A and split B's rows.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftcli.errors import UsageError
from sftcli.model.families import Family, Stored, shapes_of
from sftcli.model.gpt import GPT, GPTConfig
from sftcli.model.linear import Matrix, products
from sftcli.recipe import Lora

HEAD = "lm_head"  # the head's module in transformers, whatever its tensor is called in the files


class LoraLinear(nn.Linear):
    """A linear layer that keeps the base's own Parameters as `weight` and `bias`, and an update beside them."""

    def __init__(self, base: nn.Linear, a: nn.Parameter, scale: float, dropout: float, dora: bool):
        nn.Module.__init__(self)  # Linear's own would make a weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = scale, dropout
        self.lora_A = a
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, len(a), device=a.device))
        self.magnitude = nn.Parameter(row_norms(base.weight.detach().float())) if dora else None
        self._gain: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return self.finish(*products(x, self.matrices()))
        (h,) = products(x, [(self.weight, self.bias)])
        dropped = F.dropout(x, self.dropout, self.training)
        plain = h if self.magnitude is None else products(dropped, [(self.weight, None)])[0]
        return self._updated(h, F.linear(dropped, self.lora_A), plain)

    def matrices(self) -> list[Matrix]:
        """What the input is multiplied with; none where that is not the input alone."""
        return [] if self.dropout and self.training else [(self.weight, self.bias), (self.lora_A, None)]

    def finish(self, h: Tensor, down: Tensor) -> Tensor:
        """The layer's output, from those products."""
        return self._updated(h, down, h if self.bias is None or self.magnitude is None else h - self.bias)

    def _updated(self, h: Tensor, down: Tensor, plain: Tensor) -> Tensor:
        """h (..., out) with the update that `down` (..., rank) leads to; `plain`: what DoRA's gain acts on."""
        exact = math.frexp(self.scale)[0] == 0.5  # powers of two round nothing, on whatever side
        if self.magnitude is None and exact and h.ndim == 2 and h.dtype == self.lora_B.dtype:
            added: Tensor = _Added.apply(h, down, self.lora_B, self.scale)
            return added
        update = F.linear(down, self.lora_B).mul_(self.scale)
        if self.magnitude is None:
            return update.add_(h)
        gain = self.gain()
        return (h + (gain - 1) * plain + gain * update).to(h.dtype)

    def gain(self) -> Tensor:
        """DoRA: magnitude / |row of W0 + scale B A| (out,); the norm counts as a constant. Kept while not training."""
        assert self.magnitude is not None
        if self._gain is not None:
            return self._gain
        gain = self.magnitude / row_norms(self.direction())
        self._gain = None if self.training else gain.detach()
        return gain

    def train(self, mode: bool = True) -> "LoraLinear":
        self._gain = None
        super().train(mode)
        return self

    @torch.no_grad()
    def direction(self) -> Tensor:
        """W0 + scale B A (out, in), in float32."""
        return torch.addmm(self.weight.float(), self.lora_B, self.lora_A, alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight (out, in) of a plain layer that does the same, in float32."""
        weight = self.direction()
        return weight if self.magnitude is None else self.magnitude[:, None] / row_norms(weight)[:, None] * weight


class _Added(torch.autograd.Function):
    """h (T, out) with scale * down B' added in place, two passes over it less; down (T, r), B (out, r)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, down: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(down, b)
        ctx.scale = scale
        ctx.mark_dirty(h)
        return h.addmm_(down, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        down, b = ctx.saved_tensors
        of_down = torch.addmm(b.new_zeros(1), grad, b, beta=0, alpha=ctx.scale)
        of_b = (down.t() @ grad).mul_(ctx.scale)  # (r, out): in half the time of its transpose
        return grad, of_down, of_b.t(), None


def row_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1)


@dataclass(frozen=True)
class Site:
    """A linear layer of the family's files, where an adapter may stand, and the layers of ours that it is."""

    path: str  # transformers' module path, such as model.layers.0.self_attn.q_proj
    stored: Stored  # its weight
    modules: tuple[str, ...]  # names in the GPT

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def layer(self) -> int:
        return int(self.modules[0].split(".")[1])  # blocks.N. ...


def linear_sites(family: Family, config: GPTConfig) -> list[Site]:
    """All linear layers of the blocks, in the order of the family's tensors."""
    shapes = shapes_of(config)
    linear = [s for s in family.tensors(config) if s.ours[0].startswith("blocks.") and len(shapes[s.ours[0]]) == 2]
    return [Site(s.name.removesuffix(".weight"), s, tuple(o.removesuffix(".weight") for o in s.ours)) for s in linear]


def updates_of(model: GPT, site: Site) -> list[LoraLinear]:
    """The adapted layers of a site, in the order of its parts; none where nothing is attached."""
    modules = [model.get_submodule(name) for name in site.modules]
    return [module for module in modules if isinstance(module, LoraLinear)]


def chosen(options: Lora, sites: Sequence[Site]) -> list[Site]:
    """The sites that targets and layers name. Raises UsageError for names that are nowhere."""
    hint = f"linear layers of this model: {', '.join(leaves(sites))}"
    layers = {site.layer for site in sites}
    if options.layers and (outside := sorted(set(options.layers) - layers)):
        raise UsageError(f"adapter.layers: {outside[0]}, the model has layers 0 to {max(layers)}")
    if isinstance(options.targets, list):
        for target in options.targets:
            if not any(_matches([target], site.path) for site in sites):
                raise UsageError(f"adapter.targets: no linear layer is called {target!r}", hint=hint)
    found = [site for site in sites if _wanted(options, site)]
    if not found:
        told = "; a string is a regular expression over whole paths" if isinstance(options.targets, str) else ""
        raise UsageError(f"adapter.targets: {options.targets!r} matches no linear layer{told}", hint=hint)
    return found


def leaves(sites: Sequence[Site]) -> list[str]:
    return list(dict.fromkeys(site.leaf for site in sites))


def _wanted(options: Lora, site: Site) -> bool:
    if is_saved(f"{site.path}.weight", options.modules_to_save):
        return False
    if options.layers is not None and site.layer not in options.layers:
        return False
    if options.targets == "all-linear":
        return True
    return _matches(options.targets, site.path)


def _matches(targets: str | list[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression, a list holds paths or their ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def is_saved(name: str, modules: Sequence[str]) -> bool:
    """Whether a tensor belongs to one of modules_to_save. PEFT's rule: any end of the path of a module above it."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path.endswith(module) for path in paths for module in modules)


def rank_and_scale(options: Lora, path: str) -> tuple[int, float]:
    """(r, alpha / r or alpha / sqrt r) of a site; patterns are matched by PEFT's rule: the end of the path."""
    rank, alpha = options.rank, float(options.alpha)
    for pattern, own_rank in reversed(options.rank_pattern.items()):  # the first that matches wins
        rank = own_rank if _ends(path, pattern) else rank
    for pattern, own_alpha in reversed(options.alpha_pattern.items()):
        alpha = own_alpha if _ends(path, pattern) else alpha
    return rank, alpha / (math.sqrt(rank) if options.rslora else rank)


def _ends(path: str, pattern: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def attach(model: GPT, options: Lora, sites: Sequence[Site], seed: int = 0) -> Callable[[], None]:
    """Put an update that is still 0 beside every site; returns what takes them away again."""
    generator = torch.Generator().manual_seed(seed)
    before: dict[str, nn.Module] = {}
    for site in sites:
        rank, scale = rank_and_scale(options, site.path)
        bases = {name: model.get_submodule(name) for name in site.modules}
        width = shapes_of(model.config)[site.stored.ours[0]][1]
        drawn = torch.empty(rank, width, device="cpu")
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)  # U(+-1/sqrt(in))
        # on `meta` the model has no values yet: both move later
        a = nn.Parameter(drawn if model.device.type == "meta" else drawn.to(model.device))
        for name, base in bases.items():
            assert isinstance(base, nn.Linear)
            model.set_submodule(name, LoraLinear(base, a, scale, options.dropout, options.dora))
        before |= bases

    def undo() -> None:
        for name, base in before.items():
            model.set_submodule(name, base)

    return undo


def adapt(model: GPT, family: Family, options: Lora, seed: int) -> None:
    """Freeze the model and let only an adapter train: LoRA's matrices, and the biases and modules that are asked."""
    sites = chosen(options, linear_sites(family, model.config))
    model.requires_grad_(False)
    attach(model, options, sites, seed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in _saved_parameters(options.modules_to_save, model, family):
        parameters[name].requires_grad_(True)
    adapted = {f"{name}.bias" for site in sites for name in site.modules}
    for name, parameter in parameters.items():
        if name.endswith(".bias") and (options.bias == "all" or (options.bias == "lora_only" and name in adapted)):
            parameter.requires_grad_(True)
    for parameter in parameters.values():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # whatever the frozen ones are kept in


def _saved_parameters(modules: Sequence[str], model: GPT, family: Family) -> list[str]:
    """Our names of what modules_to_save means. Raises UsageError for one that is nowhere."""
    ours = {adapter_name(stored): stored.ours for stored in family.tensors(model.config)}
    if model.config.tied:
        ours[f"{HEAD}.weight"] = ("embedding.weight",)
    found: list[str] = []
    for module in modules:
        names = [name for name in ours if is_saved(name, [module])]
        if not names:
            known = dict.fromkeys(name.split(".")[-2] for name in ours)
            raise UsageError(
                f"adapter.modules_to_save: no module is called {module!r}", hint=f"this model has {', '.join(known)}"
            )
        found += [our for name in names for our in ours[name]]
    return found


def adapter_name(stored: Stored) -> str:
    """The name of a tensor in transformers' modules, which PEFT's keys use."""
    if stored.ours[0].startswith("head."):
        return f"{HEAD}.{stored.ours[0].removeprefix('head.')}"
    return stored.name


@torch.no_grad()
def measure(model: GPT) -> None:
    """DoRA's magnitudes of a base that had no values when it was adapted."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and module.magnitude is not None:
            module.magnitude.copy_(row_norms(module.weight.float()))


@torch.no_grad()
def merge(model: GPT) -> None:
    """Add every update to its weight, in float32."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.weight.copy_(module.merged())
            module.lora_B.zero_()
            if module.magnitude is not None:
                module.magnitude.copy_(row_norms(module.weight))
