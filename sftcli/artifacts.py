"""The names in a run folder, which folder `-m` means, and fingerprints of contents."""

import hashlib
from pathlib import Path

from sftcli.errors import CheckpointError, UsageError
from sftcli.hub import local
from sftcli.reading import read_json

CHUNK = 1 << 20

TOKENS, ROWS, RECIPE, RUN = "tokens.jsonl", "rows.safetensors", "recipe.yaml", "run.json"
BASE, MODEL, ADAPTER, CHECKPOINTS = "base", "model", "adapter", "checkpoints"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
METRICS, SAMPLES, COMPLETIONS, EVALUATION = "metrics.jsonl", "samples.jsonl", "completions.jsonl", "evaluation.json"


def fingerprint(*parts: bytes | str) -> str:
    """12 hex digits that name a content: sha256 of the parts, each with its length before it."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:12]


def file_fingerprint(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()[:12]


def model_folder(path: str) -> Path:
    """The model folder that `-m` names: itself, a run's model/, or a run's base/ while it has no model yet."""
    base, adapter = model_and_adapter(path)
    if adapter:
        raise UsageError(
            f"{path} is an adapter, which needs its base beside it",
            hint=f"`sft merge {path} -o NEW` makes one model of both",
        )
    return base


def model_and_adapter(path: str) -> tuple[Path, Path | None]:
    """The model folder that `-m` names and the adapter that belongs on it: None but for an adapter run's."""
    path = local(path)
    for folder in (Path(path), Path(path, MODEL)):
        if (folder / "config.json").is_file():
            return folder, None
    if adapter := adapter_folder(path):
        return _base_of(adapter), adapter
    if Path(path, BASE, "config.json").is_file():
        return Path(path, BASE), None
    if path.endswith(".gguf") and Path(path).is_file():
        raise CheckpointError(f"{path} is no model folder yet", hint=f"`sft import {path} -o FOLDER` makes one of it")
    if not Path(path).exists():
        raise CheckpointError(
            f"no model at {path}", hint="a folder, a run, or org/name of the hub; `sft init DATA -o base` makes one"
        )
    raise CheckpointError(f"{path} is neither a model folder (no config.json) nor a run")


def text_folder(path: str) -> Path:
    """Where the tokenizer and template of `-m` lie: in its adapter, if that brings them, else in the model folder."""
    adapter = adapter_folder(path)
    whole = any((folder / "config.json").is_file() for folder in (Path(path), Path(path, MODEL)))
    if adapter and not whole and (adapter / "tokenizer.json").is_file():
        return adapter
    return model_and_adapter(path)[0]


def adapter_folder(path: str) -> Path | None:
    """The PEFT folder that a path names: itself, or a run's adapter/."""
    path = local(path)
    return next((f for f in (Path(path), Path(path, ADAPTER)) if (f / ADAPTER_CONFIG).is_file()), None)


def _base_of(adapter: Path) -> Path:
    """The model folder that an adapter was trained on: where its run says it was, else where its own file says."""
    run = adapter.parent / RUN
    recorded = read_json(run).get("base") if run.is_file() else None
    named = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    for place in (recorded, named):
        if isinstance(place, str) and place and "\0" not in place:
            place = local(place)
            for folder in (Path(place), Path(place, MODEL), Path(place, BASE)):
                if (folder / "config.json").is_file():
                    return folder
    raise CheckpointError(
        f"{adapter}: its base model {named or recorded} is not here", hint=f"-m BASE --adapter {adapter}"
    )
