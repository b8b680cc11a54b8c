"""Adapters in PEFT's files, in and out: adapter_config.json and adapter_model.safetensors.

Keys are `base_model.model.<transformers' module path>.lora_A.weight` and the like, shapes those of the family's files:
a fused layer has one A and one B. The keys of a file, not the patterns of its config, say which layers it adapts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from sftcli import recipe
from sftcli.artifacts import ADAPTER_CONFIG, RUN, adapter_folder, file_fingerprint, fingerprint, model_and_adapter
from sftcli.errors import CheckpointError
from sftcli.model.adapters.lora import (
    HEAD,
    Site,
    adapter_name,
    attach,
    leaves,
    linear_sites,
    rank_and_scale,
    updates_of,
)
from sftcli.model.adapters.prefix import attach as put_before
from sftcli.model.adapters.prefix_files import (
    KINDS,
    PrefixAdapter,
    prefix_config,
    prefix_of,
    prefix_tensors,
    read_prefix,
)
from sftcli.model.checkpoint import ModelFolder, copy_companions, open_folder, stored_shape
from sftcli.model.families import Stored, shapes_of
from sftcli.model.gpt import GPT, GPTConfig
from sftcli.model.tensorfile import read_entries, write_tensors
from sftcli.reading import read_json
from sftcli.recipe import Lora
from sftcli.writing import atomic_folder, write_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
# what says which layers are adapted (the keys say it better), how training began or ran, and where things came from
TOLD_BY_KEYS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"}
HARMLESS = TOLD_BY_KEYS | {"auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode"}
HARMLESS |= {"loftq_config", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision"}
HARMLESS |= {"runtime_config", "modules_to_save"}
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # other kinds change the base's weights, too


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter's folder, read and found to fit a model; its tensors are still on disk."""

    path: Path
    options: Lora
    sites: list[Site]
    saved: dict[str, Stored | None]  # key -> the base's tensor that it replaces; None: the head of a tied model


Adapter = LoraAdapter | PrefixAdapter


# ---- in


def open_adapter(path: str, folder: ModelFolder) -> Adapter:
    """Read an adapter's config and the shapes of its tensors. Raises CheckpointError where the model has other ones."""
    place = adapter_folder(path)
    if place is None:
        raise CheckpointError(f"{path} is no adapter: no {ADAPTER_CONFIG} in it")
    config = read_json(place / ADAPTER_CONFIG)
    if config.get("peft_type") in tuple(KINDS):  # which may be anything that JSON can say
        return read_prefix(config, _shapes(place), place, folder)
    options = read_config(config, place / ADAPTER_CONFIG)
    shapes = _shapes(place)
    sites = {site.path: site for site in linear_sites(folder.family, folder.config)}
    parts, saved = _sorted_keys(shapes, place)
    for layer, found in parts.items():
        if layer not in sites:
            names = ", ".join(leaves(list(sites.values())))
            raise CheckpointError(f"{place}: {layer} is no linear layer of {folder.path}, which has {names}")
        _check_site(place, sites[layer], options, found, folder.config)
    replaced = {key: _replaced(place, name, shapes[key], folder) for key, name in saved.items()}
    return LoraAdapter(place, options, [sites[name] for name in parts], replaced)


def _shapes(place: Path) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.shape for entry in read_entries(place / ADAPTER_WEIGHTS)}


def open_model(path: str) -> tuple[ModelFolder, Adapter | None]:
    """What `-m` names: a model folder, and the adapter that belongs on it if it is an adapter run."""
    base, own = model_and_adapter(path)
    folder = open_folder(base)
    return folder, open_adapter(str(own), folder) if own else None


def trained_on_another(adapter: Adapter, folder: ModelFolder) -> bool:
    """Whether the adapter's run tells that its base was not this one."""
    run = adapter.path.parent / RUN
    recorded = read_json(run).get("model") if run.is_file() else None
    return recorded is not None and recorded != identity(folder)


def read_config(config: dict[str, Any], path: Path) -> Lora:
    """PEFT's options as ours. Raises CheckpointError naming what is not supported: nothing is ignored."""
    known = {
        "r": "rank",
        "lora_alpha": "alpha",
        "bias": "bias",
        "use_rslora": "rslora",
        "use_dora": "dora",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    }
    for key, accepted in (("peft_type", ("LORA",)), ("task_type", ("CAUSAL_LM", None))):
        if config.get(key) not in accepted:
            hint = f"only {accepted[0]}" + (f", {', '.join(KINDS)}" if key == "peft_type" else "")
            raise CheckpointError(f"{path}: {key} {config.get(key)!r} is not supported", hint=hint)
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base's weights, too",
            hint="convert it with PEFT (path_initial_model_for_weight_conversion)",
        )
    for key, value in config.items():
        if value and key not in HARMLESS | set(known) | {"peft_type", "task_type", "init_lora_weights"}:
            raise CheckpointError(f"{path}: {key} = {value!r} is not supported")
    values = {ours: config[theirs] for theirs, ours in known.items() if config.get(theirs) is not None}
    try:
        return Lora(**{"rank": 8, "alpha": 8} | values)  # PEFT's defaults
    except ValidationError as error:
        first = error.errors()[0]
        theirs = {ours: theirs for theirs, ours in known.items()}
        name = theirs.get(str(first["loc"][0]) if first["loc"] else "", "")
        raise CheckpointError(f"{path}: {name}: {first['msg']}, got {first['input']!r}") from None


