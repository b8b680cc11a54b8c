"""Make tests/frozen/golden: what a training run of today computes, for the code of tomorrow to compute again.

    python tests/make_golden.py

base/ and rows.safetensors are the input, losses.json 100 losses of a run on them (for each platform its own bits), and
checkpoint-1/ the run killed at its step 6, with `sft-checkpoint/1` as its format. A format that changes adds checkpoint-2/
and keeps this one.
"""

import json
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from model_fixtures import metrics, model_folder, write_turns

from sftcli import manifest
from sftcli.artifacts import fingerprint
from sftcli.reading import read_json
from sftcli.recipe import Train
from sftcli.recipefile import apply_settings, parse
from sftcli.stages.train import train

HERE = Path(__file__).parent / "frozen" / "golden"
BASE, ROWS, LOSSES, CHECKPOINT = HERE / "base", HERE / "rows.safetensors", HERE / "losses.json", HERE / "checkpoint-1"
LENGTHS = [12, 7, 20, 9, 15, 5, 11, 18, 6, 13, 8, 10]
SETTINGS = ["batch_rows=3", "optimizer.lr=1e-3", "dropout=0.1", "sample_rows=0", "dtype=float32", "device=cpu"]
HELD = 6  # the step of the checkpoint


def tag() -> str:
    """What the bits of a float32 sum depend on: the libraries choose their kernels by the processor."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
    model = fingerprint("".join(re.findall(r"^model name.*", info, re.M)[:1]) or info)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{sys.platform} {platform.machine()} {capability} {model} torch {torch.__version__}"


def golden_run(folder: Path, steps: int, *settings: str, resumed: bool = False) -> list[float]:
    """Train in `folder`; returns the loss of every step."""
    options = parse(Train, apply_settings({}, [*SETTINGS, f"max_steps={steps}", *settings]), section="train")
    train(options, str(ROWS), str(BASE), str(folder), resumed=resumed)
    return [line["loss"] for line in metrics(folder)]


def main() -> None:
    HERE.mkdir(parents=True, exist_ok=True)
    if not BASE.exists():
        model_folder(BASE, "llama", layers=1, width=16, heads=2, kv_heads=1, mlp_width=16)
        (HERE / "base-data.jsonl").unlink(missing_ok=True)
        write_turns(BASE, ROWS, LENGTHS)
    known = json.loads(LOSSES.read_text()) if LOSSES.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        known[tag()] = [loss.hex() for loss in golden_run(Path(temporary, "run"), 100)]
        LOSSES.write_text(json.dumps(known, indent=1) + "\n")
        if CHECKPOINT.exists():
            return
        run = Path(temporary, "checkpoint")
        golden_run(run, 12, f"checkpoint_every={HELD}")
        shutil.rmtree(run / "model")
        shutil.rmtree(manifest.folder_of(run, 12))
        own = read_json(run / "run.json")["id"]
        (run / "run.json").write_text(json.dumps({"id": own}) + "\n")  # not this machine's paths
        shutil.copytree(run, CHECKPOINT)


if __name__ == "__main__":
    main()
