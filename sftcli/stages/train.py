"""sft train: rows -> a model folder, with everything a run leaves behind."""

import math
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.optim import Optimizer

import sftcli
from sftcli import artifacts, console
from sftcli.artifacts import METRICS, MODEL, RUN, SAMPLES, file_fingerprint, json_line
from sftcli.errors import DataError, SftError, UsageError
from sftcli.model import optim, resume
from sftcli.model.batches import weight_of
from sftcli.model.checkpoint import WEIGHTS, ModelFolder, load_model, open_folder, save_model
from sftcli.model.dataset import check_rows, check_tokenizer, fitting_rows, split, trained_stops
from sftcli.model.decoding import Prompt, generate, in_order
from sftcli.model.gpt import GPT
from sftcli.model.scoring import Totals, total_score
from sftcli.model.training import Engine, Plan, Report, choose_engine, train_steps
from sftcli.recipe import Generate, Train
from sftcli.rowfile import RowFile, is_row_file, write_rows
from sftcli.rows import IGNORE, Row, read_rows_jsonl
from sftcli.text.template import Template
from sftcli.text.tokenizer import Codec, folder_template, load_codec, recall, stop_ids

NAMES = {artifacts.ROWS, artifacts.TOKENS, METRICS, MODEL, RUN, artifacts.CHECKPOINTS, artifacts.BASE, artifacts.RECIPE}
STALE_AFTER = (METRICS, SAMPLES, MODEL, artifacts.CHECKPOINTS)  # what a new training run replaces


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
    model: str = ""
    sha256: str = ""

    def add(self, report: Report) -> None:
        self.steps = report.step
        self.tokens += report.tokens
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
    best: tuple[float, int] | None = None  # eval loss, step
    since_best: int = 0
    outcome: Outcome = field(default_factory=Outcome)


def train(options: Train, source: str, model: str, output: str, resumed: bool = False) -> Outcome:
    """Run the stage. Raises SftError; an interrupted run has saved a checkpoint of its last whole step."""
    folder = open_folder(artifacts.model_folder(model))
    codec = load_codec(folder.path)
    run = artifacts.make_folder(output, NAMES)
    _refuse(run, folder, resumed)
    rows, where = _open_rows(source, run)
    check_rows(rows, folder.config, where)
    check_tokenizer(rows[0].tokenizer, codec.hash, where)
    job = _job(options, folder, run, rows, where, codec)
    resume.remove_leftovers(run)
    start = job.outcome.steps = _resume(job) if resumed else _start_over(job)
    _announce(job, where, start)
    if not _enough(job):  # else early stopping had ended the run that is resumed
        with _stop_signals() as stopped:
            _loop(job, start, stopped)
    return _finish(job)


def _refuse(run: Path, folder: ModelFolder, resumed: bool) -> None:
    """Refuse output folders whose content would be lost."""
    if folder.path.resolve() == (run / MODEL).resolve():
        raise UsageError(f"{run} holds the model to start from, which its new one would replace", hint="another -o")
    if not resumed and resume.checkpoints(run) and not (run / MODEL).is_dir():
        raise UsageError(
            f"{run} holds an unfinished training run", hint="--resume goes on with it; remove it to start over"
        )


def _open_rows(source: str, run: Path) -> tuple[RowFile, str]:
    """The rows as a random-access file: JSON lines (a pipe, say) are first collected into the run folder."""
    if is_row_file(source):
        return RowFile(source), source
    collected = run / artifacts.ROWS
    tokenizers: set[str | None] = set()

    def arriving() -> Iterator[Row]:
        for where, row, _ in read_rows_jsonl(source):
            tokenizers.add(row.tokenizer)
            if len(tokenizers) > 1:
                raise DataError("rows of two tokenizers", where, "$.tokenizer")
            yield row

    count = write_rows(collected, arriving())
    console.note(f"train: received {count:,} rows")
    return RowFile(collected), artifacts.name_of(source)


