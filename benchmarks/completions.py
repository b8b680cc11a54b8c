"""A file of prompts, completed to its end: python benchmarks/completions.py MODEL DATA [--columns prompt=question]

Greedy answers until the model stops, as people generate them. transformers takes a batch after the other, padded on the
left, and each lasts as long as its longest answer; ours lets rows leave and others enter (and is given the prompts in
the same order). Both sides in turn in one process; answers must be equal but for near ties, which are counted. Tokens
are those of the answers, stops included. JSON lines; transformers must be installed (extra `test`).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out

from generate import Rows, prompts_of, ties
from ratios import ratios

from sftcli.model.cache import padded
from sftcli.model.checkpoint import load_trained, open_folder
from sftcli.model.decoding import generate, in_order
from sftcli.model.gpt import GPT
from sftcli.model.growth import Prompt
from sftcli.model.layout import laid_out
from sftcli.recipe import Generate


def ours(network: GPT, prompts: Rows, batch: int, new: int, stops: list[int]) -> Rows:
    options = Generate(batch_size=batch, max_new_tokens=new)
    rows = [Prompt(ids, str(i)) for i, ids in enumerate(prompts)]
    done = in_order(generate(network, rows, options, stops))
    return [answer.ids + stops[:1] * (answer.finish_reason == "stop") for answer in done]


def of_transformers(network: torch.nn.Module, prompts: Rows, batch: int, new: int, stops: list[int]) -> Rows:
    answers: Rows = []
    for start in range(0, len(prompts), batch):
        ids, mask = padded(prompts[start : start + batch], "left")
        made = network.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=stops[:1]
        )
        answers += [until(row, stops[0]) for row in made[:, ids.shape[1] :].tolist()]
    return answers


def until(ids: list[int], stop: int) -> list[int]:
    """Up to the stop token and with it."""
    return ids[: ids.index(stop) + 1] if stop in ids else ids


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--columns", default="")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    columns = dict(pair.split("=") for pair in given.columns.split(",") if pair)
    prompts = prompts_of(given.model, given.data, columns, given.prompts)
    stops = [AutoTokenizer.from_pretrained(given.model).eos_token_id]
    theirs = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    network, plain = (load_trained(open_folder(Path(given.model))).eval() for _ in range(2))
    for batch in given.batch:
        laid_out(network, batch)
        seconds: dict[str, list[float]] = {"sft": [], "transformers": []}
        answers: dict[str, Rows] = {}
        for _ in range(given.runs):
            for name in seconds:
                begin = time.perf_counter()
                if name == "sft":
                    answers[name] = ours(network, prompts, batch, given.new_tokens, stops)
                else:
                    answers[name] = of_transformers(theirs, prompts, batch, given.new_tokens, stops)
                seconds[name].append(time.perf_counter() - begin)
        report(batch, seconds, answers, ties(plain, prompts, answers["sft"], answers["transformers"]))


def report(batch: int, seconds: dict[str, list[float]], answers: dict[str, Rows], tied: int) -> None:
    lengths = [len(answer) for answer in answers["transformers"]]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    figures = {"batch": batch, "prompts": len(lengths), "tokens": sum(lengths), "longest": max(lengths), "ties": tied}
    figures |= {"tokens_per_second": {name: round(sum(lengths) / taken, 1) for name, taken in medians.items()}}
    print(json.dumps(figures | ratios(seconds["sft"], seconds["transformers"])), flush=True)


if __name__ == "__main__":
    main()
