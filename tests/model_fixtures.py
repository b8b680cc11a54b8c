"""Tiny models with weights that matter, and rows from lists of ids, for the tests of the model side."""

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sftcli.artifacts import fingerprint
from sftcli.model.attention import Group, RowAttention
from sftcli.model.checkpoint import load_model, open_folder, upstream_tensors
from sftcli.model.gpt import GPT
from sftcli.model.tensorfile import WEIGHTS, write_tensors
from sftcli.model.training import Engine
from sftcli.recipe import Init
from sftcli.rowfile import write_rows
from sftcli.rows import FORMAT, Row
from sftcli.stages.init import init
from sftcli.writing import json_line

torch.set_num_threads(1)  # models this small only lose by more

PRESETS = ("llama", "gpt2")
CPU = Engine(torch.device("cpu"), torch.float32)
TEXTS = ["How many rivers are there?", "There are 12 rivers.", "Name a river.", "The Danube, 2850 km."]
VOCABULARY = 300  # of the tiny tokenizer: 256 bytes, control tokens, some merges


def empty_folder(path: Path, preset: str, **sizes: Any) -> Path:
    """A model folder without weights: 3 layers of width 32, llama with fewer key heads than heads."""
    data = path.with_name(f"{path.name}-data.jsonl")
    data.write_text("".join(json.dumps({"prompt": t, "completion": t}) + "\n" for t in TEXTS))
    shape = {"layers": 3, "width": 32, "heads": 4, "mlp_width": 48, "context": 64}
    shape |= {"kv_heads": 2} if preset == "llama" else {}
    init(Init(data=[str(data)], preset=preset, vocab_size=VOCABULARY, **(shape | sizes)), str(path))
    return path


def model_folder(path: Path, preset: str, seed: int = 1, **sizes: Any) -> Path:
    """A model folder with random weights."""
    path.mkdir(parents=True)
    for name, content in _files(preset, seed, tuple(sizes.items())).items():
        (path / name).write_bytes(content)
    return path


@cache
def _files(preset: str, seed: int, sizes: tuple[tuple[str, Any], ...]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as temporary:
        path = empty_folder(Path(temporary, "model"), preset, **dict(sizes))
        save_weights(path, randomised(load_model(open_folder(path)), seed))
        return {file.name: file.read_bytes() for file in path.iterdir()}


def save_weights(path: Path, model: GPT) -> None:
    write_tensors(path / WEIGHTS, upstream_tensors(model, open_folder(path).family))


def model_of(path: Path) -> GPT:
    return load_model(open_folder(path))


def make_model(path: Path, preset: str, **sizes: Any) -> GPT:
    """A tiny model with random weights, through its folder."""
    return model_of(model_folder(path, preset, **sizes))


@torch.no_grad()
def randomised(model: GPT, seed: int = 1) -> GPT:
    """Weights so large that attention matters; norms far from 1, biases far from 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(0.3 * noise)
        elif name.endswith("norm.weight"):
            parameter.copy_(1 + 0.4 * noise)
        else:
            parameter.copy_(0.3 * noise)
    return model


def random_ids(count: int, seed: int, vocabulary: int = VOCABULARY) -> list[int]:
    """Ids of no control token."""
    return torch.randint(10, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_row(ids: Sequence[int], labels: Sequence[int] | None = None, id: str = "r", **columns: Any) -> Row:
    """A row; by default every token is trained."""
    columns = {"align": "next", "objective": "causal", "tokenizer": None, "template": None, "format": FORMAT} | columns
    return Row(id=id, input_ids=list(ids), labels=list(ids if labels is None else labels), **columns)


def make_rows(lengths: Sequence[int], prompt: int = 1, seed: int = 0, **columns: Any) -> list[Row]:
    """Rows of random ids r0, r1, ...; the first `prompt` tokens of each are not trained."""
    rows = []
    for i, length in enumerate(lengths):
        ids = random_ids(length, seed * 1000 + i)
        untrained = min(prompt, length)
        rows.append(make_row(ids, [-100] * untrained + ids[untrained:], f"r{i}", **columns))
    return rows


def tokenizer_hash(folder: Path) -> str:
    return fingerprint((folder / "tokenizer.json").read_bytes())


END = 2  # <|im_end|> of the tiny tokenizer


def write_turns(base: Path, path: Path, lengths: Sequence[int]) -> str:
    """A file of rows that end with a trained end-of-turn token, for the model folder `base`."""
    hashed = tokenizer_hash(base)
    rows = make_rows(lengths, prompt=3, seed=1)
    ended = (make_row([*r.input_ids, END], [*r.labels, END], r.id, tokenizer=hashed) for r in rows)
    write_rows(path, ended)
    return str(path)


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    timed = ("seconds", "tokens_per_second", "tflop_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_jsonl(Path(run, "metrics.jsonl"))]


def steps_written(run: str | Path) -> int:
    """Steps in metrics.jsonl now. A run that begins anew without a checkpoint takes the file away, at any moment."""
    try:
        return Path(run, "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def write_jsonl(path: Path, lines: Sequence[Any]) -> str:
    path.write_bytes(b"".join(json_line(line) for line in lines))
    return str(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def row_logits(model: GPT, ids: Sequence[int]) -> torch.Tensor:
    """Logits (T, V) of one row by itself: plain causal, no padding, no cache."""
    model.eval()
    with torch.no_grad():
        tokens = torch.tensor(list(ids))
        return model.logits(model.hidden(tokens, torch.arange(len(ids)), RowAttention([Group(1, len(ids))])))


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal up to `tolerance` of their norm, all together and (looser, as some are 0 but for rounding) one by one."""
    assert set(found) == set(expected)
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    errors = {name: float((found[name] - expected[name]).norm()) for name in found}
    assert sum(e * e for e in errors.values()) ** 0.5 <= tolerance * float(whole)
    for name, error in errors.items():
        assert error <= 3 * tolerance * float(expected[name].norm().clamp(min=1e-2 * whole)), name
