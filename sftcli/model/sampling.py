"""Choosing the next token: pure functions of scores, and one random stream a row."""

import hashlib

import torch
from torch import Tensor

from sftcli.recipe import Generate


def filtered(logits: Tensor, options: Generate) -> Tensor:
    """Scores (B, V) with temperature applied and everything outside of top_k, top_p and min_p at -inf."""
    scores = logits / options.temperature
    if 0 < options.top_k < scores.shape[1]:
        lowest = scores.topk(options.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    if options.min_p > 0:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < options.min_p * p.amax(-1, keepdim=True), -torch.inf)
    if options.top_p < 1:
        ordered, at = scores.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= options.top_p  # the mass before a token already reaches top_p; the first stays
        scores = scores.masked_fill(outside.scatter(1, at, outside), -torch.inf)
    return scores


def repetition_penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores of tokens that a row holds already made less likely (arXiv 1909.05858): x / p if x > 0 else x * p.

    logits (B, V); seen (B, V) bool.
    """
    weaker = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, weaker, logits)


def stream(seed: int, row: str, sample: int) -> torch.Generator:
    """The random stream of one completion: a function of (seed, row, sample number) only."""
    digest = hashlib.blake2b(f"{seed}\0{row}\0{sample}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def gumbel_noise(streams: list[torch.Generator], vocabulary: int) -> Tensor:
    """(B, V) noise, each row from its own stream; argmax(scores + noise) is a draw from softmax(scores)."""
    draws = [torch.empty(vocabulary).exponential_(generator=generator) for generator in streams]
    return -torch.stack(draws).log()


def choose(logits: Tensor, options: Generate, streams: list[torch.Generator]) -> Tensor:
    """The next id of every row (B,): the best score, perturbed by the row's own noise when sampling."""
    if options.temperature == 0:
        return logits.argmax(-1)
    scores = filtered(logits, options)
    return (scores + gumbel_noise(streams, logits.shape[1]).to(logits.device)).argmax(-1)
