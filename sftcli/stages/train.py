"""sft train: rows -> a model folder or an adapter, with everything a run leaves behind."""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from sftcli import artifacts, console, manifest, signals, writing
from sftcli.artifacts import ADAPTER, METRICS, MODEL, RUN
from sftcli.errors import SftError, UsageError
from sftcli.model.adapters.prefix import shortened
from sftcli.model.checkpoint import ModelFolder, open_folder
from sftcli.model.dataset import check_rows, check_tokenizer
from sftcli.model.memory import forward_tokens, keep_freed_memory
from sftcli.model.probe import fitting_tokens
from sftcli.model.processes import SHUTDOWN, World, grace, is_worker, joined
from sftcli.model.scoring import Totals, total_score
from sftcli.model.training import Report, train_steps
from sftcli.recipe import Lora, Train
from sftcli.stages.divergence import Spikes, refusal
from sftcli.stages.finishing import finish
from sftcli.stages.resuming import begin, save_checkpoint
from sftcli.stages.samples import answer_samples, samples_due
from sftcli.stages.training_job import Job, Outcome, blank_controls, compare, has_enough, make_job, open_rows
from sftcli.text.folder import load_codec
from sftcli.text.tokenizer import Codec
from sftcli.writing import append_lines, json_line

NAMES = {artifacts.RECIPE, artifacts.BASE, artifacts.TOKENS, artifacts.ROWS, METRICS, artifacts.CHECKPOINTS}
NAMES |= {MODEL, ADAPTER, RUN}
ENDS_WITHIN = 25  # seconds after a signal


def start(
    options: Train, source: Sequence[str], model: str, output: str, resumed: bool = False, overwrite: bool = False
) -> None:
    """Train in this process, or in `nproc` of their own; in place of a finished run only where `overwrite`."""
    if _is_finished(Path(output)) and not (resumed or overwrite):
        raise UsageError(f"{output} holds a finished training run", hint="another -o; --overwrite trains in its place")
    if options.nproc == 1 or is_worker():
        train(options, source, model, output, resumed)
        return
    from sftcli.model.launch import launch

    with NamedTemporaryFile("wb", suffix=".yaml") as recipe:
        recipe.write(json_line({"train": options.model_dump(mode="json")}))
        recipe.flush()
        flags = ["--resume"] * resumed + ["--overwrite"] * overwrite
        talk = [flag for flag, asked in (("-q", console.QUIET), ("--traceback", "--traceback" in sys.argv)) if asked]
        told = [*talk, "train", *source, "-m", model, "-o", output, "--recipe", recipe.name, *flags]
        launch(options.nproc, told, options.process_timeout)


def train(options: Train, source: str | Sequence[str], model: str, output: str, resumed: bool = False) -> Outcome:
    """Run the stage. Raises SftError; an interrupted run has saved a checkpoint of its last whole step."""
    keep_freed_memory()
    with joined(options.process_timeout) as world:
        return _train(options, source, model, output, resumed, world)


def _train(
    options: Train, source: str | Sequence[str], model: str, output: str, resumed: bool, world: World
) -> Outcome:
    folder = open_folder(artifacts.model_folder(model))
    codec = load_codec(folder.path)
    with writing.output_folder(output, NAMES) as run, ExitStack() as alone:
        world.from_first(lambda: alone.enter_context(writing.alone_in(run)))
        _refuse(run, folder, resumed)
        job, where, done = _begun(options, source, folder, codec, run, resumed, world)
        _announce(job, where, done)
        if not has_enough(job):  # else early stopping had ended the run that is resumed
            _fit(job, done)
            _loop(job, done)
        return finish(job, model)


def _begun(
    options: Train,
    source: str | Sequence[str],
    folder: ModelFolder,
    codec: Codec,
    run: Path,
    resumed: bool,
    world: World,
) -> tuple[Job, str, int]:
    """The job, where its rows are from, and how many steps of it are done."""
    world.meet()  # all have looked at the run, which the first now changes
    if world.first:
        for place in (run, run / artifacts.CHECKPOINTS):
            writing.remove_leftovers(place)
    with open_rows(source, run, world) as (rows, where, inputs):
        if len(rows):
            check_tokenizer(rows[0].tokenizer, codec.hash, where)
        check_rows(rows, shortened(folder.config, options.adapter), where)
        job = make_job(options, folder, run, rows, where, codec, inputs, world)
        done = job.outcome.steps = begin(job, resumed)
    return job, where, done


