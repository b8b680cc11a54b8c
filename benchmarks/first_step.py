"""From Enter to the end of the first optimizer step: python benchmarks/first_step.py ROWS -m MODEL [--kind full|lora]

Whole processes in turn: `sft train` until its metrics have a line, and TRL's SFTTrainer (tuned for a CPU) until it
calls back. Both load the same model and take the same rows. JSON lines: medians in seconds, and the ratio. Needs the
extra `bench`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out

from ratios import ratios

POLL = 0.01  # seconds
STEPPED = 17  # how TRL's process ends after its step


def trl_step(given: argparse.Namespace) -> None:
    """What a child does: a training of TRL's up to the end of its first step."""
    from peers import TRL_TUNED, options_of, trl_trainer
    from transformers import TrainerCallback

    from sftcli.rowfile import RowFile

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            os._exit(STEPPED)

    options, file = options_of(given.kind, 4, given.batch_rows), RowFile(given.rows)
    rows = [file[i] for i in range(4 * given.batch_rows)]
    trainer = trl_trainer(given.model, given.start, rows, options, given.trl, **TRL_TUNED)
    trainer.add_callback(Stop())
    trainer.train()


def seconds_of_trl(given: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = [sys.executable, "-P", __file__, *sys.argv[1:], "--trl", folder]
        done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, check=False)
        if done.returncode != STEPPED:
            raise SystemExit(f"TRL ended before its first step: {done.stderr.decode()}")
        return time.perf_counter() - begin


def seconds_of_ours(given: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        settings = ["max_steps=4", f"batch_rows={given.batch_rows}", "sample_rows=0", "dtype=float32"]
        settings += ["adapter=lora", "adapter.rank=16"] if given.kind == "lora" else []
        command = [sys.executable, "-m", "sftcli", "-q", "train", given.rows, "-m", given.model, "-o", str(run)]
        begin = time.perf_counter()
        process = subprocess.Popen(command + [part for setting in settings for part in ("--set", setting)])
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit("sft train ended before its first step")
            time.sleep(POLL)
        spent = time.perf_counter() - begin
        process.kill()
        process.wait()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--kind", choices=("full", "lora"), default="full")
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)  # what a child runs
    given = parser.parse_args()
    if given.trl:
        trl_step(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.kind == "lora":
            from peers import options_of, save_start

            given.start = Path(folder, "start")
            save_start(options_of(given.kind, 1, given.batch_rows), given.model, given.start)
            sys.argv += ["--start", str(given.start)]
        seconds: dict[str, list[float]] = {"sft": [], "trl": []}
        for _ in range(given.runs):
            seconds["sft"].append(seconds_of_ours(given))
            seconds["trl"].append(seconds_of_trl(given))
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, taken in seconds.items():
        print(json.dumps({"side": name, "seconds": round(medians[name], 2), "runs": [round(s, 2) for s in taken]}))
    print(json.dumps({"kind": given.kind, **ratios(seconds["sft"], seconds["trl"])}))


if __name__ == "__main__":
    main()
