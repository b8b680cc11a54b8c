"""How likely a model finds labels: nll per scored token, summed or row by row. No logits are kept."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass

import torch

from sftcli.model.batches import make_batch
from sftcli.model.gpt import GPT
from sftcli.model.training import Engine
from sftcli.rows import Row

WINDOW_TOKENS = 1 << 16  # rows sorted by length within a window of this many tokens


@dataclass
class RowScore:
    """One row's scored tokens, in order: nll in nats, weight, and whether the label was the most likely token."""

    row: Row
    nll: list[float]
    weights: list[float]
    correct: list[bool]


@dataclass
class Totals:
    """Sums over rows; `loss` is per unit of weight."""

    rows: int = 0
    tokens: int = 0
    weight: float = 0.0
    nll: float = 0.0
    weighted: float = 0.0
    correct: int = 0

    def add(self, score: RowScore) -> None:
        self.rows += 1
        self.tokens += len(score.nll)
        self.weight += sum(score.weights)
        self.nll += sum(score.nll)
        self.weighted += sum(n * w for n, w in zip(score.nll, score.weights, strict=True))
        self.correct += sum(score.correct)

    @classmethod
    def of(cls, values: Sequence[float]) -> "Totals":
        rows, tokens, weight, nll, weighted, correct = values
        return cls(int(rows), int(tokens), weight, nll, weighted, int(correct))

    @property
    def loss(self) -> float:
        return self.weighted / self.weight if self.weight else 0.0

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens if self.tokens else 0.0


@torch.no_grad()
def score_rows(model: GPT, rows: Iterable[Row], micro_batch_tokens: int, engine: Engine) -> Iterator[RowScore]:
    """Scores in input order, in each process of its share of the rows; memory is bounded by a window of rows."""
    model.eval()
    window: list[Row] = []
    tokens = 0
    for row in rows:
        window.append(row)
        tokens += len(row.input_ids)
        if tokens >= WINDOW_TOKENS:
            yield from _score_window(model, window, micro_batch_tokens, engine)
            window, tokens = [], 0
    yield from _score_window(model, window, micro_batch_tokens, engine)


def _score_window(model: GPT, rows: list[Row], micro_batch_tokens: int, engine: Engine) -> list[RowScore]:
    found: dict[int, RowScore] = {}
    for part in engine.world.micro_batches(rows, micro_batch_tokens):
        engine.poll()
        batch = make_batch(part).to(engine.device)
        with engine.autocast():
            (loss,) = model(batch).values()
        counts = batch.scored_per_row
        columns = (loss.nll, batch.weights, loss.correct)
        for row, nll, weights, correct in zip(batch.rows, *(c.cpu().split(counts) for c in columns), strict=True):
            found[id(row)] = RowScore(row, nll.tolist(), weights.tolist(), [bool(c) for c in correct.tolist()])
    return [found[id(row)] for row in rows if id(row) in found]


def total_score(model: GPT, rows: Iterable[Row], micro_batch_tokens: int, engine: Engine) -> Totals:
    totals = Totals()
    for score in score_rows(model, rows, micro_batch_tokens, engine):
        totals.add(score)
    return Totals.of(engine.world.summed(torch.tensor(astuple(totals), dtype=torch.float64)).tolist())
