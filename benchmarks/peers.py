"""The other sides of the benchmarks, at equal work: transformers (and PEFT) in a bare loop, and TRL's SFTTrainer."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from sftcli.model.adapters.lora import adapt
from sftcli.model.adapters.peft import save_adapter
from sftcli.model.checkpoint import load_model, open_folder
from sftcli.recipe import AdamW, Lora, Schedule, Train
from sftcli.rows import IGNORE, Row

LR = {"full": 2e-5, "lora": 2e-4}
TRL_TUNED: dict[str, Any] = {"gradient_checkpointing": False}  # what makes it fastest on a CPU; the default is True


def options_of(kind: str, steps: int, rows: int, seed: int = 0, lr: float | None = None) -> Train:
    """Options of ours that a peer can have, too."""
    return Train(
        optimizer=AdamW(lr=lr or LR[kind], betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(kind="constant", warmup=0.0),
        adapter=Lora(rank=16, alpha=32) if kind == "lora" else None,
        max_steps=steps,
        batch_rows=rows,
        seed=seed,
        sample_rows=0,
        dtype="float32",
    )


def save_start(options: Train, model: str, output: Path) -> None:
    """The adapter that ours starts from, in PEFT's files."""
    assert isinstance(options.adapter, Lora)
    folder = open_folder(Path(model))
    network = load_model(folder)
    adapt(network, folder.family, options.adapter, options.seed)
    save_adapter(network, folder, output, options.adapter, model, {})


def load(model: str, start: Path | None) -> Any:
    """transformers' model, under PEFT's adapter where it starts from one."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if start is None:
        return network
    from peft import PeftModel

    return PeftModel.from_pretrained(network, start, is_trainable=True)


def bare_steps(model: str, start: Path | None, steps: Sequence[list[Row]], options: Train) -> Iterator[float]:
    """The loop that one would write: yields the loss of each step. AdamW is fused, as the Trainer's is."""
    network = load(model, start)
    trained = [p for p in network.parameters() if p.requires_grad]
    adamw = options.optimizer
    optimizer = torch.optim.AdamW(
        trained, lr=adamw.lr or 0.0, betas=adamw.betas, eps=adamw.eps, weight_decay=0.0, fused=True
    )
    network.train()
    for rows in steps:
        batch = padded(rows)
        count = (batch["labels"][:, 1:] != IGNORE).sum()
        loss = network(**batch, use_cache=False, num_items_in_batch=count).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def padded(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """(rows, longest) each, padded on the right."""
    ids, labels = ([torch.tensor(getattr(row, name)) for row in rows] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def trl_trainer(
    model: str, start: Path | None, rows: Sequence[Row], options: Train, output: Path, **settings: Any
) -> Any:
    """TRL's SFTTrainer over `rows` in their order; `settings` are SFTConfig's."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        **{
            "output_dir": str(output),
            "per_device_train_batch_size": options.batch_rows,
            "max_steps": options.max_steps,
            "learning_rate": options.optimizer.lr,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": options.clip_norm,
            "adam_beta2": options.optimizer.betas[1],
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "max_length": None,
            "bf16": False,
            "use_cpu": True,
            "seed": options.seed,
        }
        | settings
    )
    return SFTTrainer(
        model=load(model, start),
        args=config,
        train_dataset=Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