def _job(options: Train, folder: ModelFolder, run: Path, rows: RowFile, where: str, codec: Codec) -> Job:
    train_rows, held_out = split(len(rows), options.eval_share, options.seed)
    eval_rows = _eval_rows(options, [rows[i] for i in held_out], folder, codec)
    engine = choose_engine(options.device, options.dtype)
    model = load_model(folder, options.seed).to(engine.device)
    model.gradient_checkpointing = options.gradient_checkpointing
    lengths = rows.lengths()
    plan = Plan([lengths[i] for i in train_rows], options)
    lr = options.optimizer.lr or (optim.LR_PRETRAINED if folder.has_weights else optim.LR_FROM_NOTHING)
    return Job(
        options=options,
        folder=folder,
        run=run,
        rows=rows,
        train_rows=train_rows,
        eval_rows=eval_rows,
        model=model,
        optimizers=optim.build(model, options.optimizer, lr),
        engine=engine,
        plan=plan,
        lr=lr,
        codec=codec,
        stops=trained_stops(rows, codec.special_ids),
        settings={
            "options": options.model_dump(mode="json"),
            "rows": file_fingerprint(rows.path),
            "eval_data": _file_identity(options.eval_data),
            "model": _model_fingerprint(folder),
            "threads": torch.get_num_threads(),
            "device": str(engine.device),
            "dtype": str(engine.dtype),
        },
    )


def _eval_rows(options: Train, held_out: list[Row], folder: ModelFolder, codec: Codec) -> list[Row]:
    """Held-out rows of the training data, then those of --eval-data; refused where they could not tell anything."""
    found = held_out
    if options.eval_data:
        found = held_out + list(fitting_rows(options.eval_data, folder.config, codec.hash))
    if (found or options.eval_data) and not any(weight_of([row]) for row in found):
        raise DataError("no token of the held-out rows is trained", options.eval_data, hint="hold out other rows")
    if options.patience and not found:
        raise UsageError("patience needs held-out rows", hint="--eval-share 0.1, or --eval-data ROWS")
    return found


def _file_identity(path: str | None) -> str | None:
    """A fingerprint of a file; None for a pipe, which can be read only once."""
    return file_fingerprint(path) if path and os.path.isfile(path) else None


def _model_fingerprint(folder: ModelFolder) -> str:
    return artifacts.fingerprint(*(file_fingerprint(path) for path in (folder.path / "config.json", *folder.files)))


