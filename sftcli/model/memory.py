"""What a training run will need, counted before it starts: weights, gradients, optimizer state, activations, logits."""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from sftcli.errors import OutOfMemory, is_out_of_memory
from sftcli.model.adapters import adapt
from sftcli.model.families import Family
from sftcli.model.gpt import GPT, GPTConfig
from sftcli.model.loss import CHUNK_LOGITS
from sftcli.model.optim import BUCKET
from sftcli.recipe import Muon, Train
from sftcli.rows import Row

FLOAT = 4  # bytes
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
INTERPRETER = 300 << 20  # Python, torch and its libraries, resident


def estimate(config: GPTConfig, options: Train, longest_row: int, family: Family) -> dict[str, int]:
    """Parameters, and bytes by kind at the peak of a step; `memory_bytes` is their sum."""
    with torch.device("meta"):
        model = GPT(config)
        if options.adapter:
            adapt(model, family, options.adapter, options.seed)
    parameters = dict(model.named_parameters())
    trained = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
    count, learned = sum(p.numel() for p in parameters.values()), sum(trained.values())
    frozen = 2 if options.base_dtype in ("bfloat16", "float16") else FLOAT
    blocks = sum(n for name, n in trained.items() if name.startswith("blocks."))
    moments = 2 * learned - (blocks if isinstance(options.optimizer, Muon) else 0)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = auto if options.device == "auto" else options.device
    if options.optimizer_offload and device != "cpu":
        moments = min(moments, 2 * max([BUCKET, *trained.values()]))
    of_step = options.batch_rows * longest_row if options.batch_rows else options.batch_tokens
    tokens = max(min(forward_tokens(options, device), of_step), longest_row)
    found = {
        "weights_bytes": frozen * (count - learned) + FLOAT * learned,
        "gradients_bytes": FLOAT * learned,
        "optimizer_bytes": FLOAT * moments,
        "activations_bytes": FLOAT * tokens * activations_per_token(config, options.gradient_checkpointing),
        "logits_bytes": logits_bytes(config, tokens, frozen < FLOAT and not model.head.weight.requires_grad),
    }
    return {
        "parameters": count,
        "trained_parameters": learned,
        **found,
        "memory_bytes": INTERPRETER + sum(found.values()),
    }


def forward_tokens(options: Train, device: str) -> int:
    """The most tokens of one forward. On a CPU products gain nothing beyond some hundreds of rows; the gradients of a
    full fine-tune are added up once for each forward."""
    if options.micro_batch_tokens:
        return options.micro_batch_tokens
    return 8192 if device != "cpu" else 1024 if options.adapter else 2048


def logits_bytes(config: GPTConfig, tokens: int, narrow: bool) -> int:
    """Of one chunk of so many tokens, and as much again for what is made of it. A head in 16 bits (`narrow`) is in
    float32 meanwhile."""
    chunk = min(max(CHUNK_LOGITS, 64 * config.vocab_size), tokens * config.vocab_size)
    return FLOAT * (2 * chunk + narrow * config.vocab_size * config.width)


def activations_per_token(config: GPTConfig, gradient_checkpointing: bool) -> int:
    """Numbers that backward keeps of one token: what each layer's operations save, and the final hidden state."""
    width, inner = config.width, config.mlp_width
    heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    normed = 0 if config.norm in ("rms", "rms_plus_one") else width  # made anew of x, as the MLP's product is
    joined = 2 if any(config.windows) or config.attention_cap is not None else 1  # not by flash.py: row by row, too
    attention = width + normed + heads + 2 * kv + joined * heads  # x, norm(x); q, k, v; what attention returns
    mlp = width + normed + 2 * inner  # x, norm(x); gate and up, or one of them and its activation
    if gradient_checkpointing:
        return config.layers * width + attention + mlp + 4 * width
    return config.layers * (attention + mlp) + 4 * width


def keep_freed_memory() -> None:
    """Let the allocator keep what a step frees for the next: fresh pages from the kernel cost a twentieth of a step."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library that is not glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Give back what `keep_freed_memory` keeps, so that what is free and what a forward takes can be told."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def told_if_out_of_memory(rows: Sequence[Row], limit: int, device: torch.device) -> Iterator[None]:
    """Turn a failing allocation into OutOfMemory, which tells the step (its forwards have up to `limit` tokens)."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory([len(row.input_ids) for row in rows], limit, device) from None


def out_of_memory(lengths: Sequence[int], limit: int, device: torch.device) -> OutOfMemory:
    """The error of a step of rows of these lengths, with what would help."""
    tokens = max(max(lengths), min(limit, sum(lengths)))  # of its largest forward
    fewer = f"micro_batch_tokens={tokens // 2}, " if tokens > max(lengths) else ""
    return OutOfMemory(
        f"out of memory: {len(lengths):,} row(s), forwards of up to {tokens:,} tokens, the longest row "
        f"{max(lengths):,}; peak {peak_bytes(device):,} bytes",
        hint=f"--set {fewer}gradient_checkpointing=true, dtype=bfloat16, or shorter rows (sft mask --max-length)",
    )


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use at once so far: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # no Unix
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
