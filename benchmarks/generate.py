"""Ours beside transformers' generate: python benchmarks/generate.py MODEL DATA [--columns prompt=question]

Greedy answers of one length to the same prompts, padded on the left for transformers, both sides in turn in one
process. Without equal tokens there is no figure; where the two best logits are closer than 1e-3 at the first
difference, the row is counted as a tie. `first` is the time until all rows have their first token, `tokens_per_second`
counts those after it; ratios are those of medians, with the smallest and the largest of single runs; memory is what a
run takes beyond the loaded models. `--quantize int8` measures our int8 weights: their tokens may differ, so what they
cost is printed as the perplexity of transformers' answers. JSON lines, and a table on stderr; transformers must be
installed (extra `test`).
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from sftcli.model.attention import Group, RowAttention
from sftcli.model.cache import padded
from sftcli.model.checkpoint import load_trained, open_folder
from sftcli.model.decoding import generate, in_order
from sftcli.model.gpt import GPT
from sftcli.model.growth import Prompt
from sftcli.model.layout import laid_out
from sftcli.reading import read_objects
from sftcli.recipe import Generate
from sftcli.stages.common import codec_for, template_for
from sftcli.text.records import read_record, renamed
from sftcli.text.speaker import Speaker

TIE = 1e-3
Rows = list[list[int]]
Answer = Callable[[Rows, int], Rows]  # prompts and the number of new tokens -> these


def prompts_of(model: str, data: str, columns: dict[str, str], count: int) -> Rows:
    """The ids that `sft generate` feeds for the first lines of a file."""
    codec = codec_for(model, None)
    speaker = Speaker(template_for(codec, model, None, None, columns), codec.ends)
    lines = islice(enumerate(read_objects(data), 1), count)
    records = [read_record(renamed(fields, columns, where), where, number) for number, (where, _, fields) in lines]
    found = codec.encode([speaker.prompt(record)[0] for record in records])
    return [found[i % len(found)][0] for i in range(count)]


def sides_of(model: str, quantize: str | None) -> tuple[dict[str, Answer], GPT, GPT]:
    """Both ways to answer, and our model as it was loaded and as it is laid out."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    plain, network = (load_trained(open_folder(Path(model))) for _ in range(2))
    if quantize:
        laid_out(network, 1, quantize)

    def ours(rows: Rows, new: int) -> Rows:
        options = Generate(batch_size=len(rows), max_new_tokens=new)
        prompts = [Prompt(ids, str(i)) for i, ids in enumerate(rows)]
        return [done.ids for done in in_order(generate(network, prompts, options, ()))]

    def of_transformers(rows: Rows, new: int) -> Rows:
        ids, mask = padded(rows, "left")
        made = theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        return made[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    return {"sft": ours, "transformers": of_transformers}, plain.eval(), network.eval()


@torch.no_grad()
def logits_of(model: GPT, ids: list[int]) -> torch.Tensor:
    attention = RowAttention([Group(1, len(ids))])
    return model.logits(model.hidden(torch.tensor(ids), torch.arange(len(ids)), attention))


def ties(model: GPT, rows: Rows, found: Rows, expected: Rows) -> int:
    """How many rows differ from a near tie on. Ends the program at any other difference."""
    count = 0
    for row, a, b in zip(rows, found, expected, strict=True):
        if a != b:
            pairs = enumerate(zip(a, b, strict=False))  # one may have ended before the other
            same = next((t for t, (x, y) in pairs if x != y), min(len(a), len(b)))
            best, second = logits_of(model, row + a[:same])[-1].topk(2).values.tolist()
            if best - second >= TIE:
                sys.exit(f"no figure: outputs differ at token {same} by {best - second:.2g}")
            count += 1
    return count


def perplexity(model: GPT, rows: Rows, answers: Rows) -> float:
    """Of answers, given their prompts."""
    nll = 0.0
    for row, answer in zip(rows, answers, strict=True):
        logits = logits_of(model, row + answer)[len(row) - 1 : -1]
        nll += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    return math.exp(nll / sum(map(len, answers)))


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) in bytes; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def measured(answer: Answer, rows: Rows, new: int) -> tuple[Rows, float, int]:
    """(answers, seconds, bytes beyond those before)."""
    clear, before = Path("/proc/self/clear_refs"), memory("VmRSS")
    if clear.exists():
        clear.write_text("5")  # VmHWM starts anew
    begin = time.perf_counter()
    found = answer(rows, new)
    return found, time.perf_counter() - begin, max(memory("VmHWM") - before, 0)


