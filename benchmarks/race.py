"""From Enter to a held-out loss: python benchmarks/race.py ROWS HELDOUT -m MODEL -o DIR [--kind full] [--minutes 10]

ROWS and HELDOUT are files of `sft mask`. Ours and TRL's SFTTrainer (tuned for a CPU) each get a process and the same
wall clock, imports and loading included; it stands still while the held-out loss is taken, by the same code for both.
Before, each tries three learning rates, a tenth of the clock each, and keeps the one of the best loss on the last 100
of ROWS, which are never trained. JSON lines; with matplotlib DIR/race.png. Needs the extra `bench`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out

from finetune import held_out_loss
from peers import LR, TRL_TUNED, options_of, save_start, trl_trainer
from train import Work, our_model

from sftcli.model import optim
from sftcli.model.batches import shuffled
from sftcli.model.memory import keep_freed_memory
from sftcli.model.scoring import total_score
from sftcli.model.training import Plan, choose_engine, train_steps
from sftcli.rowfile import RowFile
from sftcli.rows import Row

SIDES = ("sft", "trl")
FACTORS = (0.5, 1.0, 2.0)  # learning rates, as multiples of the usual one
MANY = 10**6  # steps: the clock ends a run
LOOKS = 4  # at the held-out loss, in a run
KEPT = 100  # rows that choose the learning rate


class Clock:
    """Wall clock since Enter, without what was spent on looking at the held-out loss, `looks` times a run."""

    def __init__(self, began: float, seconds: float, looks: int, look: Callable[[], float]):
        self.began, self.seconds, self.look = began, seconds, look
        self.every = self.due = seconds / looks
        self.steps = 0
        self.seen: list[tuple[float, int, float]] = []  # seconds, steps, held-out loss

    def over(self) -> bool:
        """After a step: look where it is due; whether time is up."""
        self.steps += 1
        now = time.time()
        spent = now - self.began
        if spent >= min(self.due, self.seconds):
            self.seen.append((round(spent, 1), self.steps, round(self.look(), 5)))
            self.due = (spent // self.every + 1) * self.every
            self.began += time.time() - now
        return spent >= self.seconds


def run_ours(work: Work, rows: RowFile, held: Sequence[Row], clock: Callable[..., Clock]) -> Clock:
    keep_freed_memory()  # as `sft train` does
    network, lr = our_model(work), work.options.optimizer.lr or 0.0
    optimizers, engine = optim.build(network, work.options.optimizer, lr), choose_engine("cpu", "float32")
    plan = Plan(rows.lengths()[:-KEPT], work.options)
    running = clock(lambda: total_score(network, held, 2048, engine).loss)
    for _ in train_steps(network, optimizers, rows.__getitem__, plan, work.options, engine, lr):
        if running.over():
            break
    return running


def run_trl(work: Work, rows: RowFile, held: Sequence[Row], clock: Callable[..., Clock]) -> Clock:
    from transformers import TrainerCallback

    ordered = [rows[i] for i in shuffled(len(rows) - KEPT, work.options.seed, 0)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(work.model, work.start, ordered, work.options, Path(folder), **TRL_TUNED)

        def look() -> float:
            trainer.save_model(folder)
            place = (work.model, folder) if work.start else (folder, None)
            return held_out_loss(*place, held)

        running = clock(look)

        class Stop(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = running.over()

        trainer.add_callback(Stop())
        trainer.train()
    return running


def child(given: argparse.Namespace) -> None:
    """One run of one side; prints what it saw."""
    options = options_of(given.kind, MANY, given.batch_rows, lr=given.lr)
    work, rows = Work(given.rows, given.model, options, given.start), RowFile(given.rows)
    held = [rows[i] for i in range(len(rows) - KEPT, len(rows))] if given.search else list(RowFile(given.heldout))[:300]

    def clock(look: Callable[[], float]) -> Clock:
        return Clock(given.began, given.seconds, 1 if given.search else LOOKS, look)

    run = {"sft": run_ours, "trl": run_trl}[given.side]
    print(json.dumps(run(work, rows, held, clock).seen))


def start_child(side: str, lr: float, seconds: float, *more: str) -> list[list[float]]:
    """[seconds, steps, held-out loss] of every look."""
    command = [sys.executable, "-P", __file__, *sys.argv[1:], "--side", side, "--lr", str(lr)]
    command += ["--seconds", str(seconds), "--began", str(time.time()), *more]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    seen: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return seen


def race(given: argparse.Namespace, start: list[str]) -> dict[str, list[list[float]]]:
    """What each side saw, at the best of its learning rates."""
    before = held_out_loss(given.model, None, list(RowFile(given.heldout))[:300])
    seen = {}
    for side in SIDES:
        rates = [factor * LR[given.kind] for factor in FACTORS]
        tried = {lr: start_child(side, lr, given.minutes * 6, "--search", *start)[-1][-1] for lr in rates}
        best = min(tried, key=tried.__getitem__)
        print(json.dumps({"what": "search", "side": side, "loss": tried, "best": best}), flush=True)
        seen[side] = [[0.0, 0, before], *start_child(side, best, given.minutes * 60, *start)]
        for seconds, steps, loss in seen[side]:
            print(json.dumps({"side": side, "seconds": seconds, "steps": steps, "held_out_loss": loss}), flush=True)
    return seen


def draw(seen: dict[str, list[list[float]]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for side, points in seen.items():
        axes.plot([seconds / 60 for seconds, _, _ in points], [loss for _, _, loss in points], "o-", label=side)
    axes.set(xlabel="minutes since Enter", ylabel="held-out loss")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("heldout")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-o", "--output", required=True, type=Path)
    parser.add_argument("--kind", choices=("full", "lora"), default="full")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--batch-rows", type=int, default=8)
    for name, kind in {"side": str, "lr": float, "seconds": float, "began": float, "start": Path}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # what a child runs
    parser.add_argument("--search", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        child(given)
        return
    given.output.mkdir(parents=True, exist_ok=True)
    start: list[str] = []
    if given.kind == "lora":
        start = ["--start", str(given.output / "start")]
        save_start(options_of(given.kind, 1, given.batch_rows), given.model, given.output / "start")
    draw(race(given, start), given.output / "race.png")


if __name__ == "__main__":
    main()