def _sorted_keys(
    keys: Mapping[str, tuple[int, ...]], place: Path
) -> tuple[dict[str, dict[str, tuple[int, ...]]], dict[str, str]]:
    """({layer: {part: shape}}, {key: name of a tensor of the base}). Raises CheckpointError for any other key."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    saved: dict[str, str] = {}
    for key, shape in keys.items():
        name = key.removeprefix(PREFIX)
        part = next((part for part in PARTS if name.endswith(f".{part}")), None)
        if name == key or (part is None and ".lora_" in name):
            raise CheckpointError(f"{place}: tensor {key} is not supported")
        if part:
            parts.setdefault(name.removesuffix(f".{part}"), {})[part] = shape
        else:
            saved[key] = name.replace(".base_layer.", ".")
    if not keys:
        raise CheckpointError(f"{place}: {ADAPTER_WEIGHTS} holds no tensor")
    return parts, saved


def _check_site(
    place: Path, site: Site, options: Lora, found: Mapping[str, tuple[int, ...]], config: GPTConfig
) -> None:
    """Raise CheckpointError unless a layer's tensors are all there, in the shapes that config and model say."""
    rank, _ = rank_and_scale(options, site.path)
    shapes = [shapes_of(config)[name] for name in site.stored.ours]
    rows, width = sum(shape[0] for shape in shapes), shapes[0][1]
    expected: dict[str, tuple[int, ...]] = dict(zip(PARTS, ((rank, width), (rows, rank), (rows,)), strict=True))
    if not options.dora:
        del expected[PARTS[2]]
    for part in PARTS:
        given, wanted = found.get(part), expected.get(part)
        if given != wanted:
            told = "missing" if given is None else f"of shape {list(given)}"
            needed = f"its r and the model need {list(wanted)}" if wanted else "use_dora is off"
            raise CheckpointError(f"{place}: {site.path}.{part} is {told}; {needed}")


def _replaced(place: Path, name: str, shape: tuple[int, ...], folder: ModelFolder) -> Stored | None:
    """The base's tensor that a fully trained one replaces; None for the head of a tied model."""
    stored = {adapter_name(tensor): tensor for tensor in folder.family.tensors(folder.config)}
    tied_head = folder.config.tied and name == f"{HEAD}.weight"
    if name not in stored and not tied_head:
        raise CheckpointError(f"{place}: tensor {name} has no place in the model")
    tensor = None if tied_head else stored[name]
    expected = stored_shape(tensor, folder.config) if tensor else shapes_of(folder.config)["embedding.weight"]
    if shape != tuple(expected):
        raise CheckpointError(f"{place}: {name} is of shape {list(shape)}, the model's of {list(expected)}")
    return tensor


@contextmanager
def applied(model: GPT, adapter: Adapter | None) -> Iterator[None]:
    """The model with an adapter on it; as it was before, afterwards."""
    undo = apply(model, adapter) if adapter else None
    try:
        yield
    finally:
        if undo:
            undo()


