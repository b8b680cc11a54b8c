"""NEFTune: noise on the embeddings while a model trains (arXiv 2310.05914)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sftcli.model.sampling import stream
from sftcli.rows import Row


def neftune(rows: Sequence[Row], alpha: float, width: int, seed: int, step: int) -> Tensor:
    """(T, C): U(-1, 1) * alpha / sqrt(L C) for a row of L tokens, on the embedding's rows before they are scaled.

    A row draws from a stream of (seed, its id, step): neither a resume nor how a step is cut into batches changes it.
    """
    parts = []
    for row in rows:
        length = len(row.input_ids)
        drawn = torch.empty(length, width).uniform_(-1, 1, generator=stream(seed, row.id, step))
        parts.append(drawn * (alpha / math.sqrt(length * width)))
    return torch.cat(parts)
