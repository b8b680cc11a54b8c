"""How likely a model finds labels: nll per scored token, summed or row by row. No logits are kept."""

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass

import torch

from sftcli.model.batches import common_beginning, in_pairs, make_batch
from sftcli.model.gpt import GPT
from sftcli.model.processes import filler, together
from sftcli.model.training import Engine
from sftcli.rows import Row

WINDOW_TOKENS = 1 << 16  # rows sorted by length within a window of this many tokens


@dataclass
class RowScore:
    """One row's scored tokens, in order: nll in nats, weight, and whether the label was the most likely token; of a row
    with a next-sentence label, nll and whether it was right."""

    row: Row
    nll: list[float]
    weights: list[float]
    correct: list[bool]
    pair: tuple[float, bool] | None = None


@dataclass
class Totals:
    """Sums over rows; `loss` is per unit of weight, and that of next sentences per row is added to it."""

    rows: int = 0
    tokens: int = 0
    weight: float = 0.0
    nll: float = 0.0
    weighted: float = 0.0
    correct: int = 0
    pairs: int = 0
    pair_nll: float = 0.0
    pairs_correct: int = 0

    def add(self, score: RowScore) -> None:
        self.rows += 1
        self.tokens += len(score.nll)
        self.weight += sum(score.weights)
        self.nll += sum(score.nll)
        self.weighted += sum(n * w for n, w in zip(score.nll, score.weights, strict=True))
        self.correct += sum(score.correct)
        if score.pair:
            self.pairs += 1
            self.pair_nll += score.pair[0]
            self.pairs_correct += score.pair[1]

    @property
    def token_loss(self) -> float:
        return self.weighted / self.weight if self.weight else 0.0

    @property
    def loss(self) -> float:
        return self.token_loss + (self.pair_nll / self.pairs if self.pairs else 0.0)

    @property
    def of_pairs(self) -> dict[str, float]:
        """The two losses, and how often the next sentence was told; nothing where no row has a label for it."""
        if not self.pairs:
            return {}
        nsp = {"nsp": self.pair_nll / self.pairs, "nsp_accuracy": self.pairs_correct / self.pairs}
        return {"mlm": self.token_loss} | nsp

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
    shared = common_beginning(rows) if model.can_share else 0
    for part in engine.world.micro_batches(rows, micro_batch_tokens, shared):
        engine.poll()
        batch = make_batch(part or filler(rows), shared=shared).to(engine.device)
        with engine.autocast():
            losses = model(batch)
        if not part:
            continue
        loss = next(iter(losses.values()))
        counts = batch.scored_per_row
        columns = (loss.nll, batch.weights, loss.correct)
        for row, nll, weights, correct in zip(batch.rows, *(c.cpu().split(counts) for c in columns), strict=True):
            found[id(row)] = RowScore(row, nll.tolist(), weights.tolist(), [bool(c) for c in correct.tolist()])
        if "nsp" in losses:
            both = zip(losses["nsp"].nll.tolist(), losses["nsp"].correct.tolist(), strict=True)
            for row, (value, right) in zip(in_pairs(batch.rows), both, strict=True):
                found[id(row)].pair = (value, bool(right))
    return [found[id(row)] for row in rows if id(row) in found]


def total_score(model: GPT, rows: Iterable[Row], micro_batch_tokens: int, engine: Engine) -> Totals:
    totals = Totals()
    with together(model):
        for score in score_rows(model, rows, micro_batch_tokens, engine):
            totals.add(score)
    own = astuple(totals)
    sums = engine.world.summed(torch.tensor(own, dtype=torch.float64)).tolist()
    return Totals(*(type(value)(found) for value, found in zip(own, sums, strict=True)))
