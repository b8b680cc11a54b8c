"""How long a person waits before anything happens: python benchmarks/startup.py [--runs 9]

Whole processes, timed from outside in turn; medians in seconds, one JSON line each. `python -c pass` is the floor.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

SFT = [sys.executable, "-m", "sftcli"]
DATA = os.path.join(os.path.dirname(__file__), "..", "data", "samples")


def seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        base, tokens = os.path.join(folder, "base"), os.path.join(folder, "tokens.jsonl")
        prompts = os.path.join(DATA, "prompts.jsonl")
        seconds([*SFT, "init", os.path.join(DATA, "chats.jsonl"), "-o", base])
        seconds([*SFT, "tokenize", prompts, "-m", base, "-o", tokens])
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "sft --help": [*SFT, "--help"],
            "sft train --help": [*SFT, "train", "--help"],
            "sft tokenize (20 rows)": [
                *SFT,
                "tokenize",
                prompts,
                "-m",
                base,
                "-o",
                os.path.join(folder, "again.jsonl"),
            ],
            "sft show": [*SFT, "show", tokens],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(runs + 1):
            for name, command in commands.items():
                spent = seconds(command)
                if run:  # the first is a warm-up
                    times[name].append(spent)
    for name, spent_all in times.items():
        figures = {"median_s": statistics.median(spent_all), "min_s": min(spent_all), "max_s": max(spent_all)}
        print(json.dumps({"command": name} | {key: round(value, 3) for key, value in figures.items()}))


main()