@torch.no_grad()
def apply(model: GPT, adapter: Adapter) -> Callable[[], None]:
    """Put an adapter onto the model; returns what takes it off again."""
    try:
        tensors = safetensors.torch.load_file(adapter.path / ADAPTER_WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {adapter.path / ADAPTER_WEIGHTS}: {error}") from None
    if isinstance(adapter, PrefixAdapter):
        return put_before(model, prefix_of(model, adapter, tensors))
    detach = attach(model, adapter.options, adapter.sites)
    for site in adapter.sites:
        layers = updates_of(model, site)
        rows = [layer.out_features for layer in layers]
        a, b, lengths = (f"{PREFIX}{site.path}.{part}" for part in PARTS)
        layers[0].lora_A.copy_(tensors[a])
        for layer, part in zip(layers, site.stored.split(tensors[b], rows), strict=True):
            layer.lora_B.copy_(part)
        if adapter.options.dora:
            for layer, part in zip(layers, site.stored.split(tensors[lengths], rows), strict=True):
                assert layer.magnitude is not None
                layer.magnitude.copy_(part)
    restore = _replace(model, adapter, tensors)

    def undo() -> None:
        restore()
        detach()

    return undo


def _replace(model: GPT, adapter: LoraAdapter, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """Put fully trained tensors in the places of the base's; returns what puts those back."""
    config, head = model.config, model.head.weight
    if config.tied and _parts_embedding_and_head(adapter, tensors):
        model.head.weight = nn.Parameter(head.detach().clone())
        model.config = replace(config, tied=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = []
    for key, stored in adapter.saved.items():
        targets = [parameters[name] for name in (stored.ours if stored else ("head.weight",))]
        value = tensors[key].T if stored and stored.transposed else tensors[key]
        parts = stored.split(value, [len(target) for target in targets]) if stored else [value]
        for target, part in zip(targets, parts, strict=True):
            before.append((target, target.data))
            target.data = part.to(target).clone()

    def restore() -> None:
        for target, data in reversed(before):
            target.data = data
        model.head.weight, model.config = head, config

    return restore


def _parts_embedding_and_head(adapter: LoraAdapter, tensors: Mapping[str, Tensor]) -> bool:
    """Whether what was trained tells a tied embedding and head apart: PEFT trains two copies, or only one of them."""
    head = [tensors[key] for key, stored in adapter.saved.items() if stored is None]
    embedding = [tensors[k] for k, stored in adapter.saved.items() if stored and stored.ours == ("embedding.weight",)]
    if head and embedding:
        return not torch.equal(head[0], embedding[0])
    return bool(head or embedding)


# ---- out


def save_adapter(
    model: GPT, folder: ModelFolder, output: Path, options: recipe.Adapter, base: str, extra: Mapping[str, bytes]
) -> None:
    """Write PEFT's files and the base's tokenizer beside them; `extra`: further files, which win."""
    if isinstance(options, Lora):
        tensors, config = adapter_tensors(model, folder), peft_config(model, folder, options, base)
    else:
        tensors, config = prefix_tensors(model), prefix_config(folder.config, options, base)
    with atomic_folder(output) as made:
        write_tensors(made / ADAPTER_WEIGHTS, tensors)
        write_json(made / ADAPTER_CONFIG, config)
        copy_companions(folder, made)
        for name, content in extra.items():
            (made / name).write_bytes(content)


def adapter_tensors(model: GPT, folder: ModelFolder) -> dict[str, Tensor]:
    """What was trained, under PEFT's keys."""
    found: dict[str, Tensor] = {}
    sites = _adapted(model, folder)
    for site in sites:
        layers = updates_of(model, site)
        lengths = [layer.magnitude for layer in layers if layer.magnitude is not None]
        values = [layers[0].lora_A, site.stored.join([layer.lora_B for layer in layers])]
        values += [site.stored.join(lengths)] if lengths else []
        found |= {f"{site.path}.{part}": value for part, value in zip(PARTS, values, strict=False)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    biases = {f"{site.path}.bias": f"{site.path}.base_layer.bias" for site in sites}
    for stored in folder.family.tensors(model.config):
        parts = [parameters[name] for name in stored.ours]
        if parts[0].requires_grad:
            value = stored.join(parts)
            name = adapter_name(stored)
            found[biases.get(name, name)] = value.T if stored.transposed else value
    if model.config.tied and model.head.weight.requires_grad:
        found[f"{HEAD}.weight"] = model.head.weight.clone()  # transformers' head is a module of its own
    return {PREFIX + name: value.detach().contiguous().cpu() for name, value in found.items()}


def _adapted(model: GPT, folder: ModelFolder) -> list[Site]:
    return [site for site in linear_sites(folder.family, model.config) if updates_of(model, site)]


def peft_config(model: GPT, folder: ModelFolder, options: Lora, base: str) -> dict[str, Any]:
    sites = _adapted(model, folder)
    saved = list(options.modules_to_save)
    tied = model.config.tied and model.head.weight.requires_grad
    if tied:
        embedding = next(s.name for s in folder.family.tensors(model.config) if s.ours == ("embedding.weight",))
        saved = list(dict.fromkeys([*saved, embedding.split(".")[-2], HEAD]))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": options.rank,
        "lora_alpha": int(options.alpha) if options.alpha == int(options.alpha) else options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": leaves(sites) if options.targets == "all-linear" else options.targets,
        "layers_to_transform": options.layers,
        "rank_pattern": options.rank_pattern,
        "alpha_pattern": options.alpha_pattern,
        "bias": options.bias,
        "fan_in_fan_out": any(site.stored.transposed for site in sites),
        "modules_to_save": saved or None,
        "ensure_weight_tying": tied,
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "init_lora_weights": True,
    }


def identity(folder: ModelFolder) -> str:
    """A fingerprint of a model's config and weights."""
    extra = sorted({entry.path for entry in folder.extra.values()})
    return fingerprint(*(file_fingerprint(path) for path in (folder.path / "config.json", *folder.files, *extra)))
