"""How long a person waits before anything happens: python benchmarks/startup.py [-m MODEL] [--runs 9]

Whole processes, timed from outside in turn; medians in seconds, one JSON line each. `python -c pass` is the floor. With
a model also one token from it, ours beside transformers (extra `bench`). The first training step: first_step.py.
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
PROMPT = "Name a river."
PEER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (kind.from_pretrained(sys.argv[1]) for kind in (AutoTokenizer, AutoModelForCausalLM))
ids = tokenizer(sys.argv[2], return_tensors="pt")
print(tokenizer.decode(model.float().generate(**ids, max_new_tokens=1, do_sample=False)[0]))
"""
DATA = os.path.join(os.path.dirname(__file__), "..", "data", "samples")


def seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("-m", "--model")
    given = parser.parse_args()
    runs = given.runs
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
        if given.model:
            asked = os.path.join(folder, "asked.jsonl")
            with open(asked, "w") as file:
                file.write(json.dumps({"text": PROMPT}) + "\n")
            commands |= {
                "sft generate (1 token)": [*SFT, "generate", asked, "-m", given.model, "--max-new-tokens", "1"],
                "transformers (1 token)": [sys.executable, "-c", PEER, given.model, PROMPT],
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


if __name__ == "__main__":
    main()
