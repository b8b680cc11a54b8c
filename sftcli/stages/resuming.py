"""How a training run begins, goes on from a checkpoint and is saved."""

import math
import os
import platform
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

import sftcli
from sftcli import artifacts, console, manifest, reading, writing
from sftcli.artifacts import ADAPTER, METRICS, MODEL, RUN, SAMPLES
from sftcli.errors import CheckpointError, Exit, SftError, UsageError
from sftcli.model import resume
from sftcli.model.processes import typed
from sftcli.model.training import Report
from sftcli.stages.training_job import ARRIVING, HOW, Job, best_step

DATA = ("rows", "weights", "eval_data")  # of the settings
STALE_AFTER = (METRICS, SAMPLES, MODEL, ADAPTER)  # what a new training run replaces


def begin(job: Job, resumed: bool) -> int:
    """Start a run over or go on with it, once nothing speaks against it; returns the steps that are done."""
    recorded = reading.read_json(job.run / RUN) if (job.run / RUN).is_file() else {}
    world = job.engine.world
    named = world.from_first(lambda: _newest_whole(job, recorded.get("id"))) if resumed else None
    folder = Path(named) if named else None
    world.from_first(lambda: _check_room(job, manifest.step_of(folder) if folder else 0))
    step = _go_on(job, folder) if folder else 0
    world.meet()  # every process has read what it needs of the run, before the first of them changes it
    if world.first:
        _clear(job, folder, recorded) if folder else _start_over(job, recorded.get("id"), resumed)
        if Path(job.rows.path) == job.run / ARRIVING:
            os.replace(job.rows.path, job.run / artifacts.ROWS)
            job.rows.path = str(job.run / artifacts.ROWS)
    return step


