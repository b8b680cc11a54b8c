"""Model folders in and out: Hugging Face's files, tensor by tensor."""

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sftcli.artifacts import cannot_write, read_json, write_json
from sftcli.errors import CheckpointError
from sftcli.model.families import Family, Stored, family_of
from sftcli.model.gpt import GPT, GPTConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
MAX_PARAMETERS = 1 << 40


@dataclass
class ModelFolder:
    """What config.json of a folder says, read and checked before any memory is taken."""

    path: Path
    json: dict[str, Any]
    family: Family
    config: GPTConfig
    files: list[Path]  # safetensors files; empty: no weights yet

    @property
    def has_weights(self) -> bool:
        return bool(self.files)


def open_folder(path: Path) -> ModelFolder:
    """Read a model folder's config.json and find its weights. Raises CheckpointError."""
    config_json = read_json(path / "config.json")
    if not isinstance(config_json, dict):
        raise CheckpointError(f"{path / 'config.json'}: expected an object")
    family = family_of(config_json)
    try:
        config = family.read_config(config_json)
        _check_config(config, path / "config.json")
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from None
    return ModelFolder(path, config_json, family, config, _weight_files(path))


def _check_config(config: GPTConfig, path: Path) -> None:
    """Raise CheckpointError for sizes that no model can have, before any memory is taken."""
    sizes = [config.vocab_size, config.context, config.layers, config.width, config.mlp_width]
    if any(type(size) is not int or size < 1 for size in [*sizes, config.heads, config.kv_heads, config.head_dim]):
        raise CheckpointError(f"{path}: sizes must be positive whole numbers")
    if not isinstance(config.norm_eps, float | int):
        raise CheckpointError(f"{path}: the norm's epsilon {config.norm_eps!r} is not a number")
    if config.heads % config.kv_heads:
        raise CheckpointError(f"{path}: {config.heads} heads cannot share {config.kv_heads} key heads evenly")
    if config.positions == "rope" and config.head_dim % 2:
        raise CheckpointError(f"{path}: RoPE needs an even head width, not {config.head_dim}")
    if config.vocab_size * config.width > MAX_PARAMETERS or config.layers > 10_000:
        raise CheckpointError(f"{path} asks for a model beyond any memory")


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        index = read_json(path / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX} has no weight_map")
        names = list(weight_map.values())
        for name in names:
            if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
                raise CheckpointError(f"{path / INDEX} names a file outside of its folder: {name!r}")
            if not (path / name).is_file():
                raise CheckpointError(f"{path}: shard {name} is missing")
        return sorted(path / name for name in set(names))
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if pickles := sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]):
        raise CheckpointError(
            f"{path} has only {pickles[0].name}, a pickle, which can run code",
            hint="convert it to model.safetensors where you trust it",
        )
    return []


def load_model(folder: ModelFolder, seed: int = 0) -> GPT:
    """The model of a folder in float32; a folder without weights is initialised from `seed`."""
    model = _empty_model(folder.config)
    if not folder.has_weights:
        model.initialise(seed)
        return model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {tensor.name: tensor for tensor in folder.family.tensors(folder.config)}
    tied_head = None
    for name, tensor in _tensors(folder, stored):
        if name in stored:
            _fill(stored.pop(name), tensor, parameters)
        else:
            tied_head = tensor
    if tied_head is not None and not torch.equal(tied_head.float(), model.embedding.weight):
        raise CheckpointError(
            f"{folder.path}: lm_head.weight is not the embedding, though config.json ties them",
            hint='"tie_word_embeddings": false in config.json uses it',
        )
    if stored:
        raise CheckpointError(f"{folder.path}: tensor {min(stored)} is missing ({len(stored)} in all)")
    return model


def load_trained(folder: ModelFolder) -> GPT:
    """The model of a folder, which must have weights."""
    if not folder.has_weights:
        raise CheckpointError(f"{folder.path} has no weights yet", hint="`sft train` makes them")
    return load_model(folder)


def _empty_model(config: GPTConfig) -> GPT:
    """A GPT whose parameters have memory but no values."""
    with torch.device("meta"):
        model = GPT(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32)))
    if config.tied:
        model.head.weight = model.embedding.weight
    return model


def _tensors(folder: ModelFolder, stored: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """(name in the family's files, tensor) of every weight, one at a time; also of a head that tying makes a copy."""
    for path in folder.files:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    name = folder.family.upstream_name(key)
                    if name.endswith(folder.family.BUFFERS):
                        continue
                    if name not in stored and not (folder.config.tied and name == "lm_head.weight"):
                        raise CheckpointError(f"{path}: tensor {key} has no place in the model")
                    yield name, file.get_tensor(key)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None


@torch.no_grad()
def _fill(stored: Stored, tensor: Tensor, parameters: dict[str, nn.Parameter]) -> None:
    """Copy a stored tensor into the parameters that it is made of."""
    targets = [parameters[name] for name in stored.ours]
    value = tensor.T if stored.transposed else tensor
    expected = (sum(len(p) for p in targets), *targets[0].shape[1:])
    if tuple(value.shape) != expected:
        told = expected[::-1] if stored.transposed else expected
        raise CheckpointError(f"tensor {stored.name} has shape {list(tensor.shape)}, config.json says {list(told)}")
    for target, part in zip(targets, stored.split(value, [len(p) for p in targets]), strict=True):
        target.copy_(part)


def upstream_tensors(model: GPT, family: Family) -> dict[str, Tensor]:
    """The model's weights under the family's names, fused and transposed as its files have them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for stored in family.tensors(model.config):
        value = stored.join([parameters[name].detach() for name in stored.ours])
        found[stored.name] = (value.T if stored.transposed else value).contiguous().cpu()
    return found


def save_model(
    model: GPT, folder: ModelFolder, output: Path, stops: Sequence[int], template: str | None = None
) -> None:
    """Write a model folder that transformers loads; it appears under its name only when complete.

    `stops`: ids that end a turn and were trained; they become generation_config's stop set. `template`: the chat
    template that rows were made with, where it is not the folder's own.
    """
    temporary = output.with_name(f".tmp-{output.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        write_tensors(temporary / WEIGHTS, upstream_tensors(model, folder.family))
        config = {key: value for key, value in folder.json.items() if key != "torch_dtype"}  # the older spelling
        write_json(temporary / "config.json", config | {"dtype": "float32"})
        for name in COMPANIONS:
            if (folder.path / name).is_file():
                shutil.copyfile(folder.path / name, temporary / name)
        if template is not None:
            (temporary / "chat_template.jinja").write_text(template, encoding="utf-8")
        write_json(temporary / "generation_config.json", _generation_config(folder, stops))
        replace_folder(temporary, output)
    except OSError as error:
        raise cannot_write(output, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _generation_config(folder: ModelFolder, stops: Sequence[int]) -> dict[str, Any]:
    path = folder.path / "generation_config.json"
    config: dict[str, Any] = read_json(path) if path.is_file() else {}
    if stops:
        config["eos_token_id"] = stops[0] if len(stops) == 1 else list(stops)
    return config


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """safetensors, on disk, with the mode that the umask says (the library publishes 0600)."""
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def replace_folder(temporary: Path, output: Path) -> None:
    """Rename a finished folder to its name; an older one of that name goes away after."""
    old = output.with_name(f".old-{output.name}-{secrets.token_hex(4)}")
    if output.exists():
        os.rename(output, old)
    os.rename(temporary, output)
    descriptor = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)
