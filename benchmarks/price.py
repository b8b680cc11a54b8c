"""What a setting of training costs: python benchmarks/price.py ROWS -m MODEL [--kind full|lora] SETTING...

ROWS is a file of `sft mask`; a SETTING changes none of the steps: gradient_checkpointing=true or, say,
micro_batch_tokens=1024. A model as it comes and one under each setting take the same steps in turn, in one process;
the first is a warm-up. Peaks are those of processes that run one of them. One JSON line each.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out

import torch
from peers import options_of
from ratios import ratios
from train import Work, agree, alternated, our_model, our_steps

from sftcli.model.memory import keep_freed_memory, peak_bytes
from sftcli.recipe import Train
from sftcli.recipefile import apply_settings, parse


def setting(text: str) -> str:
    if text.partition("=")[0] not in ("gradient_checkpointing", "micro_batch_tokens"):
        raise argparse.ArgumentTypeError(f"{text}: only settings of how a step is computed on a CPU")
    return text


def changed(options: Train, settings: list[str]) -> Train:
    made: Train = parse(Train, apply_settings(options.model_dump(mode="json"), settings))
    return made


def peak(settings: list[str]) -> int:
    """Of a process that takes the steps under these settings alone."""
    command = [sys.executable, "-P", __file__, *sys.argv[1:], "--alone", *settings]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("settings", nargs="+", type=setting)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--kind", choices=("full", "lora"), default="full")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--alone", nargs="*", help=argparse.SUPPRESS)  # what a child runs
    given = parser.parse_args()
    keep_freed_memory()  # as `sft train` does
    options = options_of(given.kind, given.steps, given.batch_rows)
    sides = {"as it comes": options, **{text: changed(options, [text]) for text in given.settings}}
    if given.alone is not None:
        work = Work(given.rows, given.model, changed(options, given.alone), None)
        list(our_steps(our_model(work), work))
        print(peak_bytes(torch.device("cpu")))
        return
    peaks = {name: peak([] if side is options else [name]) for name, side in sides.items()}
    works = {name: Work(given.rows, given.model, side, None) for name, side in sides.items()}
    running = {name: our_steps(our_model(work), work) for name, work in works.items()}
    losses, seconds = alternated(running, given.steps)
    apart = agree(losses)
    for name, spent in seconds.items():
        figures = {"kind": given.kind, "setting": name, "median_s": round(statistics.median(spent), 3)}
        beside = ratios(spent, seconds["as it comes"])
        print(json.dumps({**figures, **beside, "peak_mib": round(peaks[name] / 2**20), "losses_apart": f"{apart:.1e}"}))


if __name__ == "__main__":
    main()
