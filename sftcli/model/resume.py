"""Checkpoints of a run: what a later process needs to go on as if nothing had happened.

A checkpoint is a folder `step-N` that appears under its name only when complete: weights and optimizer state as
safetensors, the rest as JSON. Order, learning rate and dropout are functions of (seed, step) and need no state.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim import Optimizer

from sftcli.artifacts import CHECKPOINTS, atomic_folder, read_json, write_json
from sftcli.errors import CheckpointError
from sftcli.model.gpt import GPT
from sftcli.model.optim import load_state_tensors, state_tensors
from sftcli.model.processes import World, gathered, shard_of
from sftcli.model.tensorfile import write_tensors

TRAINED, STATE, OPTIMIZER = "trained.safetensors", "state.json", "optimizer.safetensors"
RNG = "rng"  # torch's CPU generator, beside the optimizer's tensors
DAMAGE = (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError)  # what a broken file ends in


def save(
    run: Path, step: int, model: GPT, optimizers: list[Optimizer], facts: dict[str, Any], keep: int, world: World
) -> Path:
    """Write checkpoints/step-N and then let go of all but the newest `keep` (and the best, if `facts` names one)."""
    folder = folder_of(run, step)
    weights = gathered({name: p for name, p in model.named_parameters() if p.requires_grad}, world)
    state = gathered(state_tensors(model, optimizers), world)
    if not world.first:
        return folder
    with atomic_folder(folder) as made:
        write_tensors(made / TRAINED, weights)
        write_tensors(made / OPTIMIZER, state | {RNG: torch.get_rng_state()})
        write_json(made / STATE, {"step": step, "torch": str(torch.__version__), **facts})
    best = facts.get("best_step")
    for old in checkpoints(run)[:-keep]:
        if _step_of(old) != best:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def folder_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:06}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if (path / STATE).is_file()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    found = re.fullmatch(r"step-(\d+)", path.name)
    return int(found[1]) if found else -1


def load(folder: Path, model: GPT, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Put a checkpoint back into a model and its optimizers; returns its facts. Raises CheckpointError."""
    facts: dict[str, Any] = read_json(folder / STATE)
    if not isinstance(facts, dict) or not {"step", "settings"} <= set(facts):
        raise CheckpointError(f"{folder / STATE} is damaged: no step or no settings")
    load_weights(folder, model)
    try:
        state = load_file(folder / OPTIMIZER)
        torch.set_rng_state(state.pop(RNG))
        load_state_tensors(model, optimizers, state)
    except DAMAGE as error:
        raise CheckpointError(f"{folder / OPTIMIZER} is damaged: {error}") from None
    return facts


def load_weights(folder: Path, model: GPT) -> None:
    """Only the weights of a checkpoint (the best one, at the end of a run with patience)."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        found = load_file(folder / TRAINED)
        if missing := set(parameters) - set(found):
            raise KeyError(min(missing))
        for name, value in found.items():
            with torch.no_grad():
                parameters[name].copy_(shard_of(value, parameters[name]))
    except DAMAGE as error:
        raise CheckpointError(f"{folder / TRAINED} is damaged: {error}") from None


def remove_leftovers(run: Path) -> None:
    """What a killed process left half-written."""
    for folder in (run, run / CHECKPOINTS):
        for path in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
