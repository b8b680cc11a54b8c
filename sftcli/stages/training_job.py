"""A training run as it stands: what it works with."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from sftcli import artifacts, console
from sftcli.artifacts import file_fingerprint
from sftcli.errors import DataError, UsageError
from sftcli.lines import name_of
from sftcli.model import optim
from sftcli.model.adapters import adapt, peft
from sftcli.model.adapters.lora import measure
from sftcli.model.adapters.prefix import shortened
from sftcli.model.batches import weight_of
from sftcli.model.checkpoint import (
    DTYPES,
    ModelFolder,
    add_block_positions,
    add_masked_lm,
    empty_model,
    fill_model,
    load_model,
)
from sftcli.model.dataset import column, fitting_rows, split, trained_stops
from sftcli.model.gpt import GPT
from sftcli.model.memory import forward_tokens
from sftcli.model.mixture import Input, input_of, parts_of
from sftcli.model.processes import World, whole
from sftcli.model.training import Engine, Plan, Report, choose_engine
from sftcli.recipe import Lora, Prefix, Prompt, Train
from sftcli.rowfile import NONE, RowFile, is_row_file, write_rows
from sftcli.rows import Row, read_rows_jsonl
from sftcli.text.tokenizer import Codec

LOOKED_AT = 256  # rows that are searched for control tokens, and of the embedding for what is usual
# a step is computed: not which step it is
HOW = ("device", "dtype", "base_dtype", "parallel", "deterministic", "micro_batch_tokens", "gradient_checkpointing")
BLANK = 0.05  # of the usual distance from the mean embedding
ARRIVING = f".tmp-{artifacts.ROWS}"  # rows that are collected, until it is clear that they are this run's
FREE_TO_CHANGE = {
    "save_dtype",
    "shard_size",
    "keep",
    "allow_data_change",
    "checkpoint_every",
    "nonfinite_skips",
    "nproc",
    "optimizer_offload",
    "process_timeout",
}  # options that no step depends on


@dataclass
class Outcome:
    """How a run ended."""

    steps: int = 0
    skipped: int = 0  # steps of this process that had no weight
    loss: float | None = None  # None: there was no step left to take
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    flop: int = 0
    model: str = ""
    sha256: str = ""

    def add(self, report: Report) -> None:
        self.steps = report.step
        self.tokens += report.tokens
        self.flop += report.flop
        if not report.finite:
            return
        if math.isnan(report.loss):
            self.skipped += 1
        else:
            self.loss = report.loss


@dataclass
class Job:
    """Everything one training run works with."""

    options: Train
    folder: ModelFolder
    run: Path
    rows: RowFile
    train_rows: list[int]
    eval_rows: Sequence[Row]
    model: GPT
    optimizers: list[Optimizer]
    engine: Engine
    plan: Plan
    lr: float
    codec: Codec
    stops: list[int]
    settings: dict[str, Any]
    id: str = ""  # of the run: its checkpoints carry it
    best: tuple[float, int] | None = None  # eval loss, step
    since_best: int = 0
    pending: tuple[Report, bool] | None = None  # a step (and whether it ends an epoch) that was taken, not yet told of
    outcome: Outcome = field(default_factory=Outcome)

    def row(self, number: int) -> Row:
        """Of the rows that are trained."""
        return self.rows[self.train_rows[number]]


@contextmanager
def open_rows(
    source: str | Sequence[str], run: Path, world: World
) -> Iterator[tuple[RowFile, str, list[tuple[Input, int]]]]:
    """(the rows as a random-access file, where they are from, the number of rows of every input).

    JSON lines (a pipe, say) and several inputs are first collected in the run folder, one behind the other; they
    replace what was collected there before only when `begin` has nothing against it."""
    inputs = [input_of(text) for text in ([source] if isinstance(source, str) else source)]
    if len(inputs) == 1 and is_row_file(inputs[0].path):
        file = RowFile(inputs[0].path)
        yield file, inputs[0].path, [(inputs[0], len(file))]
        return
    try:
        counts = world.from_first(lambda: _collect(inputs, run))
        where = ", ".join(name_of(item.path) for item in inputs)
        yield RowFile(run / ARRIVING), where, list(zip(inputs, counts, strict=True))
    finally:
        if world.first:
            (run / ARRIVING).unlink(missing_ok=True)


def _collect(inputs: list[Input], run: Path) -> list[int]:
    """Write the rows of all inputs into one file; returns how many each of them has."""
    for item in inputs:
        console.tell_of_waiting(item.path)
    counts = [0] * len(inputs)
    tokenizers: set[str | None] = set()
    templates: set[str | None] = set()

    def arriving() -> Iterator[Row]:
        for i, item in enumerate(inputs):
            if Path(item.path).resolve() == (run / artifacts.ROWS).resolve():
                raise UsageError(f"{item.path} is where the rows of this run are collected", hint="another -o")
            for where, row in _rows_of(item.path):
                tokenizers.add(row.tokenizer)
                if len(tokenizers) > 1:
                    raise DataError("rows of two tokenizers", where, "$.tokenizer")
                templates.add(row.template)
                counts[i] += 1
                yield row

    total = write_rows(run / ARRIVING, arriving())
    console.note(f"train: received {total:,} rows")
    if len(templates - {None}) > 1:
        found = ", ".join(sorted(filter(None, templates)))
        console.warn(f"train: rows of several templates ({found}): the model folder gets that of the first row")
    return counts


def _rows_of(path: str) -> Iterator[tuple[str, Row]]:
    if is_row_file(path):
        return ((path, row) for row in RowFile(path))
    return ((where, row) for where, row, _ in read_rows_jsonl(path))


def make_job(
    options: Train,
    folder: ModelFolder,
    run: Path,
    rows: RowFile,
    where: str,
    codec: Codec,
    inputs: Sequence[tuple[Input, int]] = (),
    world: World | None = None,
) -> Job:
    """`inputs`: what the rows were collected from, where they do not all count once."""
    inputs = inputs or [(Input(where), len(rows))]
    _add_tables(options, folder, rows, where)
    train_rows, held_out = split(len(rows), options.eval_share, options.seed)
    eval_rows = _eval_rows(options, [rows[i] for i in held_out], folder, codec)
    options, engine = with_base_dtype(options, folder), _engine(options, world or World())
    spread = engine.world.spreads(options.parallel)
    model, fill = _model(options, folder, "next_sentence_label" in rows.columns, spread)
    engine.world.place(model, engine.device, options.parallel, fill)
    model.gradient_checkpointing = options.gradient_checkpointing
    lengths = rows.lengths()
    parts = parts_of(rows, train_rows, inputs, options.mix)
    plan = Plan([lengths[i] for i in train_rows], options, parts)
    lr = options.optimizer.lr or _default_lr(options, folder)
    offload = options.optimizer_offload and engine.device.type != "cpu"  # of a CPU, state is in main memory already
    return Job(
        options=options,
        folder=folder,
        run=run,
        rows=rows,
        train_rows=train_rows,
        eval_rows=eval_rows,
        model=model,
        optimizers=optim.build(model, options.optimizer, lr, _lora_plus(options), offload),
        engine=engine,
        plan=plan,
        lr=lr,
        codec=codec,
        stops=trained_stops(rows, codec.special_ids),
        settings={
            "options": options.model_dump(mode="json", exclude={*HOW, *FREE_TO_CHANGE, "eval_data"}),
            "rows": file_fingerprint(rows.path),
            "weights": [[item.share, item.rows, count] for item, count in inputs] if parts else None,
            "eval_data": _file_identity(options.eval_data),
            "model": peft.identity(folder),
            "threads": torch.get_num_threads(),
            "device": str(engine.device),
            "dtype": str(engine.dtype),
            "base_dtype": None if DTYPES[options.base_dtype] in (torch.float32, folder.narrow) else options.base_dtype,
            "processes": engine.world.size,
            "parallel": options.parallel,
            "deterministic": options.deterministic,
            "micro_batch_tokens": forward_tokens(options, engine.device.type),
            "gradient_checkpointing": options.gradient_checkpointing,
            "torch": str(torch.__version__),
        },
    )


def _add_tables(options: Train, folder: ModelFolder, rows: RowFile, where: str) -> None:
    """What the rows need beyond the family's model: it cannot be an adapter's, which leaves the base as it is."""
    before = folder.config
    if "block_position_ids" in rows.columns:
        add_block_positions(folder)
    if "token_type_ids" in rows.columns:
        pairs = "next_sentence_label" in rows.columns
        if pairs and bool((column(rows, "next_sentence_label") == NONE).any()):
            raise UsageError(f"{where}: rows with and without next-sentence labels", hint="train one kind at a time")
        add_masked_lm(folder, pairs)
    if options.adapter and folder.config != before:
        blank = folder.config.block_positions != before.block_positions
        lacking = "a table of block positions" if blank else "what masked LM adds to a model"
        hint = "train it without adapter first"
        raise UsageError(f"{where}: these rows need {lacking}, which the base lacks", hint=hint)


def with_base_dtype(options: Train, folder: ModelFolder) -> Train:
    """The options with what `base_dtype: auto` is for this base: only what keeps all its numbers."""
    if options.base_dtype != "auto":
        return options
    kept = folder.narrow if options.adapter else None
    return options.model_copy(update={"base_dtype": "float32" if kept is None else str(kept).removeprefix("torch.")})


def _engine(options: Train, world: World) -> Engine:
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when a GPU is first used
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True)
    return replace(choose_engine(world.device(options.device), options.dtype), world=world)


def _model(options: Train, folder: ModelFolder, pairs: bool, spread: bool) -> tuple[GPT, Callable[[], None] | None]:
    """The model to train: all of it, or frozen but for an adapter; a head for `pairs` only where there are some.

    One that is `spread` has no values yet: the second result reads them, once each process knows its share."""
    if options.adapter and not folder.has_weights:
        raise UsageError(f"{folder.path} has no weights: an adapter needs a trained base", hint="train without adapter")
    later, dtype = spread and folder.has_weights, DTYPES[options.base_dtype]
    model = empty_model(folder.config, dtype, "meta") if later else load_model(folder, options.seed, dtype)
    if options.adapter:
        adapt(model, folder.family, options.adapter, options.seed)
    for head in (model.pooler, model.nsp):
        if head is not None and not pairs:
            head.requires_grad_(False)

    def fill() -> None:
        fill_model(model, folder, options.seed)
        measure(model)

    return model, fill if later else None


def _lora_plus(options: Train) -> float | None:
    return options.adapter.lora_plus if isinstance(options.adapter, Lora) else None


def _default_lr(options: Train, folder: ModelFolder) -> float:
    if options.adapter:
        alone = isinstance(options.adapter, Prompt) or (isinstance(options.adapter, Prefix) and not options.adapter.mlp)
        return optim.LR_TABLE if alone else optim.LR_ADAPTER
    return optim.LR_PRETRAINED if folder.has_weights else optim.LR_FROM_NOTHING


def _eval_rows(options: Train, held_out: list[Row], folder: ModelFolder, codec: Codec) -> list[Row]:
    """Held-out rows of the training data, then those of --eval-data; refused where they could not tell anything."""
    found = held_out
    if options.eval_data:
        config = shortened(folder.config, options.adapter)
        found = held_out + list(fitting_rows(options.eval_data, config, codec.hash))
    if (found or options.eval_data) and not any(weight_of([row]) for row in found):
        raise DataError("no token of the held-out rows is trained", options.eval_data, hint="hold out other rows")
    if options.patience and not found:
        raise UsageError("patience needs held-out rows", hint="--eval-share 0.1, or --eval-data ROWS")
    return found


def _file_identity(path: str | None) -> str | None:
    """A fingerprint of a file; None for a pipe, which can be read only once."""
    return file_fingerprint(path) if path and os.path.isfile(path) else None


def blank_controls(job: Job) -> list[int]:
    """Control tokens of the rows whose frozen embedding says nothing: as good as the mean of all, as new ones begin."""
    if job.model.embedding.weight.requires_grad:
        return []
    weight = whole(job.model.embedding.weight.detach())
    seen = {i for number in job.train_rows[:LOOKED_AT] for i in job.rows[number].input_ids}
    controls = sorted(i for i in seen & job.codec.special_ids if i < len(weight))
    mean = weight.mean(0, dtype=torch.float32)
    usual = (weight[:LOOKED_AT] - mean).norm(dim=1).median()
    return [i for i in controls if float((weight[i].float() - mean).norm()) < BLANK * float(usual)]


def compare(job: Job, loss: float, step: int) -> None:
    """Remember the best eval loss, and for how many evaluations there was no better one."""
    if math.isfinite(loss) and (job.best is None or loss < job.best[0]):
        job.best, job.since_best = (loss, step), 0
    else:
        job.since_best += 1


def has_enough(job: Job) -> bool:
    """Early stopping: whether `patience` evaluations have passed without a better loss."""
    return job.options.patience is not None and job.since_best >= job.options.patience


def best_step(job: Job) -> int | None:
    """The step whose checkpoint is kept for the end of a run with patience."""
    return job.best[1] if job.best and job.options.patience else None
