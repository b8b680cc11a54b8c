"""What a checkpoint holds: all that a later process needs to go on as if nothing had happened.

Weights and optimizer state as safetensors, the rest as JSON. Order, learning rate and dropout are functions of
(seed, step) and need no state. The folders themselves are manifest.py's.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Muon, Optimizer

from sftcli import manifest
from sftcli.artifacts import atomic_folder, read_json, write_json
from sftcli.errors import CheckpointError, Exit, SftError
from sftcli.model.gpt import GPT
from sftcli.model.optim import load_state_tensors, state_tensors
from sftcli.model.processes import shard_of
from sftcli.model.tensorfile import write_tensors
from sftcli.recipe import Train

TRAINED, STATE, OPTIMIZER = "trained.safetensors", "state.json", "optimizer.safetensors"
RNG = "rng"  # torch's CPU generator, beside the optimizer's tensors
DAMAGE = (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError)  # what a broken file ends in


def tensors_of(model: GPT, optimizers: list[Optimizer]) -> dict[str, Mapping[str, Tensor]]:
    """What is trained and how far it is, by file."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {TRAINED: weights, OPTIMIZER: state_tensors(model, optimizers) | {RNG: torch.get_rng_state()}}


def bytes_of(model: GPT, optimizers: list[Optimizer]) -> int:
    """The size of a checkpoint, known before there is one: weights, two moments of each (Muon has one)."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with_one = sum(p.nbytes for o in optimizers if isinstance(o, Muon) for g in o.param_groups for p in g["params"])
    return 3 * trained - with_one


def save(
    run: Path,
    run_id: str,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write checkpoints/step-N, then let go of all but the newest `keep` (and the best).

    Raises SftError: exit 6 where it cannot be written, 4 for a number that is not finite. The checkpoints before it
    are then as they were.
    """
    folder = manifest.folder_of(run, step)
    try:
        with atomic_folder(folder) as made:
            sums = {name: write_tensors(made / name, values) for name, values in tensors.items()}
            write_json(made / STATE, {"step": step, **facts})
            sums[STATE] = manifest.crc32_of(made / STATE)[1]
            manifest.seal(made, step, run_id, sums)
            manifest.make_room(folder)
        manifest.rotate(folder, run_id, keep, best)
    except SftError as error:
        if error.code != Exit.WRITE:
            raise
        size = sum(value.nbytes for values in tensors.values() for value in values.values())
        free = shutil.disk_usage(run).free
        told = f"{error}; a checkpoint takes {size:,} bytes, {free:,} are free"
        raise SftError(told, Exit.WRITE, hint="the one before it is whole: --resume goes on from there") from None
    return folder


def load(folder: Path, model: GPT, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Put a checkpoint back into a model and its optimizers; returns its facts. Raises CheckpointError."""
    facts = read_facts(folder)
    load_weights(folder, model)
    state = read_tensors(folder / OPTIMIZER)
    try:
        torch.set_rng_state(state.pop(RNG))
        load_state_tensors(model, optimizers, state)
    except DAMAGE as error:
        raise CheckpointError(f"{folder / OPTIMIZER} is damaged: {error}") from None
    return facts


def read_facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = read_json(folder / STATE)
    if not {"step", "settings"} <= set(facts):
        raise CheckpointError(f"{folder / STATE} is damaged: no step or no settings")
    return facts


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A file of tensors, by plain reads: of a map, what another process cuts off would kill this one."""
    try:
        return load_file(path, backend="pread")
    except DAMAGE as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def load_weights(folder: Path, model: GPT) -> None:
    """Only the weights of a checkpoint (the best one, at the end of a run with patience)."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = read_tensors(folder / TRAINED)
    try:
        if missing := set(parameters) - set(found):
            raise KeyError(min(missing))
        for name, value in found.items():
            with torch.no_grad():
                parameters[name].copy_(shard_of(value, parameters[name]))
    except DAMAGE as error:
        raise CheckpointError(f"{folder / TRAINED} is damaged: {error}") from None


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, 'was A, is B') of every setting that is not what it was; inside of dicts by a dotted name."""
    for name in [*now, *(name for name in before if name not in now)]:
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield prefix + name, f"was {json.dumps(a)}, is {json.dumps(b)}"


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint, with the defaults of those that are newer than it."""
    try:
        return Train.model_validate(options).model_dump(mode="json")
    except ValidationError:  # it has one that is gone: what it says is compared as it is
        return options
