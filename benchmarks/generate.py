"""Ours beside transformers' generate: python benchmarks/generate.py MODEL DATA [--columns prompt=question] [--batch 1 8]

Greedy answers of one length to the same prompts, padded on the left for transformers, both sides in turn in one
process. Without equal tokens there is no figure; where the two best logits are closer than 1e-3 at the first
difference, the row is counted as a tie. Tokens/s are of new tokens, prompts included in the time; the ratio is that of
the medians, with the smallest and the largest of the single runs; memory is what a run takes beyond the loaded models.
`--quantize int8` measures our int8 weights instead: their tokens may differ, so what they cost is printed as the
perplexity of transformers' answers. JSON lines, and a table on stderr; transformers must be installed (extra `test`).
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sftcli.model.layout import laid_out

from sftcli.artifacts import read_objects
from sftcli.model.attention import Group, RowAttention
from sftcli.model.cache import padded
from sftcli.model.checkpoint import load_trained, open_folder
from sftcli.model.decoding import generate, in_order
from sftcli.model.gpt import GPT
from sftcli.model.growth import Prompt
from sftcli.recipe import Generate
from sftcli.stages.common import codec_for, template_for
from sftcli.text.records import read_record, renamed
from sftcli.text.speaker import Speaker

TIE = 1e-3
Rows = list[list[int]]


def prompts_of(model: str, data: str, columns: dict[str, str], count: int) -> Rows:
    """The ids that `sft generate` feeds for the first lines of a file."""
    codec = codec_for(model, None)
    speaker = Speaker(template_for(codec, model, None, None, columns), codec.ends)
    lines = islice(enumerate(read_objects(data), 1), count)
    records = [read_record(renamed(fields, columns, where), where, number) for number, (where, _, fields) in lines]
    found = codec.encode([speaker.prompt(record)[0] for record in records])
    return [found[i % len(found)][0] for i in range(count)]


def sides_of(model: str, quantize: str | None) -> tuple[dict[str, Callable[[Rows, int], Rows]], GPT, GPT]:
    """Both ways to answer, and our model as it was loaded and as it is laid out."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    plain, network = (load_trained(open_folder(Path(model))) for _ in range(2))
    laid_out(network, quantize)

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
            same = next(t for t, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
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


def measured(work: Callable[[], Rows]) -> tuple[Rows, float, int]:
    """(answers, seconds, bytes beyond those before)."""
    clear, before = Path("/proc/self/clear_refs"), memory("VmRSS")
    if clear.exists():
        clear.write_text("5")  # VmHWM starts anew
    begin = time.perf_counter()
    found = work()
    return found, time.perf_counter() - begin, max(memory("VmHWM") - before, 0)


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
    print("batch  sft tok/s  transformers  ratio (min-max)      MB sft/transformers  ties", file=sys.stderr)
    for batch in given.batch:
        rows = prompts[:batch]
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        extra = dict.fromkeys(sides, 0)
        for run in range(given.runs + 1):
            answers = {}
            for name, side in sides.items():
                answers[name], spent, held = measured(lambda side=side: side(rows, given.new_tokens))  # type: ignore[misc]
                if run:  # the first is a warm-up
                    seconds[name].append(spent)
                    extra[name] = max(extra[name], held)
        report(batch, given, seconds, extra, accuracy(given, plain, network, rows, answers))


def accuracy(given: Any, plain: GPT, network: GPT, rows: Rows, answers: dict[str, Rows]) -> dict[str, float]:
    if given.quantize is None:
        return {"ties": ties(plain, rows, answers["sft"], answers["transformers"])}
    before, after = (perplexity(model, rows, answers["transformers"]) for model in (plain, network))
    same = sum(a == b for a, b in zip(answers["sft"], answers["transformers"], strict=True))
    return {"equal_rows": same, "perplexity": round(before, 4), "perplexity_int8": round(after, 4)}


def report(
    batch: int, given: Any, seconds: dict[str, list[float]], extra: dict[str, int], accurate: dict[str, float]
) -> None:
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    speeds = {name: round(batch * given.new_tokens / spent, 1) for name, spent in medians.items()}
    pairs = [b / a for a, b in zip(seconds["sft"], seconds["transformers"], strict=True)]
    ratio = round(medians["transformers"] / medians["sft"], 2)
    megabytes = {name: round(held / 1e6) for name, held in extra.items()}
    figures = {"batch": batch, "new_tokens": given.new_tokens, "tokens_per_second": speeds, "ratio": ratio}
    spread = {"min": round(min(pairs), 2), "max": round(max(pairs), 2), "extra_mb": megabytes}
    print(json.dumps(figures | spread | accurate), flush=True)
    cells = (batch, speeds["sft"], speeds["transformers"], f"{ratio:.2f} ({min(pairs):.2f}-{max(pairs):.2f})")
    held = f"{megabytes['sft']}/{megabytes['transformers']}"
    told = " ".join(f"{key} {value}" for key, value in accurate.items())
    print("{:5}  {:9}  {:12}  {:19}  {:19}  {}".format(*cells, held, told), file=sys.stderr)


if __name__ == "__main__":
    main()
