"""Ours beside TRL and PEFT: python benchmarks/finetune.py ROWS HELDOUT -m MODEL -o DIR [--kind full|lora] [--steps 20]

ROWS and HELDOUT are files of `sft mask`. Each seed orders the rows in its own way; ours trains all seeds, TRL's
SFTTrainer the first of them, on the same rows in the same order, with the same learning rate (constant), AdamW, no
decay, clipping at 1 and, for LoRA, the same matrices A at the start. The held-out loss of every result is taken by the
same code. JSON lines; needs the extra `bench`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out

from peers import TRL_TUNED, options_of, save_start, trl_trainer

from sftcli.model.adapters.peft import apply, open_adapter
from sftcli.model.checkpoint import load_trained, open_folder
from sftcli.model.scoring import total_score
from sftcli.model.training import Plan, choose_engine
from sftcli.recipe import Train
from sftcli.rowfile import RowFile
from sftcli.rows import Row
from sftcli.stages.train import train


def ours(rows: str, model: str, options: Train, output: Path) -> tuple[list[float], float]:
    """(loss of each step, seconds)."""
    outcome = train(options, rows, model, str(output))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], outcome.seconds


def theirs(rows: str, model: str, options: Train, output: Path, start: Path | None) -> tuple[list[float], float]:
    file = RowFile(rows)
    ordered = [file[i] for indices, *_ in Plan(file.lengths(), options).from_step(0) for i in indices]
    trainer = trl_trainer(model, start, ordered, options, output, **TRL_TUNED)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    trainer.save_model(str(output))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], seconds


def held_out_loss(model: str, adapter: str | None, heldout: Iterable[Row]) -> float:
    folder = open_folder(Path(model))
    network = load_trained(folder)
    if adapter:
        apply(network, open_adapter(adapter, folder))
    return total_score(network, heldout, 2048, choose_engine("cpu", "float32")).loss


def tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows")
    parser.add_argument("heldout")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-o", "--output", required=True, type=Path)
    parser.add_argument("--kind", choices=("full", "lora"), default="lora")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    kind, steps, output, heldout = given.kind, given.steps, given.output, RowFile(given.heldout)

    def final(place: Path) -> float:
        if kind == "lora":
            return held_out_loss(given.model, str(place), heldout)
        return held_out_loss(str(place), None, heldout)

    tell(what="before", held_out=held_out_loss(given.model, None, heldout))
    found, after = [], []
    for seed in range(given.seeds):
        losses, seconds = ours(
            given.rows, given.model, options_of(kind, steps, given.batch_rows, seed), output / f"sft-{seed}"
        )
        place = output / f"sft-{seed}" / ("adapter" if kind == "lora" else "model")
        found.append(losses)
        after.append(final(place))
        tell(what=f"sft seed {seed}", first=losses[:10], held_out=after[-1], seconds=round(seconds, 1))
    start, options = output / "start" if kind == "lora" else None, options_of(kind, steps, given.batch_rows, 0)
    if start:
        save_start(options, given.model, start)
    losses, seconds = theirs(given.rows, given.model, options, output / "trl", start)
    last = final(output / "trl")
    tell(what="trl seed 0", first=losses[:10], held_out=last, seconds=round(seconds, 1))
    spread = statistics.stdev(after) if len(after) > 1 else 0.0
    apart = [abs(a - b) for a, b in zip(found[0][:10], losses[:10], strict=True)]
    tell(what="apart", first_10=max(apart), held_out=abs(after[0] - last), deviation_of_seeds=spread)


if __name__ == "__main__":
    main()
