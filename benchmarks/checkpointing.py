"""What a safe checkpoint costs: python benchmarks/checkpointing.py [--layers 30] [--runs 5]

A full fine-tune of SmolLM2-135M's shape (random weights) saves weights and AdamW's state: `sft` blocks training for its
whole save (checks, sums, fsync, publishing, rotation); `plain` is the safetensors library writing the same tensors into
two files and nothing else. In turn, in one process; what counts is the ratio of medians. Prints one JSON line.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from sftcli import manifest
from sftcli.model import optim, resume
from sftcli.model.families import family_of
from sftcli.model.gpt import GPT
from sftcli.recipe import AdamW

SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def trained_model(layers: int) -> tuple[GPT, list[torch.optim.Optimizer]]:
    """A model of random weights whose optimizer has taken a step."""
    config = SHAPE | {"num_hidden_layers": layers}
    model = GPT(family_of(config).read_config(config))
    model.initialise(0)
    optimizers = optim.build(model, AdamW(), 1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optim.step(optimizers)
    model.zero_grad(set_to_none=True)
    return model, optimizers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to write (the disk that is measured)")
    given = parser.parse_args()
    model, optimizers = trained_model(given.layers)
    tensors = resume.tensors_of(model, optimizers)
    size = sum(value.nbytes for values in tensors.values() for value in values.values())
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        run, plain = Path(folder, "run"), Path(folder, "plain")
        times: dict[str, list[float]] = {"sft": [], "plain": []}
        for number in range(given.runs + 1):
            step = number + 1
            ours = timed(lambda: resume.save(run, "id", step, tensors, {"settings": {}}, keep=1))  # noqa: B023
            plain.mkdir()
            theirs = timed(lambda: [safetensors.torch.save_file(dict(v), plain / n) for n, v in tensors.items()])
            shutil.rmtree(plain)
            if number:  # the first is a warm-up
                times["sft"].append(ours)
                times["plain"].append(theirs)
        verified = timed(lambda: manifest.damage_of(manifest.checkpoints(run)[-1]))
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(
        json.dumps(
            {
                "bytes": size,
                "seconds": {name: round(value, 2) for name, value in medians.items()},
                "ratio": round(medians["sft"] / medians["plain"], 2),
                "spread": [round(a / b, 2) for a, b in zip(times["sft"], times["plain"], strict=True)],
                "verify_seconds": round(verified, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