def _start_over(job: Job, before: str | None, resumed: bool) -> None:
    """Remove what the run before (its id is `before`) has left, its results last: killed, it can be started again."""
    if resumed:
        console.note("train: no checkpoint to resume from, starting at step 0")
    if before:
        manifest.forget(job.run, before)
    for name in STALE_AFTER:
        writing.discard(job.run / name)
    for path in job.run.glob("diverged-step-*.jsonl"):
        path.unlink()
    job.id = secrets.token_hex(6)
    facts = {
        "id": job.id,
        "sftcli": sftcli.__version__,
        "python": platform.python_version(),
        "command": typed(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if job.options.adapter:
        facts["base"] = str(job.folder.path.resolve())  # where `-m RUN` finds what the adapter belongs on
    writing.update_json(job.run / RUN, facts | job.settings)


def _check_room(job: Job, done: int) -> None:
    """Raise SftError (exit 6) where the disk cannot take the checkpoints that will lie there after step `done`."""
    place = job.run / artifacts.CHECKPOINTS  # maybe a link to another disk
    place = place if place.is_dir() else job.run
    copies = _checkpoints_to_come(job, done)
    need, free = copies * resume.bytes_of(job.model, job.optimizers), shutil.disk_usage(place).free
    if free < need:
        kept = f"keep={job.options.keep}, one on its way{', the best' if job.options.patience else ''}"
        told = f"{place}: {copies} more checkpoints ({kept}) need {need:,} bytes, {free:,} are free"
        raise SftError(told, Exit.WRITE, hint="make room, a smaller --set keep, or an -o on another disk")


def _checkpoints_to_come(job: Job, done: int) -> int:
    """How many more there will be at a time, at most."""
    options, plan = job.options, job.plan
    if done >= plan.steps:
        return 0
    there = len(manifest.checkpoints(job.run))  # those of a run that is replaced make room, too
    at_once = options.keep + 1 + bool(options.patience)
    of_an_epoch = next(plan.from_step(0), ([], 1.0, True))[1]
    every = 1 if options.patience else options.checkpoint_every or max(1, round(1 / of_an_epoch))
    return min(math.ceil(plan.steps / every) - done // every, max(at_once - there, 1))


def _newest_whole(job: Job, own: str | None) -> str | None:
    """The newest checkpoint of this run that is whole; None where there is none at all. Raises CheckpointError."""
    owned = [(folder, manifest.owner_of(folder)) for folder in reversed(manifest.checkpoints(job.run))]
    own = own or next((owner for _, owner in owned if owner), None)  # run.json may be gone
    folders = [folder for folder, owner in owned if owner in (own, None)]
    damage = None
    for folder in folders:
        if damage:
            console.warn(f"train: {damage}; going back to {folder.name}")
        damage = manifest.damage_of(folder)
        if not damage:
            job.id = own or ""
            return str(folder)
    if damage:
        raise CheckpointError(f"{damage}; no checkpoint is whole", hint="start a new run with another -o")
    return None


def _go_on(job: Job, folder: Path) -> int:
    """From a checkpoint: same settings, and the same data unless other data is asked for."""
    other_data = _compare_settings(job, resume.read_facts(folder)["settings"])  # before tensors that may not fit
    facts = resume.load(folder, job.model, job.optimizers)
    step = int(facts["step"])
    if step > job.plan.steps:
        told = f"cannot resume {job.run}: {step:,} steps are done, these rows make {job.plan.steps:,}"
        raise UsageError(told, hint="more rows, or a new run with another -o")
    if not other_data:  # losses of other rows do not compare
        job.best = tuple(facts["best"]) if facts.get("best") else None
        job.since_best = int(facts.get("since_best", 0))
    if pending := facts.get("pending"):
        report: dict[str, Any] = {name: math.nan if value is None else value for name, value in pending[0].items()}
        job.pending = Report(**report), pending[1]
    console.note(f"train: resuming after step {step}")
    return step


def _clear(job: Job, folder: Path, recorded: dict[str, Any]) -> None:
    """Remove what lies after the checkpoint in the logs, and the checkpoints before it that are not kept."""
    step = manifest.step_of(folder)
    data = {name: job.settings[name] for name in DATA}
    if recorded | data != recorded:
        writing.update_json(job.run / RUN, data)
    for name in (METRICS, SAMPLES):
        _cut_back(job.run / name, step - bool(job.pending))  # what follows the step is done anew
    manifest.rotate(folder, job.id, job.options.keep, best_step(job))  # it may have been killed before that


def _compare_settings(job: Job, before: dict[str, Any]) -> bool:
    """Warn where bits may differ from here on; raise UsageError where the rest of the run would be another run.
    Returns whether the data is another, which was asked for."""
    options = resume.known_options(before["options"])
    before = job.settings | before | {"options": {name: options.get(name) for name in job.settings["options"]}}
    other_data, changed, ways = False, [], ["start a new run with another -o"]
    for name, how in resume.differences(before, job.settings):  # what is newer than the checkpoint is as it was
        if name in ("threads", "processes", "torch", *HOW):
            console.warn(f"train: {name} {how}: the run goes on, but not bit for bit")
        elif name in DATA and job.options.allow_data_change:
            console.warn(f"train: the {name} changed ({how}): the run goes on with them")
            other_data = True
        else:
            option = name.removeprefix("options.")
            changed.append(f"{option} {how}" if option != name else f"the {name} changed ({how})")
            if option != name:
                ways = ["give the options what they were", *ways]
            elif name in DATA:
                ways = [*ways, "--set allow_data_change=true"]
    if changed:
        hint = ", or ".join(dict.fromkeys(ways))
        raise UsageError(f"cannot resume {job.run}: {'; '.join(changed)}", hint=hint)
    return other_data


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
        with writing.atomic_file(path) as file:
            file.writelines(kept)


def save_checkpoint(job: Job, step: int) -> None:
    """Write a checkpoint, all processes together. Raises SftError in all of them."""
    job.engine.world.from_first(lambda: _logs_to_disk(job.run))
    facts = {"settings": job.settings, "best": job.best, "since_best": job.since_best, "pending": job.pending}
    tensors = resume.tensors_of(job.model, job.optimizers)
    resume.save(job.run, job.id, step, tensors, facts, job.options.keep, best_step(job), job.engine.world)


def _logs_to_disk(run: Path) -> None:
    """Or after a power cut a checkpoint could be ahead of its log."""
    for name in (METRICS, SAMPLES):
        try:
            writing.to_disk(run / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise writing.cannot_write(run / name, error) from None
