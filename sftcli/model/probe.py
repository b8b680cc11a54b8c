"""Whether the steps of a run fit in memory, tried before the first: its longest forwards, whose gradients are dropped.

Where a forward does not fit, micro_batch_tokens is halved; a step stays what it was. A CPU has no error to wait for
(the kernel kills), so there the question is what is free: well above a count of what is needed, nothing is tried;
below it, it does not fit; in between the growth of the process decides.
"""

import gc
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.optim import Optimizer

from sftcli.errors import OutOfMemory
from sftcli.model.batches import forwards
from sftcli.model.gpt import GPT
from sftcli.model.memory import (
    FLOAT,
    activations_per_token,
    forward_tokens,
    logits_bytes,
    out_of_memory,
    return_freed_memory,
    told_if_out_of_memory,
)
from sftcli.model.optim import state_to_come
from sftcli.model.training import Engine, Plan, accumulate
from sftcli.recipe import Train
from sftcli.rows import Row

AMPLE = 1.5  # free memory, as a multiple of the count of what is needed, from which nothing is tried
CGROUPS = (  # limit, account, and the account's line of what cannot be given back
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat", "anon"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.stat", "rss"),
)


def fitting_tokens(
    model: GPT,
    optimizers: list[Optimizer],
    row: Callable[[int], Row],
    plan: Plan,
    options: Train,
    engine: Engine,
    start: int = 0,
) -> int:
    """The micro_batch_tokens that fit: those of the options, or half of them, and so on. Raises OutOfMemory."""
    limit = forward_tokens(options, engine.device.type)
    moments = state_to_come(optimizers)
    if start == plan.steps or (engine.device.type == "cpu" and _ample(model, plan, options, limit, moments)):
        return limit
    while True:
        for part in longest_forwards(plan, limit, start):
            lengths = [plan.lengths[i] for i in part]
            if not _fits(model, [row(i) for i in part], options, engine, moments):
                break
        else:
            return limit
        if len(part) == 1:
            raise out_of_memory(lengths, limit, engine.device)
        limit = min(limit, sum(lengths)) // 2


def longest_forwards(plan: Plan, limit: int, start: int) -> list[list[int]]:
    """The rows of the forward with the most tokens after step `start`, and the longest row, if it is not in that."""
    most: list[int] = []
    longest: list[int] = []

    def tokens(rows: list[int]) -> int:
        return sum(plan.lengths[i] for i in rows)

    for rows, _, _ in plan.from_step(start):
        for part in forwards([plan.lengths[i] for i in rows], limit):
            found = [rows[i] for i in part]  # in order of length
            most = max(most, found, key=tokens)
            longest = max(longest, found[-1:], key=tokens)
    return [most, longest] if tokens(longest) > tokens(most[-1:]) else [most]


def _ample(model: GPT, plan: Plan, options: Train, limit: int, moments: int) -> bool:
    """Whether a CPU has far more memory than any forward needs: no look at the plan, which may be long."""
    tokens = max(min(limit, sum(plan.lengths)), max(plan.lengths))
    return available() > AMPLE * (moments + needed_bytes(model, tokens, options))


def _fits(model: GPT, rows: list[Row], options: Train, engine: Engine, moments: int) -> bool:
    """Try one forward and backward with room left for the optimizer's moments; nothing stays of it."""
    cpu = engine.device.type == "cpu"
    tokens = sum(len(row.input_ids) for row in rows)
    if cpu:
        return_freed_memory()
        free, needed = available(), moments + needed_bytes(model, tokens, options)
        if free > AMPLE * needed:
            return True
        if free < needed:
            return False
    before = _resident(from_here=True)
    try:
        with torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []):
            _once(model, rows, tokens, options, engine, 0 if cpu else moments)
    except OutOfMemory:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()  # an error holds on to what its frames held
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
    return not cpu or _resident() - before + moments < free


def _once(model: GPT, rows: list[Row], tokens: int, options: Train, engine: Engine, moments: int) -> None:
    model.set_dropout(options.dropout)
    model.train()
    with told_if_out_of_memory(rows, tokens, engine.device):
        reserved = torch.empty(moments, dtype=torch.uint8, device=engine.device)
        accumulate(model, rows, tokens, engine, options.loss)
        del reserved


def needed_bytes(model: GPT, tokens: int, options: Train) -> int:
    """What a forward and backward of so many tokens takes, counted (memory.py): gradients, activations, logits."""
    activations = tokens * activations_per_token(model.config, options.gradient_checkpointing)
    narrow = model.head.weight.element_size() < FLOAT
    return FLOAT * (_trained(model) + activations) + logits_bytes(model.config, tokens, narrow)


def _trained(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- what a CPU has (Linux says it in files; elsewhere it is taken to be enough)


def available() -> float:
    """Bytes that this process can still take: its share of the machine, and of the limit of its container."""
    free = _figure("/proc/meminfo", "MemAvailable:", 1 << 10)
    for limit, account, line in CGROUPS:
        with suppress(OSError, ValueError):  # no such file, or `max`
            free = min(free, int(Path(limit).read_text()) - _figure(account, line, 1, 0))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the run's processes on this machine


def _resident(from_here: bool = False) -> float:
    """Bytes of this process in memory: now, and from now on their peak is measured; or the peak since then."""
    if from_here:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    return _figure("/proc/self/status", "VmHWM:", 1 << 10, 0)


def _figure(path: str, name: str, unit: int, otherwise: float = math.inf) -> float:
    """The number behind `name` in a file of lines `name number`."""
    with suppress(OSError):
        if found := re.search(rf"^{name}\s+(\d+)", Path(path).read_text(), re.MULTILINE):
            return int(found[1]) * unit
    return otherwise