def _is_finished(run: Path) -> bool:
    return (run / MODEL).is_dir() or (run / ADAPTER).is_dir()


def _refuse(run: Path, folder: ModelFolder, resumed: bool) -> None:
    """Refuse output folders whose content would be lost."""
    if folder.path.resolve() == (run / MODEL).resolve():
        raise UsageError(f"{run} holds the model to start from, which its new one would replace", hint="another -o")
    if not resumed and manifest.checkpoints(run) and not _is_finished(run):
        raise UsageError(
            f"{run} holds an unfinished training run", hint="--resume goes on with it; remove it to start over"
        )


def _announce(job: Job, where: str, start: int) -> None:
    options, count = job.options, sum(p.numel() for p in job.model.parameters())
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    share = f" ({trained:,} trained, {trained / count:.2%})" if trained < count else ""
    per_step = f"{options.batch_rows} rows" if options.batch_rows else f"{options.batch_tokens:,} tokens"
    held = f", {len(job.eval_rows):,} held out" if job.eval_rows else ""
    console.note(
        f"train: {len(job.train_rows):,} rows from {where}{held}; {count:,} parameters{share}"
        f"{'' if job.folder.has_weights else f' drawn from seed {options.seed}'}, {job.engine.device} "
        f"{str(job.engine.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads{_processes(job)}"
    )
    left = job.plan.steps - start
    console.note(
        f"train: {left:,} steps of {per_step}; {options.optimizer.kind}, lr {job.lr:g} ({options.schedule.kind})"
        if left
        else f"train: all {start:,} steps are done"
    )
    for part in job.plan.parts:
        console.note(f"train: {len(part.rows):,} rows of {part.name}: {part.per_epoch:,.6g} an epoch")
    if blank := blank_controls(job):
        told = ", ".join(f"{job.codec.token_text(i)} ({i})" for i in blank)
        how = "" if isinstance(options.adapter, Lora) else "--adapter lora "
        console.warn(
            f"train: the base has not learned {told}, and its embedding is frozen: "
            f"{how}--set adapter.modules_to_save=[embed_tokens,lm_head] trains it (your model's names for them)"
        )
    names = ", ".join(f"{job.codec.token_text(i)} ({i})" for i in job.stops)
    if names:
        console.note(f"train: stop set: {names}")
    elif not job.model.config.fills_masks:
        console.warn("train: no stop token is trained")


def _processes(job: Job) -> str:
    size = job.engine.world.size
    return f", {size} processes ({job.options.parallel})" if size > 1 else ""


def _fit(job: Job, start: int) -> None:
    """Smaller forwards, if the longest do not fit in memory. Raises OutOfMemory."""
    asked = forward_tokens(job.options, job.engine.device.type)
    if job.engine.world.size > 1 and job.options.parallel == "fsdp":
        return  # a forward of one process is one of all: none can try alone
    alone = replace(job.engine, world=World())
    tokens = fitting_tokens(job.model, job.optimizers, job.row, job.plan, job.options, alone, start)
    tokens = job.engine.world.least(tokens)
    if tokens < asked:
        job.options = job.options.model_copy(update={"micro_batch_tokens": tokens})
        job.engine.world.from_first(lambda: writing.update_json(job.run / RUN, {"micro_batch_tokens": tokens}))
        console.warn(f"train: out of memory: micro_batch_tokens is {tokens:,}, not {asked:,}; the steps stay the same")


def _loop(job: Job, start: int) -> None:
    """Train, and after every step: log, evaluate, answer samples, save. A signal leaves a checkpoint behind."""
    outcome, saved, begin = job.outcome, start, time.monotonic()
    pending, spikes = [job.pending] if job.pending else [], Spikes()
    append_lines(job.engine.world.path(job.run / METRICS))  # a log of no step is a log, too
    with signals.polled() as poll, console.live() as line:
        job.engine = replace(job.engine, poll=job.engine.world.agreed(poll))
        steps = train_steps(job.model, job.optimizers, job.row, job.plan, job.options, job.engine, job.lr, start)
        try:
            for report, epoch_ends in chain(pending, steps):
                job.pending = report, epoch_ends
                _follow(job, report)
                job.pending = None
                spikes.watch(report)
                line.show(_progress(job, report, begin, start), report.step / job.plan.steps)
                due = _checkpoint_due(job, report.step, epoch_ends) or report.step == job.plan.steps
                if due and report.step > saved:  # a pending step is what the run goes on from
                    saving = time.monotonic()
                    save_checkpoint(job, report.step)
                    if saved == start:
                        _tell_slow_end(report.seconds, time.monotonic() - saving)
                    saved = report.step
                if has_enough(job):
                    evaluations = f"{job.options.patience} evaluations"
                    console.note(f"train: step {report.step}: no better eval loss in {evaluations}, stopping")
                    break
        except signals.Interrupted as stop:
            raise _interrupted(job, saved, stop.code) from None
    outcome.seconds = time.monotonic() - begin


