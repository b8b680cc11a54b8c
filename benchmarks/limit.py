"""How fast a step could be: its matrix products and nothing else, at the speed of this machine in this minute.

What it multiplies: sftcli/model/flops.py. The body sees all tokens, the head only those with a label.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

from sftcli.model.flops import work_of
from sftcli.model.gpt import GPT

Shape = tuple[int, int]  # out, in


class Limit:
    """The products of a model's step and how fast this machine has done each of them, measured now and again."""

    def __init__(self, model: GPT, most: int, most_trained: int):
        """The most tokens of a step, and of those that are trained."""
        layers = {n: m for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}
        self.body = Counter((m.out_features, m.in_features) for m in layers.values())
        self.head: Shape = (model.head.out_features, model.head.in_features)
        self.trains = all(m.weight.requires_grad for m in layers.values())
        self.work = work_of(model)
        self.seconds_per_flop: dict[tuple[Shape, str], list[float]] = {}
        widest = max(most * max(map(max, self.body)), most_trained * max(self.head))
        self.x, self.y, self.dx = torch.randn(3, widest)
        self.weights = {shape: torch.randn(2, *shape) for shape in [*self.body, self.head]}

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "input", "weight") if self.trains else ("forward", "input")

    def measure(self, tokens: int, trained: int) -> None:
        """Each product once, into memory that has been touched before."""
        for shape in [*self.body, self.head]:
            n, (out, inner) = (trained if shape == self.head else tokens), shape
            x, dx = self.x[: n * inner].view(n, inner), self.dx[: n * inner].view(n, inner)
            y = self.y[: n * out].view(n, out)
            weight, gradient = self.weights[shape]
            products: dict[str, Callable[[], object]] = {
                "forward": lambda: torch.mm(x, weight.t(), out=y),  # noqa: B023
                "input": lambda: torch.mm(y, weight, out=dx),  # noqa: B023
                "weight": lambda: torch.mm(y.t(), x, out=gradient),  # noqa: B023
            }
            for name in self.passes:
                begin = time.perf_counter()
                products[name]()
                seconds = time.perf_counter() - begin
                self.seconds_per_flop.setdefault((shape, name), []).append(seconds / (2 * n * out * inner))

    def seconds(self, lengths: Sequence[int], trained: int) -> float:
        """How long that takes here; attention and adapters at the mean speed of the linear layers."""
        linear = self._linear(sum(lengths), trained)
        spent = sum(flop * statistics.median(self.seconds_per_flop[key]) for key, flop in linear.items())
        return spent * self.work.of(lengths, trained) / sum(linear.values())

    def _linear(self, tokens: int, trained: int) -> dict[tuple[Shape, str], float]:
        shapes = [(shape, count * tokens) for shape, count in self.body.items()] + [(self.head, trained)]
        return {(shape, name): 2.0 * n * shape[0] * shape[1] for shape, n in shapes for name in self.passes}
