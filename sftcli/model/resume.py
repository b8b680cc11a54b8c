"""What a checkpoint holds: all that a later process needs to go on as if nothing had happened.

Weights and optimizer state as safetensors (of what is spread over processes, a file of each), the rest as JSON. Order,
learning rate and dropout are functions of (seed, step) and need no state. The folders themselves are manifest.py's.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.optim import Muon, Optimizer

from sftcli import manifest
from sftcli.errors import CheckpointError, Exit, SftError
from sftcli.model.gpt import GPT
from sftcli.model.optim import load_state_tensors, state_tensors
from sftcli.model.processes import World
from sftcli.model.shards import TensorFiles, file_name, held, is_shared_out
from sftcli.model.tensorfile import write_tensors
from sftcli.reading import read_json
from sftcli.recipe import Train
from sftcli.writing import atomic_folder, cannot_write, to_disk, write_json

TRAINED, STATE, OPTIMIZER = "trained.safetensors", "state.json", "optimizer.safetensors"
RNG = "rng"  # torch's CPU generator, beside the optimizer's tensors
DAMAGE = (KeyError, ValueError, TypeError, RuntimeError)  # what tensors end in that do not fit


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
    world: World | None = None,
) -> Path:
    """Write checkpoints/step-N, then let go of all but the newest `keep` (and the best).

    Each process writes what it holds, the first one the rest. Raises SftError, the same in all of them: exit 6 where it
    cannot be written, 4 for a number that is not finite. The checkpoints before it are then as they were.
    """
    folder, world = manifest.folder_of(run, step), world or World()
    size = sum(value.nbytes for values in tensors.values() for value in values.values())
    with ExitStack() as unpublished:

        @_told_of(folder, size)
        def begin() -> str:
            return str(unpublished.enter_context(atomic_folder(folder)))

        @_told_of(folder, size)
        def write() -> dict[str, tuple[int, int]]:
            return _write_held(made, folder, tensors, world)

        @_told_of(folder, size)
        def publish() -> None:
            write_json(made / STATE, {"step": step, **facts})
            sums[STATE] = manifest.crc32_of(made / STATE)
            manifest.seal(made, step, run_id, sums)
            manifest.make_room(folder)
            unpublished.close()  # all is on disk, and has its name
            manifest.rotate(folder, run_id, keep, best)

        made = Path(world.from_first(begin))
        sums = {name: sum_ for of_one in world.from_each(write) for name, sum_ in of_one.items()}
        world.from_first(publish)
    return folder


def _write_held(
    made: Path, folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], world: World
) -> dict[str, tuple[int, int]]:
    """Write this process's share of the tensors: (bytes, crc32) of its files. `folder`: what they are called later."""
    sums = {}
    for name, values in tensors.items():
        if any(map(is_shared_out, values.values())):
            name = file_name(name, world.rank + 1, world.size)
        elif not world.first:
            continue
        own = {key: held(value) for key, value in values.items() if world.first or is_shared_out(value)}
        try:
            sums[name] = write_tensors(made / name, own)
            if not world.first:  # on a machine of its own, maybe
                to_disk(made / name)
        except OSError as error:
            raise cannot_write(folder / name, error) from None
    return sums


@contextmanager
def _told_of(folder: Path, size: int) -> Iterator[None]:
    """Where a checkpoint cannot be written, the error tells its size, and for how much there is room."""
    try:
        try:
            yield
        except OSError as error:
            raise cannot_write(folder, error) from None
    except SftError as error:
        if error.code != Exit.WRITE:
            raise
        run = folder.parent.parent
        free = shutil.disk_usage(run).free
        told = f"{error}; a checkpoint takes {size:,} bytes, {free:,} are free"
        hint = "the one before it is whole: --resume goes on from there" if manifest.checkpoints(run) else None
        raise SftError(told, Exit.WRITE, hint=hint) from None


def load(folder: Path, model: GPT, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Put a checkpoint back into a model and its optimizers, however they and it are spread; returns its facts.

    Raises CheckpointError."""
    facts = read_facts(folder)
    load_weights(folder, model)
    state = tensor_files(folder, OPTIMIZER)
    try:
        torch.set_rng_state(state.read(RNG))
        load_state_tensors(model, optimizers, state)
    except DAMAGE as error:
        raise CheckpointError(f"{folder / OPTIMIZER} is damaged: {error}") from None
    return facts


def read_facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = read_json(folder / STATE)
    if not {"step", "settings"} <= set(facts):
        raise CheckpointError(f"{folder / STATE} is damaged: no step or no settings")
    return facts


def tensor_files(folder: Path, name: str) -> TensorFiles:
    """Of a checkpoint: the file of that name, or those of the processes that wrote it. Raises CheckpointError."""
    stem, _, suffix = name.rpartition(".")
    shape = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.{suffix}")
    return TensorFiles(sorted(folder / file for file in manifest.manifest_of(folder)["files"] if shape.fullmatch(file)))


@torch.no_grad()
def load_weights(folder: Path, model: GPT) -> None:
    """Only the weights of a checkpoint (the best one, at the end of a run with patience). Raises CheckpointError."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = tensor_files(folder, TRAINED)
    try:
        if missing := set(parameters) - set(found):
            raise KeyError(min(missing))
        for name in found:
            parameters[name].copy_(found.read_like(name, parameters[name]))
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
