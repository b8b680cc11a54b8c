"""Prefixes in PEFT's files: one tensor, `prompt_embeddings`, and the sizes that it was made for.

PREFIX_TUNING  (P, 2 L G D)     num_attention_heads: the key heads G; token_dim: their whole width G D
PROMPT_TUNING  (P, C)           num_attention_heads: all heads; token_dim: C
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sftcli.errors import CheckpointError
from sftcli.model.adapters.prefix import PrefixTable, PromptTable, no_prompt, width_of
from sftcli.model.checkpoint import ModelFolder
from sftcli.model.gpt import GPT, GPTConfig
from sftcli.recipe import Prefix, Prompt

KINDS: dict[str, type[Prefix] | type[Prompt]] = {"PREFIX_TUNING": Prefix, "PROMPT_TUNING": Prompt}
TENSOR = "prompt_embeddings"
# how training began or ran (its MLP is not in the file), and where things came from
HARMLESS = {"peft_type", "task_type", "num_virtual_tokens", "prefix_projection", "encoder_hidden_size", "init_weights"}
HARMLESS |= {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
HARMLESS |= {"inference_mode", "auto_mapping", "base_model_name_or_path", "peft_version", "revision"}


@dataclass(frozen=True)
class PrefixAdapter:
    """A folder with a prefix, read and found to fit a model; its tensor is still on disk."""

    path: Path
    options: Prefix | Prompt


def read_prefix(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: Path, folder: ModelFolder
) -> PrefixAdapter:
    """Check a config and the shapes of the tensors against a model. Raises CheckpointError by name."""
    gpt, kind = folder.config, KINDS[config["peft_type"]]
    sizes, width = _sizes(gpt, kind), gpt.width if kind is Prompt else width_of(gpt)
    if kind is Prompt and (reason := no_prompt(gpt)):
        raise CheckpointError(f"{place}: no virtual tokens for {folder.path}: {reason}")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise CheckpointError(f"{place}: task_type {config['task_type']!r} is not supported", hint="only CAUSAL_LM")
    for key, value in config.items():
        if value and key not in HARMLESS | set(sizes):
            raise CheckpointError(f"{place}: {key} = {value!r} is not supported")
        if value is not None and key in sizes and value != sizes[key]:
            raise CheckpointError(f"{place}: {key} is {value!r}; {folder.path} needs {sizes[key]}")
    if other := sorted(set(shapes) - {TENSOR}):
        raise CheckpointError(f"{place}: tensor {other[0]} is not supported")
    shape = shapes.get(TENSOR)
    if not shape:
        raise CheckpointError(f"{place}: tensor {TENSOR} is missing")
    length = config.get("num_virtual_tokens") or shape[0]
    if shape != (length, width) or not length:
        needed = [length, width]
        raise CheckpointError(f"{place}: {TENSOR} is of shape {list(shape)}; its config and the model need {needed}")
    if length >= gpt.context:
        raise CheckpointError(f"{place}: a prefix of {length} positions leaves no room in a context of {gpt.context}")
    return PrefixAdapter(place, kind(length=length))


def _sizes(config: GPTConfig, kind: type[Prefix] | type[Prompt]) -> dict[str, int]:
    heads, width = config.kv_heads, config.kv_heads * config.head_dim
    if kind is Prompt:
        heads, width = config.heads, config.width
    return {
        "num_layers": config.layers,
        "num_attention_heads": heads,
        "token_dim": width,
        "num_transformer_submodules": 1,
    }


def prefix_of(model: GPT, adapter: PrefixAdapter, tensors: Mapping[str, Tensor]) -> PrefixTable:
    kind = PromptTable if isinstance(adapter.options, Prompt) else PrefixTable
    return kind(model.config, tensors[TENSOR].float())


@torch.no_grad()
def prefix_tensors(model: GPT) -> dict[str, Tensor]:
    """What is kept of a trained prefix, under PEFT's key: an MLP stays behind."""
    assert isinstance(model.prefix, PrefixTable)
    return {TENSOR: model.prefix.flat().detach().cpu().contiguous()}


def prefix_config(config: GPTConfig, options: Prefix | Prompt, base: str) -> dict[str, Any]:
    common = {
        "peft_type": next(name for name, kind in KINDS.items() if isinstance(options, kind)),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": options.length,
        **_sizes(config, type(options)),
    }
    if isinstance(options, Prompt):
        return common | {"prompt_tuning_init": "RANDOM"}
    return common | {"encoder_hidden_size": options.mlp or config.width, "prefix_projection": False}
