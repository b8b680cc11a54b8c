"""Model folders in and out: Hugging Face's files, tensor by tensor."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sftcli import console
from sftcli.errors import CheckpointError
from sftcli.model.families import Family, Stored, family_of, shapes_of
from sftcli.model.gpt import GPT, TOKEN_TYPES, GPTConfig
from sftcli.model.shards import held, rows_held
from sftcli.model.tensorfile import (
    EXTRA,
    STORED,
    Entry,
    bytes_of,
    read_entries,
    read_tensors,
    refuse_other_than_weights,
    weight_files,
    write_shards,
    write_tensors,
)
from sftcli.reading import read_json
from sftcli.writing import atomic_folder, write_json

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)

# tensors that an objective adds to a family that lacks them, and the switch in GPTConfig of each
EXTRAS = {"block_position.weight": "block_positions", "token_type.weight": "token_types"}
EXTRAS |= dict.fromkeys(("pooler.weight", "pooler.bias", "nsp.weight", "nsp.bias"), "nsp_head")
MAX_PARAMETERS = 1 << 40
SHARD_SIZE = "5GB"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelFolder:
    """What config.json and the headers of the weights say, read and checked before any memory is taken."""

    path: Path
    json: dict[str, Any]
    family: Family
    config: GPTConfig
    files: list[Path]  # safetensors files; empty: no weights yet
    entries: dict[str, Entry]  # by the family's names
    extra: dict[str, Entry] = field(default_factory=dict)  # by ours

    @property
    def has_weights(self) -> bool:
        return bool(self.files)

    @property
    def dtype(self) -> torch.dtype:
        """What most of the stored numbers are."""
        held: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            held[entry.dtype] = held.get(entry.dtype, 0) + entry.end - entry.start
        return max(held, key=lambda dtype: held[dtype], default=torch.float32)

    @property
    def narrow(self) -> torch.dtype | None:
        """The dtype of 16 bits that all matrices are stored in; None: no such."""
        held = {entry.dtype for entry in self.entries.values() if len(entry.shape) >= 2}
        return next(iter(held)) if len(held) == 1 and held <= {torch.bfloat16, torch.float16} else None

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor is stored as."""
        return self.entries[name].dtype if name in self.entries else self.dtype


def open_folder(path: Path) -> ModelFolder:
    """Read a model folder's config.json and the headers of its weights. Raises CheckpointError."""
    config_json = read_json(path / "config.json")
    if not isinstance(config_json, dict):
        raise CheckpointError(f"{path / 'config.json'}: expected an object")
    if "auto_map" in config_json:
        _warn_of_code(path)
    try:
        family = family_of(config_json)
        config = family.read_config(config_json)
        _check_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}", error.hint) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from None
    files = weight_files(path)
    folder = ModelFolder(path, config_json, family, config, files, {})
    if files:
        folder.config = _with_optional(folder)
        folder.entries = _checked_entries(folder)
    if (path / EXTRA).is_file():
        _open_extra(folder)
    return folder


def _with_optional(folder: ModelFolder) -> GPTConfig:
    """The config, with what the family's files may lack switched on where this one has it."""
    if not folder.family.optional:
        return folder.config
    held = {folder.family.upstream_name(entry.name) for path in folder.files for entry in read_entries(path, STORED)}
    switches: dict[str, Any] = {switch: name in held for name, switch in folder.family.optional.items()}
    return replace(folder.config, **switches)


@cache
def _warn_of_code(path: Path) -> None:
    """Once for every folder."""
    console.warn(f"{path} brings code of its own (auto_map), which is not run")


def _open_extra(folder: ModelFolder) -> None:
    """Read the header of extra.safetensors and turn on what it is for. Raises CheckpointError."""
    folder.extra = {entry.name: entry for entry in read_entries(folder.path / EXTRA)}
    own = {name for stored in folder.family.tensors(folder.config) for name in stored.ours}
    if unknown := set(folder.extra) - (set(EXTRAS) - own):
        raise CheckpointError(f"{folder.path / EXTRA}: tensor {min(unknown)} has no place in the model")
    switches: dict[str, Any] = {EXTRAS[name]: True for name in folder.extra}
    if "token_types" in switches:
        switches["token_types"] = TOKEN_TYPES
    folder.config = replace(folder.config, **switches)
    if missing := {name for name in EXTRAS if EXTRAS[name] in switches} - set(folder.extra):
        raise CheckpointError(f"{folder.path / EXTRA}: tensor {min(missing)} is missing")
    for name, entry in folder.extra.items():
        wanted = tuple(shapes_of(folder.config)[name])
        if entry.shape != wanted:
            raise CheckpointError(f"{entry.path}: tensor {name} has shape {list(entry.shape)}, not {list(wanted)}")


