"""sft show: any artifact, for people. Never loads torch."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from sftcli import artifacts, console, reading, views
from sftcli.errors import UsageError
from sftcli.lines import name_of
from sftcli.reading import decode_json, read_objects
from sftcli.rowfile import RowFile, is_row_file
from sftcli.rows import Document, Row
from sftcli.text.folder import load_codec
from sftcli.text.store import recall_codec
from sftcli.text.tokenizer import Codec

Fields = dict[str, msgspec.Raw]
METRIC_LINES = 20


def show(path: str, count: int, model: str | None) -> None:
    """Print a folder's summary or the first `count` lines of a file, on stdout."""
    if Path(path).is_dir():
        _show_folder(Path(path))
        return
    codec = load_codec(artifacts.text_folder(model)) if model else None
    if is_row_file(path) and Path(path).is_file():
        rows = RowFile(path)
        views.show_record(path, [("rows", f"{len(rows):,}"), ("tokens", f"{sum(rows.lengths()):,}")])
        for row in islice(rows, count):
            views.show_row(row, _names(codec, row.tokenizer), stderr=False)
        return
    if path.endswith((".gguf", ".json")):
        raise UsageError(f"{path} is no artifact of the pipeline", hint="rows, JSON lines, or a model or run folder")
    lines = read_objects(path)
    first = next(lines, None)
    if first is None:
        console.warn(f"{name_of(path)} is empty")
        return
    shown = _kind_of(first[2])
    if shown is _show_metrics:
        _show_metrics([(where, fields) for where, _, fields in _chain(first, lines)])
        return
    for where, line, fields in islice(_chain(first, lines), count):
        shown(where, line, fields, codec)


def _chain(first: Any, rest: Iterable[Any]) -> Iterable[Any]:
    yield first
    yield from rest


def _kind_of(fields: Fields) -> Callable[..., None]:
    """Which artifact a line belongs to, by its fields."""
    if "labels" in fields and "align" in fields:
        return _show_row
    if "segments" in fields and "input_ids" in fields:
        return _show_document
    if "step" in fields and "loss" in fields:
        return _show_metrics
    return _show_any


def _names(codec: Codec | None, tokenizer: str | None) -> views.Names:
    return codec or recall_codec(tokenizer) or views.Numbers()


def _show_row(where: str, line: bytes, fields: Fields, codec: Codec | None) -> None:
    row = decode_json(line, where, Row)
    views.show_row(row, _names(codec, row.tokenizer), stderr=False)


def _show_document(where: str, line: bytes, fields: Fields, codec: Codec | None) -> None:
    document = decode_json(line, where, Document)
    views.show_document(document, _names(codec, document.tokenizer))


def _show_any(where: str, line: bytes, fields: Fields, codec: Codec | None) -> None:
    """Raw data, completions, samples: each field by name; messages by role."""
    parts: list[tuple[str, str]] = []
    for name, raw in fields.items():
        value = decode_json(bytes(raw), where)
        if name in ("messages", "conversations") and isinstance(value, list):
            parts += [_message(item) for item in value if isinstance(item, dict)]
        else:
            parts.append((name, value if isinstance(value, str) else bytes(raw).decode()))
    views.show_record(where, parts)


def _message(message: dict[str, Any]) -> tuple[str, str]:
    role = str(message.get("role") or message.get("from") or "?")
    content = message.get("content", message.get("value"))
    text = content if isinstance(content, str) else "" if content is None else msgspec.json.encode(content).decode()
    calls = message.get("tool_calls")
    marks = "" if message.get("train", True) else "  (train: false)"
    marks += f"  (weight {message['weight']})" if "weight" in message else ""
    return role, text + (msgspec.json.encode(calls).decode() if calls else "") + marks


def _show_metrics(steps: list[tuple[str, Fields]]) -> None:
    """A table of at most METRIC_LINES steps, the first and the last among them."""
    names = ("step", "epoch", "loss", "eval_loss", "accuracy", "lr", "grad_norm", "tokens_per_second")
    spaced = {round(i * (len(steps) - 1) / max(METRIC_LINES - 1, 1)) for i in range(METRIC_LINES)}
    evaluated = {i for i, (_, fields) in enumerate(steps) if "eval_loss" in fields}
    shown = sorted(spaced | (evaluated if len(evaluated) <= METRIC_LINES else set()))
    told = [name for name in names if any(name in steps[i][1] for i in shown)]
    lines = [[name.replace("tokens_per_second", "tokens/s") for name in told]]
    for where, fields in (steps[i] for i in shown):
        values = [decode_json(bytes(fields[name]), where) if name in fields else "" for name in told]
        lines.append([_number(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    screen = console.console(stderr=False)
    for number, cells in enumerate(lines):
        text = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        screen.print(console.styled([(text, "" if number else "bold")]))


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= value < 1e9 else f"{value:.4g}"
    return str(value)


def _adapter_parts(folder: Path) -> list[tuple[str, str]]:
    config = reading.read_json(folder / artifacts.ADAPTER_CONFIG)
    names = ("peft_type", "num_virtual_tokens", "r", "lora_alpha", "target_modules", "base_model_name_or_path")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return [*((name, str(config[name])) for name in names if config.get(name)), ("adapter", f"{size:,} bytes")]


def _show_folder(folder: Path) -> None:
    """A model folder or a run: what is in it."""
    run = (folder / artifacts.RUN).is_file()
    adapter = artifacts.adapter_folder(str(folder))
    if not run and not adapter and not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is neither a model folder nor a run")
    model = folder if not run else folder / artifacts.MODEL
    parts: list[tuple[str, str]] = []
    if run:
        facts = reading.read_json(folder / artifacts.RUN)
        parts += [(key, str(facts[key])) for key in ("started", "command", "sftcli", "torch", "device") if key in facts]
        parts += [("files", ", ".join(sorted(path.name for path in folder.iterdir() if path.name[0] != ".")))]
    if adapter:
        parts += _adapter_parts(adapter)
    if (model / "config.json").is_file():
        config = reading.read_json(model / "config.json")
        sizes = (
            "hidden_size",
            "n_embd",
            "num_hidden_layers",
            "n_layer",
            "vocab_size",
            "max_position_embeddings",
            "n_positions",
        )
        parts.append(("model", str(config.get("model_type"))))
        parts += [(key, str(config[key])) for key in sizes if key in config]
        weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        parts.append(("weights", f"{weights:,} bytes" if weights else "none yet"))
        if (model / "tokenizer.json").is_file():
            codec = load_codec(model)
            parts.append(("tokenizer", f"{codec.size:,} tokens, {codec.hash}"))
        if (model / "generation_config.json").is_file():
            parts.append(("stops", str(reading.read_json(model / "generation_config.json").get("eos_token_id"))))
    views.show_record(str(folder), parts)