def _start_over(job: Job) -> int:
    for name in STALE_AFTER:
        path = job.run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    facts = {
        "sftcli": sftcli.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    artifacts.update_json(job.run / RUN, facts | job.settings)
    return 0


def _resume(job: Job) -> int:
    """Go on from the newest checkpoint: same data and settings, metrics cut back to its step."""
    found = resume.checkpoints(job.run)
    if not found:
        console.note("train: no checkpoint to resume from, starting at step 0")
        return _start_over(job)
    facts = resume.load(found[-1], job.model, job.optimizers)
    for name, now in job.settings.items():
        before = facts["settings"].get(name)
        if before == now:
            continue
        if name in ("threads", "device", "dtype"):
            console.warn(f"train: {name} was {before}, is {now}: the run goes on, but not bit for bit")
        else:
            raise UsageError(f"cannot resume {job.run}: the {name} changed", hint="start a new run with another -o")
    step = int(facts["step"])
    job.best = tuple(facts["best"]) if facts.get("best") else None
    job.since_best = int(facts.get("since_best", 0))
    for name in (METRICS, SAMPLES):
        _cut_back(job.run / name, step)
    console.note(f"train: resuming after step {step}")
    return step


def _cut_back(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`, so that no step appears twice."""
    if path.is_file():
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if msgspec.json.decode(line)["step"] <= step:
                    kept.append(line)
            except (msgspec.DecodeError, KeyError, TypeError):
                break  # a torn last line
        with artifacts.atomic_file(path) as file:
            file.writelines(kept)


def _announce(job: Job, where: str, start: int) -> None:
    options, count = job.options, sum(p.numel() for p in job.model.parameters())
    per_step = f"{options.batch_rows} rows" if options.batch_rows else f"{options.batch_tokens:,} tokens"
    held = f", {len(job.eval_rows):,} held out" if job.eval_rows else ""
    console.note(
        f"train: {len(job.train_rows):,} rows from {where}{held}; {count:,} parameters"
        f"{'' if job.folder.has_weights else f' drawn from seed {options.seed}'}, {job.engine.device} "
        f"{str(job.engine.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    )
    console.note(
        f"train: {job.plan.steps - start:,} steps of {per_step}; {options.optimizer.kind}, lr {job.lr:g} "
        f"({options.schedule.kind})"
    )
    names = ", ".join(f"{job.codec.token_text(i)} ({i})" for i in job.stops)
    console.note(f"train: stop set: {names}") if names else console.warn("train: no stop token is trained")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM set a flag that the loop reads after each step; a second one ends the process at once."""
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs keep theirs
            before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _loop(job: Job, start: int, stopped: list[int]) -> None:
    """Train, and around every step: log, evaluate, answer samples, save."""
    options, outcome = job.options, job.outcome
    every = options.eval_every or max(1, job.plan.steps // 10)
    begin = time.monotonic()
    reports = train_steps(
        job.model,
        job.optimizers,
        lambda i: job.rows[job.train_rows[i]],
        job.plan,
        options,
        job.engine,
        job.lr,
        start,
    )
    with open(job.run / METRICS, "ab") as metrics, console.live() as line:
        for report, epoch_ends in reports:
            outcome.add(report)
            step = report.step
            last = step == job.plan.steps
            evaluation = None
            if job.eval_rows and (step % every == 0 or last):
                evaluation = total_score(job.model, job.eval_rows, options.micro_batch_tokens, job.engine)
                outcome.eval_loss, outcome.eval_accuracy = evaluation.loss, evaluation.accuracy
            metrics.write(json_line(_metrics(report, evaluation)))
            metrics.flush()
            if _samples_due(options, step, evaluation, last):
                _answer_samples(job, step)
            line.show(_progress(job, report, begin, start), step / job.plan.steps)
            if evaluation:
                _compare(job, evaluation.loss, step)
            enough = _enough(job)
            at_checkpoint = step % options.checkpoint_every == 0 if options.checkpoint_every else epoch_ends
            if at_checkpoint or last or stopped or enough or (job.best and job.best[1] == step and options.patience):
                _checkpoint(job, step)
            if enough:
                console.note(f"train: step {step}: no better eval loss in {options.patience} evaluations, stopping")
                break
            if stopped and not last:
                raise SftError(
                    f"stopped after step {step} of {job.plan.steps}; a checkpoint is saved",
                    128 + stopped[0],  # type: ignore[arg-type]
                    hint="--resume goes on",
                )
    outcome.seconds = time.monotonic() - begin


def _metrics(report: Report, evaluation: Totals | None) -> dict[str, Any]:
    line = asdict(report) | {"tokens_per_second": report.tokens / max(report.seconds, 1e-9)}
    if evaluation:
        line |= {"eval_loss": evaluation.loss, "eval_accuracy": evaluation.accuracy, "eval_tokens": evaluation.tokens}
    return line


def _progress(job: Job, report: Report, begin: float, start: int) -> str:
    spent = time.monotonic() - begin
    left = spent / (report.step - start) * (job.plan.steps - report.step)
    held = f"  eval {job.outcome.eval_loss:.3f}" if job.outcome.eval_loss is not None else ""
    return (
        f"train {report.step}/{job.plan.steps}  epoch {report.epoch:.1f}  loss {job.outcome.loss or 0:.3f}{held}  "
        f"{job.outcome.tokens / spent:,.0f} tokens/s  {console.clock(left)} left"
    )


def _compare(job: Job, loss: float, step: int) -> None:
    """Remember the best eval loss, and for how many evaluations there was no better one."""
    if math.isfinite(loss) and (job.best is None or loss < job.best[0]):
        job.best, job.since_best = (loss, step), 0
    else:
        job.since_best += 1


def _enough(job: Job) -> bool:
    """Early stopping: whether `patience` evaluations have passed without a better loss."""
    return job.options.patience is not None and job.since_best >= job.options.patience


def _checkpoint(job: Job, step: int) -> None:
    facts: dict[str, Any] = {"settings": job.settings, "best": job.best, "since_best": job.since_best}
    if job.best and job.options.patience:
        facts["best_step"] = job.best[1]
    resume.save(job.run, step, job.model, job.optimizers, facts, job.options.keep)


def _samples_due(options: Train, step: int, evaluation: Totals | None, last: bool) -> bool:
    if not options.sample_rows:
        return False
    return step % options.sample_every == 0 or last if options.sample_every else evaluation is not None


def _answer_samples(job: Job, step: int) -> None:
    """Answer the first turn of a few held-out rows (training rows where there are none) into samples.jsonl."""
    rows = job.eval_rows or (job.rows[i] for i in job.train_rows)
    asked = list(islice(filter(None, map(_first_turn, rows)), job.options.sample_rows))
    options = Generate(max_new_tokens=job.options.sample_tokens)
    stops = job.stops or stop_ids(job.folder.path)
    answers = in_order(generate(job.model, [prompt for prompt, _ in asked], options, stops))
    with open(job.run / SAMPLES, "ab") as file, job.engine.autocast():
        for (prompt, reference), answer in zip(asked, answers, strict=True):
            sample = {
                "step": step,
                "id": prompt.key,
                "prompt": job.codec.decode(prompt.ids, keep_special=True),
                "completion": job.codec.decode(answer.ids),
                "reference": job.codec.decode(reference),
                "finish_reason": answer.finish_reason,
            }
            file.write(json_line(sample))


def _first_turn(row: Row) -> tuple[Prompt, list[int]] | None:
    """(what comes before the first trained tokens, these tokens); a prompt has at least one token."""
    start = next((t for t in range(1, len(row.labels)) if row.labels[t] != IGNORE), None)
    if start is None:
        return None
    end = next((t for t in range(start, len(row.labels)) if row.labels[t] == IGNORE), len(row.labels))
    return Prompt(row.input_ids[:start], row.id), row.input_ids[start:end]


def _finish(job: Job) -> Outcome:
    """Write the model folder: the last weights, or the best ones under early stopping."""
    if job.options.patience and job.best and job.best[1] != job.outcome.steps:
        resume.load_weights(resume.folder_of(job.run, job.best[1]), job.model)
        job.outcome.eval_loss = job.best[0]
        console.note(f"train: keeping the weights of step {job.best[1]}, eval loss {job.best[0]:.4f}")
    save_model(job.model, job.folder, job.run / MODEL, job.stops, _template_of_rows(job))
    outcome = job.outcome
    if outcome.skipped:
        console.warn(f"train: {outcome.skipped:,} step(s) had no weight and were skipped")
    outcome.model = str(job.run / MODEL)
    outcome.sha256 = file_fingerprint(job.run / MODEL / WEIGHTS)
    reached = "" if outcome.loss is None else f", loss {outcome.loss:.4f}"
    reached += "" if outcome.eval_loss is None else f", eval loss {outcome.eval_loss:.4f}"
    rate = outcome.tokens / max(outcome.seconds, 1e-9)
    console.note(
        f"train: {outcome.steps} steps in {console.clock(outcome.seconds)}{reached}, "
        f"{rate:,.0f} tokens/s; wrote {outcome.model} (sha256 {outcome.sha256})"
    )
    return outcome


def _template_of_rows(job: Job) -> str | None:
    """The template that the rows were made with, where the folder has another one (or none)."""
    made_with = job.rows[0].template
    own = folder_template(job.folder.path)
    if not made_with or (own and Template(own, "own", job.codec.specials).hash == made_with):
        return None
    kept = recall(f"{made_with}.jinja")
    if kept is None:
        console.warn(f"train: template {made_with} of the rows is not known here; the model folder keeps its own")
    return kept.decode() if kept else None
