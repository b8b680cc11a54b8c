"""From a model folder to its first token: python benchmarks/load.py MODEL [--runs 5]

Whole processes in turn, ours and transformers: imports, load, one prompt of 64 ids, one greedy token. Medians: seconds
from the start of the process and inside it (after imports), and peak resident memory, in all and beyond what the
imports took, as a multiple of the float32 weights. One JSON line each; transformers must be installed (extra `test`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

OURS = """
from pathlib import Path
from sftcli.model.checkpoint import load_trained, open_folder
from sftcli.model.decoding import Prompt, generate
from sftcli.recipe import Generate
imported()
model = load_trained(open_folder(Path(sys.argv[1])))
ids = list(range(100, 164))
(done,) = generate(model, [Prompt(ids, "0")], Generate(max_new_tokens=1), [])
token = done.ids[0]
count = sum(p.numel() for p in model.parameters())
"""
THEIRS = """
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
imported()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(100, 164)[None]
token = int(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)[0, -1])
count = sum(p.numel() for p in model.parameters())
"""
FRAME = """
import json, resource, sys, time
import torch
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def imported():
    global begin, before
    begin, before = time.perf_counter(), peak()
%s
print(json.dumps({"token": token, "inside": time.perf_counter() - begin, "peak": peak(),
                  "beyond": (peak() - before) / (4 * count)}))
"""


def measured(body: str, model: str) -> dict[str, float]:
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", FRAME % body, model],
        check=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"seconds": time.perf_counter() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"sft": [], "transformers": []}
    for _ in range(options.runs):
        for name, body in (("sft", OURS), ("transformers", THEIRS)):
            found[name].append(measured(body, options.model))
    medians = {
        name: {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
        for name, runs in found.items()
    }
    for name, values in medians.items():
        print(json.dumps({"what": name, **values}))
    ratios = {
        key: round(medians["transformers"][key] / medians["sft"][key], 2) for key in ("seconds", "inside", "peak")
    }
    print(json.dumps({"what": "transformers / sft", **ratios}))


if __name__ == "__main__":
    main()