def _tell_slow_end(step: float, save: float) -> None:
    """Warn where what follows a signal, a step and a checkpoint, may take too long."""
    killed = grace()
    if step + save <= (ENDS_WITHIN if killed is None else 0.8 * killed):
        return
    told = f"train: a step takes {step:.1f} s and a checkpoint {save:.1f} s: after a signal, this run "
    if killed is None:
        console.warn(f"{told}needs more than {ENDS_WITHIN} s to end")
    else:
        more = f"--set process_timeout (--nproc) or {SHUTDOWN} (torchrun) gives more"
        console.warn(f"{told}may be killed before it is saved: that comes after {killed} s; {more}")


def _follow(job: Job, report: Report) -> None:
    """What follows a step: evaluation, its line in the log, samples. Raises SftError for one that is not finite."""
    options, outcome, step = job.options, job.outcome, report.step
    outcome.add(report)
    refused = None if report.finite else refusal(job, report)
    last, every = step == job.plan.steps, options.eval_every or max(1, job.plan.steps // 10)
    evaluation = None
    if job.eval_rows and (step % every == 0 or last) and not refused:
        evaluation = total_score(job.model, job.eval_rows, forward_tokens(options, job.engine.device.type), job.engine)
        outcome.eval_loss, outcome.eval_accuracy = evaluation.loss, evaluation.accuracy
    append_lines(job.engine.world.path(job.run / METRICS), _metrics(report, evaluation))
    if refused:
        raise refused
    if samples_due(options, step, evaluation, last):
        answer_samples(job, step)
    if evaluation:
        compare(job, evaluation.loss, step)


def _interrupted(job: Job, saved: int, code: int) -> SftError:
    """Save what is not yet saved: the last whole step. Half a step is dropped, half an evaluation done anew."""
    step = job.outcome.steps
    if step > saved:
        save_checkpoint(job, step)
    told = "a checkpoint is saved" if step else "nothing is lost"
    hint = "the same command with --resume goes on (`sft run` without it)"
    return SftError(f"stopped after step {step} of {job.plan.steps}; {told}", code, hint)


def _checkpoint_due(job: Job, step: int, epoch_ends: bool) -> bool:
    """Every checkpoint_every steps (or epoch), and where early stopping may come back to or ends."""
    options = job.options
    if options.patience and (has_enough(job) or (job.best and job.best[1] == step)):
        return True
    return step % options.checkpoint_every == 0 if options.checkpoint_every else epoch_ends


def _metrics(report: Report, evaluation: Totals | None) -> dict[str, Any]:
    line = {name: value for name, value in asdict(report).items() if value != {}}  # no rows with turns, no role
    if report.finite:
        del line["finite"]
    seconds = max(report.seconds, 1e-9)
    line |= {"tokens_per_second": report.tokens / seconds, "tflop_per_second": line.pop("flop") / seconds / 1e12}
    if evaluation:
        line |= {"eval_loss": evaluation.loss, "eval_accuracy": evaluation.accuracy, "eval_tokens": evaluation.tokens}
        line |= {f"eval_{name}": value for name, value in evaluation.of_pairs.items()}
    return line


def _progress(job: Job, report: Report, begin: float, start: int) -> str:
    spent = time.monotonic() - begin
    left = spent / max(report.step - start, 1) * (job.plan.steps - report.step)
    held = f"  eval {job.outcome.eval_loss:.3f}" if job.outcome.eval_loss is not None else ""
    return (
        f"train {report.step}/{job.plan.steps}  epoch {report.epoch:.1f}  loss {job.outcome.loss or 0:.3f}{held}  "
        f"{job.outcome.tokens / spent:,.0f} tokens/s  {console.clock(left)} left"
    )
