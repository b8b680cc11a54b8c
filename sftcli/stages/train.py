"""sft train: rows -> a model folder or an adapter, with everything a run leaves behind."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from sftcli import artifacts, console, manifest, signals, writing
from sftcli.artifacts import ADAPTER, METRICS, MODEL, RUN, SAMPLES, file_fingerprint, fingerprint
from sftcli.errors import CheckpointError, SftError, UsageError
from sftcli.model import resume
from sftcli.model.adapters.peft import ADAPTER_WEIGHTS, save_adapter
from sftcli.model.adapters.prefix import shortened
from sftcli.model.checkpoint import DTYPES, ModelFolder, open_folder, save_model
from sftcli.model.dataset import check_rows, check_tokenizer
from sftcli.model.decoding import Completion, decode
from sftcli.model.flops import peak_of
from sftcli.model.growth import Prompt, blanks_of_row
from sftcli.model.memory import forward_tokens, keep_freed_memory
from sftcli.model.probe import fitting_tokens
from sftcli.model.processes import SHUTDOWN, World, collect, grace, is_worker, joined, together
from sftcli.model.scoring import Totals, total_score
from sftcli.model.tensorfile import weight_files
from sftcli.model.training import Report, train_steps
from sftcli.recipe import Generate, Lora, Train
from sftcli.rows import IGNORE, Row
from sftcli.stages.divergence import Spikes, refusal
from sftcli.stages.resuming import begin, save_checkpoint
from sftcli.stages.training_job import (
    Job,
    Outcome,
    blank_controls,
    compare,
    has_enough,
    make_job,
    open_rows,
)
from sftcli.text.folder import folder_template, load_codec, stop_ids
from sftcli.text.store import recall
from sftcli.text.template import Template
from sftcli.text.tokenizer import Codec
from sftcli.writing import append_lines, json_line

NAMES = {artifacts.ROWS, artifacts.TOKENS, METRICS, MODEL, ADAPTER, RUN, artifacts.CHECKPOINTS, artifacts.BASE}
NAMES |= {artifacts.RECIPE}
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
    with writing.output_folder(output, NAMES) as run:
        _refuse(run, folder, resumed)
        job, where, done = _begun(options, source, folder, codec, run, resumed, world)
        _announce(job, where, done)
        if not has_enough(job):  # else early stopping had ended the run that is resumed
            _fit(job, done)
            _loop(job, done)
        return _finish(job, model)


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
        check_rows(rows, shortened(folder.config, options.adapter), where)
        check_tokenizer(rows[0].tokenizer, codec.hash, where)
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
    if _samples_due(options, step, evaluation, last):
        _answer_samples(job, step)
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


def _samples_due(options: Train, step: int, evaluation: Totals | None, last: bool) -> bool:
    if not options.sample_rows:
        return False
    return step % options.sample_every == 0 or last if options.sample_every else evaluation is not None


def _answer_samples(job: Job, step: int) -> None:
    """Answer the first turn of a few held-out rows (training rows where there are none) into samples.jsonl."""
    rows = job.eval_rows or (job.rows[i] for i in job.train_rows)
    asked = list(islice(filter(None, map(_first_turn, rows)), job.options.sample_rows))
    answers = _answers(job, [prompt for prompt, _ in asked])
    for (prompt, reference), answer in zip(asked, answers, strict=True):
        sample = {
            "step": step,
            "id": prompt.key,
            "prompt": job.codec.decode(prompt.ids, keep_special=True),
            "completion": job.codec.decode(answer.ids),
            "reference": job.codec.decode(reference),
            "finish_reason": answer.finish_reason,
        }
        append_lines(job.engine.world.path(job.run / SAMPLES), sample)


def _answers(job: Job, prompts: list[Prompt]) -> list[Completion]:
    options = Generate(max_new_tokens=job.options.sample_tokens)
    found = []
    with job.engine.autocast(), together(job.model):
        for event in decode(job.model, prompts, options, job.stops or stop_ids(job.folder.path)):
            job.engine.poll()
            found += [event] if isinstance(event, Completion) else []
    return sorted(found, key=lambda answer: answer.number)


def _first_turn(row: Row) -> tuple[Prompt, list[int]] | None:
    """(what comes before the first trained tokens, these tokens); a prompt has at least one token."""
    start = next((t for t in range(1, len(row.labels)) if row.labels[t] != IGNORE), None)
    if row.block_position_ids is not None and row.order is not None:
        return blanks_of_row(row)
    if start is None or row.order is not None:
        return None
    end = next((t for t in range(start, len(row.labels)) if row.labels[t] == IGNORE), len(row.labels))
    return Prompt(row.input_ids[:start], row.id), row.input_ids[start:end]


def _finish(job: Job, base: str) -> Outcome:
    """Write the model folder or the adapter: the last weights, or the best ones under early stopping."""
    if job.options.patience and job.best and job.best[1] != job.outcome.steps:
        _load_best(job, job.best[1])
        job.outcome.eval_loss = job.best[0]
        console.note(f"train: keeping the weights of step {job.best[1]}, eval loss {job.best[0]:.4f}")
    world, outcome = job.engine.world, job.outcome
    collect(job.model, world)
    outcome.model, outcome.sha256 = world.from_first(lambda: _written(_save(job, base)))
    if outcome.skipped:
        console.warn(f"train: {outcome.skipped:,} step(s) had no weight and were skipped")
    reached = "" if outcome.loss is None else f", loss {outcome.loss:.4f}"
    reached += "" if outcome.eval_loss is None else f", eval loss {outcome.eval_loss:.4f}"
    wrote = f"wrote {outcome.model} (sha256 {outcome.sha256})"
    if not outcome.tokens:  # a finished run was resumed
        console.note(f"train: {wrote}")
        return outcome
    rate = outcome.tokens / max(outcome.seconds, 1e-9)
    console.note(
        f"train: {outcome.steps} steps in {console.clock(outcome.seconds)}{reached}, "
        f"{rate:,.0f} tokens/s{_of_peak(job)}; {wrote}"
    )
    return outcome


def _of_peak(job: Job) -> str:
    """The share of what GPUs could multiply in bfloat16 that the run has multiplied."""
    peak = peak_of(job.engine.device) if job.engine.dtype == torch.bfloat16 else None
    if peak is None or not job.outcome.flop:
        return ""
    could = peak * job.engine.world.size * max(job.outcome.seconds, 1e-9)
    return f" ({job.outcome.flop / could:.0%} of the GPU's FLOP/s)"


def _load_best(job: Job, step: int) -> None:
    folder = manifest.folder_of(job.run, step)
    if damage := job.engine.world.from_first(lambda: manifest.damage_of(folder)):
        raise CheckpointError(damage, hint="it held the best weights; the last ones are in the newest checkpoint")
    resume.load_weights(folder, job.model)


def _written(files: list[Path]) -> tuple[str, str]:
    """The folder of weights, and their hash."""
    hashes = [file_fingerprint(path) for path in files]
    return str(files[0].parent), hashes[0] if len(hashes) == 1 else fingerprint(*hashes)


def _save(job: Job, base: str) -> list[Path]:
    """Write what was trained; returns the files of its weights."""
    template, options = _template_of_rows(job), job.options
    if not options.adapter:
        dtype = None if options.save_dtype == "base" else DTYPES[options.save_dtype]
        save_model(job.model, job.folder, job.run / MODEL, job.stops, template, dtype, options.shard_size)
        return weight_files(job.run / MODEL)
    stops = job.stops or stop_ids(job.folder.path)
    extra = {"generation_config.json": json_line({"eos_token_id": stops})} if stops else {}
    if template is not None:
        extra["chat_template.jinja"] = template.encode()
    save_adapter(job.model, job.folder, job.run / ADAPTER, options.adapter, base, extra)
    return [job.run / ADAPTER / ADAPTER_WEIGHTS]


def _template_of_rows(job: Job) -> str | None:
    """The template that the rows were made with, or the folder's own where they do not say (or we do not know it)."""
    made_with = job.rows[0].template
    own = folder_template(job.folder.path)
    if not made_with or (own and Template(own, "own", job.codec.specials).hash == made_with):
        return own
    kept = recall(f"{made_with}.jinja")
    if kept is None:
        console.warn(f"train: template {made_with} of the rows is not known here; the model folder keeps its own")
    return kept.decode() if kept else own
