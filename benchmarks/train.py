"""A training step beside its peers: python benchmarks/train.py ROWS -m MODEL [--kind full|lora] [--steps 8] [--trl]

ROWS is a file of `sft mask`. Ours and a bare transformers loop (PEFT for LoRA, with the same A) take the same steps in
turn, in one process; figures follow only if their losses agree at every step. In between the model's own matrix
products are timed: the limit (limit.py). Peak memory is that of processes that run one side only. With --trl whole
processes run in turn, TRL's SFTTrainer as it comes and tuned among them, as the Trainer cannot be stepped.

The first step is a warm-up. JSON lines on stdout, a table on stderr. Needs the extra `bench`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out

import torch
from limit import Limit
from peers import TRL_TUNED, bare_steps, options_of, save_start, trl_trainer
from ratios import ratios

from sftcli.model import optim
from sftcli.model.adapters import adapt
from sftcli.model.batches import aligned
from sftcli.model.checkpoint import DTYPES, load_model, open_folder
from sftcli.model.gpt import GPT
from sftcli.model.memory import keep_freed_memory, peak_bytes
from sftcli.model.training import Plan, choose_engine, train_steps
from sftcli.recipe import Train
from sftcli.rowfile import RowFile
from sftcli.rows import Row
from sftcli.stages.training_job import with_base_dtype

DIGITS = 5e-4  # how far two losses may be apart, as a share
TRL: dict[str, dict[str, Any]] = {"trl": {}, "trl tuned": TRL_TUNED}


@dataclass(frozen=True)
class Work:
    """The same for every side."""

    rows: str
    model: str
    options: Train
    start: Path | None  # the adapter to start from, in PEFT's files

    @cached_property
    def file(self) -> RowFile:
        return RowFile(self.rows)

    @cached_property
    def plan(self) -> Plan:
        return Plan(self.file.lengths(), self.options)

    @cached_property
    def steps(self) -> list[list[Row]]:
        return [[self.file[i] for i in indices] for indices, *_ in self.plan.from_step(0)]

    def lengths(self, step: int) -> list[int]:
        return [len(row.input_ids) for row in self.steps[step]]

    def trained(self, step: int) -> int:
        return sum(1 for row in self.steps[step] for _ in aligned(row))


def our_model(work: Work) -> GPT:
    folder = open_folder(Path(work.model))
    network = load_model(folder, dtype=DTYPES[with_base_dtype(work.options, folder).base_dtype])
    if work.options.adapter:
        adapt(network, folder.family, work.options.adapter, work.options.seed)
    network.gradient_checkpointing = work.options.gradient_checkpointing
    return network


def our_steps(network: GPT, work: Work) -> Iterator[float]:
    """The loss of each step."""
    lr = work.options.optimizer.lr or 0.0
    optimizers, engine = optim.build(network, work.options.optimizer, lr), choose_engine("cpu", "float32")
    for report, _ in train_steps(network, optimizers, work.file.__getitem__, work.plan, work.options, engine, lr):
        yield report.loss


def timed(steps: Iterator[float]) -> tuple[float, float]:
    """(loss, seconds) of the next step."""
    begin = time.perf_counter()
    return next(steps), time.perf_counter() - begin


def trl_run(work: Work, settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(losses of the steps, seconds of all but the first)."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        rows = [row for step in work.steps for row in step]
        trainer = trl_trainer(work.model, work.start, rows, work.options, Path(folder), **settings)
        trainer.add_callback(Clock())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [end - begin for begin, end in pairwise(ends)]


def run_side(side: str, work: Work) -> dict[str, Any]:
    """All steps of one side, in this process: losses, seconds of all steps but the first, peak memory."""
    if side in TRL:
        losses, seconds = trl_run(work, TRL[side])
    else:
        if side == "sft":
            keep_freed_memory()  # as `sft train` does
        network = our_model(work) if side == "sft" else None
        steps = our_steps(network, work) if network else bare_steps(work.model, work.start, work.steps, work.options)
        found = [timed(steps) for _ in work.steps]
        losses, seconds = [loss for loss, _ in found], [spent for _, spent in found[1:]]
    return {"losses": losses, "seconds": seconds, "peak": peak_bytes(torch.device("cpu"))}


def in_child(side: str, start: Path | None, *more: str) -> dict[str, Any]:
    """run_side in a process of its own. Peaks count what a parent had in memory as it forked: ours is still small."""
    command = [sys.executable, "-P", __file__, *sys.argv[1:], "--side", side, *more]
    command += ["--start", str(start)] if start else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def agree(losses: dict[str, list[float]]) -> float:
    """How far the losses of the sides are apart, as a share. Ends the program if that is not equal work."""
    apart = max(max(step) / min(step) - 1 for step in zip(*losses.values(), strict=True))
    if apart > DIGITS:
        raise SystemExit(f"no equal work, no figures: {losses}")
    return apart


def alternated(
    sides: dict[str, Iterator[float]], steps: int, between: Callable[[int], None] = lambda number: None
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(losses, seconds of every step but the first) by side, step by step in turn; `between` comes after each."""
    losses: dict[str, list[float]] = {side: [] for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(steps):
        for side in sorted(sides, reverse=number % 2 == 1):  # nobody is always second
            loss, spent = timed(sides[side])
            losses[side].append(loss)
            seconds[side] += [spent] if number else []
        between(number)
    return losses, seconds


def in_turn(work: Work) -> tuple[dict[str, list[float]], Limit, float]:
    """(seconds of every step but the first by side, the limit, how far losses are apart), step by step in turn."""
    keep_freed_memory()  # as `sft train` does; the other side has it, too
    network = our_model(work)
    sides = {
        "sft": our_steps(network, work),
        "transformers": bare_steps(work.model, work.start, work.steps, work.options),
    }
    numbers = range(len(work.steps))
    limit = Limit(network, max(sum(work.lengths(i)) for i in numbers), max(map(work.trained, numbers)))
    losses, seconds = alternated(
        sides, len(numbers), lambda number: limit.measure(sum(work.lengths(number)), work.trained(number))
    )
    return seconds, limit, agree(losses)


def figures(work: Work, seconds: list[float], peak: int) -> dict[str, float]:
    numbers = range(1, len(work.steps))
    tokens, trained = sum(sum(work.lengths(i)) for i in numbers), sum(map(work.trained, numbers))
    return {
        "median_s": round(statistics.median(seconds), 3),
        "tokens_per_s": round(tokens / sum(seconds), 1),
        "trained_per_s": round(trained / sum(seconds), 1),
        "peak_mib": round(peak / 2**20),
    }


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Lines with the same keys in columns under their names."""
    for keys, same in groupby(lines, key=tuple):
        cells = [keys, *([str(value) for value in line.values()] for line in same)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def step_figures(work: Work, name: str) -> Iterator[dict[str, Any]]:
    """Ours beside the bare loop, step by step in turn."""
    peaks = {side: in_child(side, work.start, "--steps", "2")["peak"] for side in ("sft", "transformers")}
    seconds, limit, apart = in_turn(work)
    numbers = range(1, len(work.steps))
    least = [limit.seconds(work.lengths(i), work.trained(i)) for i in numbers]
    flop = [limit.work.of(work.lengths(i), work.trained(i)) for i in numbers]
    for side, spent in seconds.items():
        share = statistics.median(a / b for a, b in zip(least, spent, strict=True))
        yield {"side": side, "kind": name, **figures(work, spent, peaks[side]), "share_of_limit": round(share, 3)}
    yield {
        "what": "transformers / sft",
        "kind": name,
        **ratios(seconds["sft"], seconds["transformers"]),
        "limit_gflop_per_s": round(sum(flop) / sum(least) / 1e9, 1),
        "losses_apart": float(f"{apart:.1e}"),
        "load": round(os.getloadavg()[0], 2),
    }


def run_figures(work: Work, name: str, runs: int) -> Iterator[dict[str, Any]]:
    """Ours beside TRL, run by run in turn."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in ("sft", *TRL)}
    for _ in range(runs):
        for side, results in found.items():
            results.append(in_child(side, work.start))
    apart = agree({side: results[0]["losses"] for side, results in found.items()})
    for side, results in found.items():
        spent = [statistics.median(steps) for steps in zip(*(run["seconds"] for run in results), strict=True)]
        yield {"side": side, "kind": name, **figures(work, spent, max(run["peak"] for run in results))}
    totals = {side: [sum(run["seconds"]) for run in results] for side, results in found.items()}
    for side in TRL:
        ratio = ratios(totals["sft"], totals[side])
        yield {"what": f"{side} / sft", "kind": name, **ratio, "losses_apart": float(f"{apart:.1e}")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--kind", choices=("full", "lora"), default="full")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", dest="batch_rows", type=int, default=8, help="of a step")
    parser.add_argument("--trl", action="store_true", help="beside TRL, in whole processes")
    parser.add_argument("--runs", type=int, default=3, help="processes of each side, with --trl")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # what a child runs
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    options = options_of(given.kind, given.steps, given.batch_rows)
    if given.side:
        print(json.dumps(run_side(given.side, Work(given.rows, given.model, options, given.start))))
        return
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) if given.kind == "lora" else None
        if start:
            save_start(options, given.model, start)
        work = Work(given.rows, given.model, options, start)
        lines = []
        for line in run_figures(work, given.kind, given.runs) if given.trl else step_figures(work, given.kind):
            print(json.dumps(line), flush=True)
            lines.append(line)
    print(*table(lines), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
