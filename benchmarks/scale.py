"""How cost grows: python benchmarks/scale.py [DATA] [--runs 3]

CPU time of the data stages with the rows (whole processes, beyond one row; and peak memory), and of a training step on
random weights with the length of a row, the rows of a step, the layers and the width. Each point is the best of its
runs, which are taken in turn. One JSON line each: the points, and the exponent that fits them (1: linear).
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SFT = [sys.executable, "-m", "sftcli", "-q"]
ROWS = (500, 5_000, 50_000)
OFTEN = 4  # as many runs of those that end soon: starting up costs more than they do
STEPS: dict[str, tuple[int, ...]] = {
    "length": (64, 128, 256, 512, 1024, 2048),
    "batch": (1, 2, 4, 8, 16),
    "layers": (1, 2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
}
DEFAULTS = {"length": 128, "batch": 4, "layers": 4, "width": 256}


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """The slope of the straight line through (log x, log y)."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def tell(what: str, over: str, points: list[tuple[int, float]], **more: Any) -> None:
    shown = [[x, round(y, 4)] for x, y in points]
    print(json.dumps({"what": what, "over": over, "seconds": shown, "exponent": round(exponent(points), 3), **more}))


def process(command: list[str]) -> tuple[float, int]:
    """(CPU seconds, peak bytes) of a whole process."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise SystemExit(f"{command} ended with {running.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def data_stages(data: Path, folder: Path, runs: int) -> None:
    """Costs of tokenize and of mask over rows of `data`, which is repeated where it is too short."""
    base, lines = folder / "base", data.read_bytes().splitlines(keepends=True)
    process([*SFT, "init", str(data), "-o", str(base)])
    costs: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for run, count in itertools.product(range(OFTEN * runs), (1, *ROWS)):
        raw, tokens = folder / f"{count}.jsonl", folder / f"{count}.tokens.jsonl"
        if not run:
            raw.write_bytes(b"".join(itertools.islice(itertools.cycle(lines), count)))
        if run >= runs and count == max(ROWS):
            continue
        made = process([*SFT, "tokenize", str(raw), "-m", str(base), "-o", str(tokens)])
        costs.setdefault(("tokenize", count), []).append(made)
        costs.setdefault(("mask", count), []).append(process([*SFT, "mask", str(tokens)]))
    for stage in ("tokenize", "mask"):
        best = {count: min(seconds for seconds, _ in costs[stage, count]) for count in (1, *ROWS)}
        peaks = {count: max(peak for _, peak in costs[stage, count]) for count in ROWS}
        points = [(count, best[count] - best[1]) for count in ROWS]
        tell(stage, "rows", points, peak_mib=[[count, round(peak / 2**20)] for count, peak in peaks.items()])


def step_of(length: int, batch: int, layers: int, width: int) -> tuple[Callable[[], None], int]:
    """An optimizer step of a new model, which has taken one as a warm-up, and how many parameters it has."""
    import torch  # late: what a parent has in memory counts in the peak of its children, too

    from sftcli.model import optim
    from sftcli.model.families import family_of
    from sftcli.model.gpt import GPT
    from sftcli.model.training import accumulate, choose_engine, clip
    from sftcli.recipe import AdamW
    from sftcli.rows import FORMAT, Row

    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "vocab_size": 1024,
    }
    model = GPT(family_of(config).read_config(config))
    model.initialise(0)
    optimizers, engine = optim.build(model, AdamW(), 1e-5), choose_engine("cpu", "float32")
    ids = torch.randint(1024, (batch, length), generator=torch.Generator().manual_seed(0)).tolist()
    same: dict[str, Any] = {
        "align": "next",
        "objective": "causal",
        "tokenizer": None,
        "template": None,
        "format": FORMAT,
    }
    rows = [Row(id=str(i), input_ids=row, labels=row, **same) for i, row in enumerate(ids)]

    def step() -> None:
        accumulate(model, rows, batch * length, engine)
        clip(model, 1.0)
        optim.step(optimizers)
        model.zero_grad(set_to_none=True)

    step()
    return step, sum(p.numel() for p in model.parameters())


def training(runs: int) -> None:
    """CPU time of steps; that of a model's size is told over its parameters."""
    import torch

    torch.set_num_threads(1)  # a thread that waits for the other counts as busy
    for name, values in STEPS.items():
        made = {value: step_of(**DEFAULTS | {name: value}) for value in values}
        best = dict.fromkeys(values, math.inf)
        for _, value in itertools.product(range(runs), values):
            begin = time.process_time()
            made[value][0]()
            best[value] = min(best[value], time.process_time() - begin)
        sized = name in ("layers", "width")
        points = [(made[value][1] if sized else value, seconds) for value, seconds in best.items()]
        of_last_two = round(exponent(points[-2:]), 3)
        tell("step", f"parameters by {name}" if sized else name, points, of_last_two=of_last_two)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    samples = Path(__file__).parent.parent / "data" / "samples" / "train.jsonl"
    parser.add_argument("data", nargs="?", type=Path, default=samples)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data_stages(given.data, Path(folder), given.runs)
    training(given.runs)


if __name__ == "__main__":
    main()
