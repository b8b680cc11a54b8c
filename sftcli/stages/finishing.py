"""What a training run that is done leaves: a model folder or an adapter, and a line that says how it went."""

from pathlib import Path

import torch

from sftcli import console, manifest
from sftcli.artifacts import ADAPTER, MODEL, file_fingerprint, fingerprint
from sftcli.errors import CheckpointError
from sftcli.model import resume
from sftcli.model.adapters.peft import ADAPTER_WEIGHTS, save_adapter
from sftcli.model.checkpoint import DTYPES, save_model
from sftcli.model.flops import peak_of
from sftcli.model.processes import collect
from sftcli.model.tensorfile import weight_files
from sftcli.stages.training_job import Job, Outcome
from sftcli.text.folder import folder_template, stop_ids
from sftcli.text.store import recall
from sftcli.text.template import Template
from sftcli.writing import json_line


def finish(job: Job, base: str) -> Outcome:
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
