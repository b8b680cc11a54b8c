"""What a training run will need, counted before it starts: weights, gradients, optimizer state, activations, logits."""

import torch

from sftcli.model.adapters import adapt
from sftcli.model.families import Family
from sftcli.model.gpt import GPT, GPTConfig
from sftcli.model.loss import CHUNK_LOGITS
from sftcli.recipe import Muon, Train

FLOAT = 4  # bytes
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
    frozen = FLOAT if options.base_dtype == "float32" else 2
    blocks = sum(n for name, n in trained.items() if name.startswith("blocks."))
    moments = 2 * learned - (blocks if isinstance(options.optimizer, Muon) else 0)
    tokens = max(min(options.micro_batch_tokens, options.batch_tokens), longest_row)
    chunk = 4 * FLOAT * max(CHUNK_LOGITS, 64 * config.vocab_size)  # logits, probabilities and two temporaries
    found = {
        "weights_bytes": frozen * (count - learned) + FLOAT * learned,
        "gradients_bytes": FLOAT * learned,
        "optimizer_bytes": FLOAT * moments,
        "activations_bytes": FLOAT * tokens * activations_per_token(config, options.gradient_checkpointing),
        "logits_bytes": chunk,
    }
    return {
        "parameters": count,
        "trained_parameters": learned,
        **found,
        "memory_bytes": INTERPRETER + sum(found.values()),
    }


def activations_per_token(config: GPTConfig, gradient_checkpointing: bool) -> int:
    """Numbers that backward keeps of one token: what each layer's operations save, and the final hidden state."""
    width, inner = config.width, config.mlp_width
    heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = 2 * width + heads + 3 * kv + 2 * heads  # x, norm(x); q, k, v; what attention returns, joined
    if config.ropes:
        attention += 2 * (heads + kv)  # before rotation, halves exchanged
    mlp = 2 * width + (4 * inner if config.gated else 2 * inner)
    if gradient_checkpointing:
        return config.layers * width + attention + mlp + 4 * width
    return config.layers * (attention + mlp) + 4 * width