@dataclass
class Side:
    """What one side did with a batch, run by run."""

    answers: Rows = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds until every row has its first token
    whole: list[float] = field(default_factory=list)
    extra: int = 0  # bytes

    def take(self, counts: bool, only_first: bool, answers: Rows, seconds: float, extra: int) -> None:
        if counts:
            (self.first if only_first else self.whole).append(seconds)
            self.extra = max(self.extra, extra)
        self.answers = answers

    @property
    def decoding(self) -> list[float]:
        """Seconds from the first token to the last."""
        return [whole - first for whole, first in zip(self.whole, self.first, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--columns", default="")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quantize", choices=["int8"])
    given = parser.parse_args()
    columns = dict(pair.split("=") for pair in given.columns.split(",") if pair)
    prompts = prompts_of(given.model, given.data, columns, max(given.batch))
    sides, plain, network = sides_of(given.model, given.quantize)
    print("batch     tok/s  transformers  ratio (min-max)    first   MB          ", file=sys.stderr)
    for batch in given.batch:
        rows = prompts[:batch]
        if not given.quantize:
            laid_out(network, batch)
        found = {name: Side() for name in sides}
        for run in range(given.runs + 1):  # the first is a warm-up
            for new in (1, given.new_tokens):
                for name, answer in sides.items():
                    found[name].take(run > 0, new == 1, *measured(answer, rows, new))
        accurate = accuracy(given.quantize, plain, network, rows, {name: side.answers for name, side in found.items()})
        report(batch, given.new_tokens, found, accurate)


def accuracy(quantize: str | None, plain: GPT, network: GPT, rows: Rows, answers: dict[str, Rows]) -> dict[str, float]:
    if quantize is None:
        return {"ties": ties(plain, rows, answers["sft"], answers["transformers"])}
    before, after = (perplexity(model, rows, answers["transformers"]) for model in (plain, network))
    same = sum(a == b for a, b in zip(answers["sft"], answers["transformers"], strict=True))
    return {"equal_rows": same, "perplexity": round(before, 4), "perplexity_int8": round(after, 4)}


def report(batch: int, new: int, found: dict[str, Side], accurate: dict[str, float]) -> None:
    ours, theirs = found["sft"], found["transformers"]
    speeds = {name: round(batch * (new - 1) / statistics.median(side.decoding), 1) for name, side in found.items()}
    ratios = {
        name: statistics.median(getattr(theirs, name)) / statistics.median(getattr(ours, name))
        for name in ("decoding", "first", "whole")
    }
    pairs = [b / a for a, b in zip(ours.decoding, theirs.decoding, strict=True)]
    figures = {"batch": batch, "new_tokens": new, "tokens_per_second": speeds}
    figures |= {"ratio": {name: round(ratio, 2) for name, ratio in ratios.items()}}
    figures |= {"min": round(min(pairs), 2), "max": round(max(pairs), 2)}
    figures |= {"extra_mb": {name: round(side.extra / 1e6) for name, side in found.items()}}
    print(json.dumps(figures | accurate), flush=True)
    spread = f"{ratios['decoding']:.2f} ({min(pairs):.2f}-{max(pairs):.2f})"
    held = f"{ours.extra / 1e6:.0f}/{theirs.extra / 1e6:.0f}"
    told = ", ".join(f"{key} {value}" for key, value in accurate.items())
    row = (batch, speeds["sft"], speeds["transformers"], spread, ratios["first"], held, told)
    print("{:5}  {:8}  {:12}  {:17}  {:5.2f}  {:10}  {}".format(*row), file=sys.stderr)


if __name__ == "__main__":
    main()