def add_block_positions(folder: ModelFolder) -> None:
    """Models loaded from the folder have a table of block positions: the stored one, else zeros, which change nothing
    (in a model that is drawn from a seed: drawn, too)."""
    folder.config = replace(folder.config, block_positions=True)


def add_masked_lm(folder: ModelFolder, pairs: bool) -> None:
    """Models loaded from the folder have a table of token types and, for `pairs`, a head for next sentences: stored
    ones, else zeros (the table: it changes nothing) and drawn ones (the head)."""
    nsp = folder.config.nsp_head or pairs
    if nsp and folder.family.optional:  # the family's own head
        folder.json["architectures"] = ["BertForPreTraining"]
    folder.config = replace(folder.config, token_types=folder.config.token_types or TOKEN_TYPES, nsp_head=nsp)


def _check_config(config: GPTConfig) -> None:
    """Raise CheckpointError for sizes that no model can have, before any memory is taken."""
    if config.heads % config.kv_heads:
        raise CheckpointError(f"config.json: {config.heads} heads cannot share {config.kv_heads} key heads evenly")
    largest = config.width * max(config.vocab_size, config.mlp_width, config.heads * config.head_dim)
    largest *= max(config.layers, 1)  # more than there is, and near enough
    if largest > MAX_PARAMETERS or (config.learned_positions and config.context * config.width > MAX_PARAMETERS):
        raise CheckpointError("config.json asks for a model beyond any memory")


def _checked_entries(folder: ModelFolder) -> dict[str, Entry]:
    """The stored tensors by name, every one at its place and of its shape, none missing."""
    family, config = folder.family, folder.config
    wanted = {stored.name: stored for stored in family.tensors(config)}
    shapes = shapes_of(config)
    found: dict[str, Entry] = {}
    for path in folder.files:
        for entry in read_entries(path, STORED):  # old buffers are bytes or whole numbers
            name = family.upstream_name(entry.name)
            if name in wanted:
                _check_shape(wanted[name], entry, shapes)
            elif name.endswith(family.buffers):
                continue
            elif not (config.tied and name == family.head):  # a copy that tying makes
                raise CheckpointError(f"{path}: tensor {entry.name} has no place in the model")
            refuse_other_than_weights(entry)
            if name in found:
                raise CheckpointError(f"{path}: tensor {entry.name} is stored twice")
            found[name] = entry
    if missing := set(wanted) - set(found):
        raise CheckpointError(f"{folder.path}: tensor {min(missing)} is missing ({len(missing)} in all)")
    return found


def _check_shape(stored: Stored, entry: Entry, shapes: Mapping[str, torch.Size]) -> None:
    shape = _joined_shape(stored, shapes)
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name} has shape {list(entry.shape)}, config.json says {list(shape)}"
        )


def stored_shape(stored: Stored, config: GPTConfig) -> tuple[int, ...]:
    """The shape of a tensor in the family's files."""
    return _joined_shape(stored, shapes_of(config))


def _joined_shape(stored: Stored, every: Mapping[str, torch.Size]) -> tuple[int, ...]:
    shapes = [every[name] for name in stored.ours]
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return shape[::-1] if stored.transposed else shape


def load_model(folder: ModelFolder, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a folder, its matrices kept in `dtype`; a folder without weights is initialised from `seed`."""
    model = empty_model(folder.config, dtype)
    if folder.has_weights:
        fill_model(model, folder, seed)
    else:
        model.initialise(seed)
    return model


@torch.no_grad()
def fill_model(model: GPT, folder: ModelFolder, seed: int = 0) -> None:
    """Read a folder's weights into a model: all, or the rows that this process holds."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {tensor.name: tensor for tensor in folder.family.tensors(folder.config)}
    _fill_extra(folder, parameters, seed)
    names = {entry: name for name, entry in folder.entries.items()}
    embedding, copy_of_embedding = held(parameters["embedding.weight"]), None
    for entry, tensor in read_tensors(folder.entries.values()):
        if names[entry] in stored:
            _fill(stored[names[entry]], tensor, parameters)
        else:
            copy_of_embedding = tensor[rows_held(parameters["embedding.weight"])].to(embedding, copy=True)
    if copy_of_embedding is not None and not torch.equal(copy_of_embedding, embedding):
        raise CheckpointError(
            f"{folder.path}: {folder.family.head} is not the embedding, though config.json ties them",
            hint='"tie_word_embeddings": false in config.json uses it',
        )


def _fill_extra(folder: ModelFolder, parameters: dict[str, nn.Parameter], seed: int) -> None:
    """What an objective added, as it was stored; where it is new, zeros, but for heads, which would never learn."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(EXTRAS.keys() & parameters.keys()):
        parameters[name].zero_()
        if name in ("pooler.weight", "nsp.weight"):
            drawn = torch.empty(parameters[name].shape).normal_(std=0.02, generator=generator)
            _copy_rows(parameters[name], drawn)
    for entry, tensor in read_tensors(folder.extra.values()):
        _copy_rows(parameters[entry.name], tensor)


def load_trained(folder: ModelFolder, dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a folder, which must have weights."""
    if not folder.has_weights:
        raise CheckpointError(f"{folder.path} has no weights yet", hint="`sft train` makes them")
    return load_model(folder, dtype=dtype)


def empty_model(config: GPTConfig, dtype: torch.dtype, device: str = "cpu") -> GPT:
    """A GPT whose parameters have no values (and on the device `meta` no memory)."""
    with torch.device("meta"):
        model = GPT(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept = dtype if parameter.ndim >= 2 else torch.float32  # norms and biases: small, and norms need it
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=kept, device=device)))
    if config.tied:
        model.head.weight = model.embedding.weight
    return model


