"""Ours beside TRL and PEFT: python benchmarks/finetune.py ROWS HELDOUT -m MODEL -o DIR [--kind full|lora] [--steps 20]

ROWS and HELDOUT are files of `sft mask`. Each seed orders the rows in its own way; ours trains all seeds, TRL's
SFTTrainer the first of them, on the same rows in the same order, with the same learning rate (constant), AdamW, no
decay, clipping at 1 and, for LoRA, the same matrices A at the start. The held-out loss of every result is taken by the
same code. JSON lines; needs trl and datasets beside the extra `test`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sftcli.model.adapters.lora import adapt
from sftcli.model.adapters.peft import apply, open_adapter, save_adapter
from sftcli.model.batches import shuffled
from sftcli.model.checkpoint import load_model, load_trained, open_folder
from sftcli.model.scoring import total_score
from sftcli.model.training import choose_engine
from sftcli.recipe import AdamW, Lora, Schedule, Train
from sftcli.rowfile import RowFile
from sftcli.stages.train import train

LR = {"full": 2e-5, "lora": 2e-4}


def options_of(kind: str, steps: int, rows: int, seed: int) -> Train:
    return Train(
        optimizer=AdamW(lr=LR[kind], betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(kind="constant", warmup=0.0),
        adapter=Lora(rank=16, alpha=32) if kind == "lora" else None,
        max_steps=steps,
        batch_rows=rows,
        micro_batch_tokens=2048,
        seed=seed,
        sample_rows=0,
        dtype="float32",
    )


def ours(rows: str, model: str, options: Train, output: Path) -> tuple[list[float], float]:
    """(loss of each step, seconds)."""
    outcome = train(options, rows, model, str(output))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], outcome.seconds


def save_start(options: Train, model: str, output: Path) -> None:
    """The adapter that ours starts from, in PEFT's files."""
    assert options.adapter
    folder = open_folder(Path(model))
    network = load_model(folder)
    adapt(network, folder.family, options.adapter, options.seed)
    save_adapter(network, folder, output, options.adapter, model, {})


def theirs(rows: str, model: str, options: Train, output: Path, start: Path) -> tuple[list[float], float]:
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    file = RowFile(rows)
    ordered = [file[i] for i in shuffled(len(file), options.seed, 0)[: options.max_steps * options.batch_rows]]
    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in ordered])
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if options.adapter:
        network = PeftModel.from_pretrained(network, start, is_trainable=True)
    config = SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=options.batch_rows,
        max_steps=options.max_steps,
        learning_rate=options.optimizer.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        adam_beta2=0.999,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=options.seed,
    )
    trainer = InOrder(
        model=network,
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    trainer.save_model(str(output))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], seconds


def held_out_loss(model: str, adapter: str | None, heldout: str) -> float:
    folder = open_folder(Path(model))
    network = load_trained(folder)
    if adapter:
        apply(network, open_adapter(adapter, folder))
    file = RowFile(heldout)
    engine = choose_engine("cpu", "float32")
    return total_score(network, (file[i] for i in range(len(file))), 2048, engine).loss


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
    kind, steps, output = given.kind, given.steps, given.output

    def final(place: Path) -> float:
        if kind == "lora":
            return held_out_loss(given.model, str(place), given.heldout)
        return held_out_loss(str(place), None, given.heldout)

    tell(what="before", held_out=held_out_loss(given.model, None, given.heldout))
    found, after = [], []
    for seed in range(given.seeds):
        losses, seconds = ours(
            given.rows, given.model, options_of(kind, steps, given.batch_rows, seed), output / f"sft-{seed}"
        )
        place = output / f"sft-{seed}" / ("adapter" if kind == "lora" else "model")
        found.append(losses)
        after.append(final(place))
        tell(what=f"sft seed {seed}", first=losses[:10], held_out=after[-1], seconds=round(seconds, 1))
    start, options = output / "start", options_of(kind, steps, given.batch_rows, 0)
    if kind == "lora":
        save_start(options, given.model, start)
    losses, seconds = theirs(given.rows, given.model, options, output / "trl", start)
    last = final(output / "trl")
    tell(what="trl seed 0", first=losses[:10], held_out=last, seconds=round(seconds, 1))
    spread = statistics.stdev(after) if len(after) > 1 else 0.0
    apart = [abs(a - b) for a, b in zip(found[0][:10], losses[:10], strict=True)]
    tell(what="apart", first_10=max(apart), held_out=abs(after[0] - last), deviation_of_seeds=spread)


if __name__ == "__main__":
    main()