def _fill(stored: Stored, tensor: Tensor, parameters: dict[str, nn.Parameter]) -> None:
    """Copy a stored tensor into the parameters that it is made of."""
    targets = [parameters[name] for name in stored.ours]
    value = tensor.T if stored.transposed else tensor
    for target, part in zip(targets, stored.split(value, [len(p) for p in targets]), strict=True):
        _copy_rows(target, part)


def _copy_rows(target: Tensor, value: Tensor) -> None:
    """Copy the rows of a whole tensor that this process holds."""
    held(target).copy_(value[rows_held(target)])


def upstream_tensors(model: GPT, family: Family, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The model's weights under the family's names, fused and transposed as its files have them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {stored.name: _upstream(stored, parameters, dtype) for stored in family.tensors(model.config)}


def _upstream(stored: Stored, parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> Tensor:
    value = stored.join([parameters[name].detach() for name in stored.ours])
    return narrowed(stored.name, (value.T if stored.transposed else value).cpu(), dtype).contiguous()


def narrowed(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype`. Raises CheckpointError where a finite number would become infinite (float16)."""
    narrow = value.to(dtype)
    if dtype == torch.float16 and bool((narrow.isinf() & value.isfinite()).any()):
        raise CheckpointError(f"tensor {name} has numbers too large for float16", hint="bfloat16 holds them")
    return narrow


def save_model(
    model: GPT,
    folder: ModelFolder,
    output: Path,
    stops: Sequence[int] = (),
    template: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    shard_size: str = SHARD_SIZE,
    extra: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write a model folder that transformers loads; it appears under its name only when complete.

    `folder`: where the model came from; its config (unknown keys, too) and tokenizer go along. `stops`: ids that end a
    turn and were trained; they become generation_config's stop set. `template`: the chat template. `dtype`: None keeps
    that of each tensor as it was stored. `extra`: further small files, which win.
    """
    limit = bytes_of(shard_size)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {tensor.name: tensor for tensor in folder.family.tensors(model.config)}
    dtypes = {name: dtype or folder.dtype_of(name) for name in stored}
    sizes = {name: sum(parameters[p].numel() for p in t.ours) * dtypes[name].itemsize for name, t in stored.items()}
    with atomic_folder(output) as made:
        makers = {name: partial(_upstream, tensor, parameters, dtypes[name]) for name, tensor in stored.items()}
        write_shards(made, makers, sizes, limit)
        own = {name for tensor in stored.values() for name in tensor.ours}
        if added := {n: parameters[n].detach().float().cpu() for n in EXTRAS if n in parameters and n not in own}:
            write_tensors(made / EXTRA, added)
        config = {key: value for key, value in folder.json.items() if key != "torch_dtype"}  # the older spelling
        write_json(made / "config.json", config | {"dtype": str(dtype or folder.dtype).removeprefix("torch.")})
        copy_companions(folder, made)
        if template is not None:
            (made / "chat_template.jinja").write_text(template, encoding="utf-8")
        write_json(made / "generation_config.json", _generation_config(folder, stops))
        for name, content in extra.items():
            (made / name).write_bytes(content)


def copy_companions(folder: ModelFolder, made: Path) -> None:
    """The tokenizer's files and the chat template of a folder, beside new weights."""
    for name in COMPANIONS:
        if (folder.path / name).is_file():
            shutil.copyfile(folder.path / name, made / name)


def _generation_config(folder: ModelFolder, stops: Sequence[int]) -> dict[str, Any]:
    path = folder.path / "generation_config.json"
    config: dict[str, Any] = read_json(path) if path.is_file() else {}
    if stops:
        config["eos_token_id"] = stops[0] if len(stops) == 1 else list(stops)
    return config
