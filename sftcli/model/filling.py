"""Filling the mask tokens of a row: all of them by one forward in which every token sees all others (masked LM)."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from sftcli.model.attention import Group, RowAttention
from sftcli.model.decoding import Completion
from sftcli.model.gpt import GPT
from sftcli.model.growth import Prompt
from sftcli.model.sampling import choose, repetition_penalised, stream
from sftcli.recipe import Generate


@torch.no_grad()
def fill(model: GPT, prompts: Iterable[Prompt], options: Generate, mask: int) -> Iterator[Completion]:
    """The token for each mask of every prompt, from left to right, in input order. Masks do not see each other's fills:
    each is chosen as if the others stayed hidden. A prompt that is longer than the context is left as it is."""
    model.eval()
    waiting = enumerate(prompts)
    size = 1 if options.deterministic else options.batch_size
    while batch := list(islice(waiting, size)):
        fitting = [prompt for _, prompt in batch if len(prompt.ids) <= model.config.context]
        filled = iter(_filled(model, fitting, options, mask) if fitting else [])
        for number, prompt in batch:
            if len(prompt.ids) <= model.config.context:
                yield Completion(number, next(filled), "stop")
            else:
                yield Completion(number, [], "length", context_full=True)


def _filled(model: GPT, prompts: Sequence[Prompt], options: Generate, mask: int) -> list[list[int]]:
    lengths = [len(prompt.ids) for prompt in prompts]
    ids = torch.tensor([token for prompt in prompts for token in prompt.ids], device=model.device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
    groups = [Group(1, length, torch.zeros(1, length, dtype=torch.long, device=model.device)) for length in lengths]
    hidden = model.hidden(ids, positions, RowAttention(groups))
    places = ids == mask
    logits = model.logits(hidden[places]).split([int(part.sum()) for part in places.split(lengths)])
    return [_chosen(part, prompt, options) for part, prompt in zip(logits, prompts, strict=True)]


def _chosen(logits: Tensor, prompt: Prompt, options: Generate) -> list[int]:
    """A token for each mask of one row: logits (masks, V)."""
    if options.repetition_penalty != 1:
        seen = torch.zeros(1, logits.shape[1], dtype=torch.bool, device=logits.device)
        seen[0, prompt.ids] = True
        logits = repetition_penalised(logits, seen, options.repetition_penalty)
    streams = [stream(options.seed, prompt.key, prompt.sample)] * len(logits)
    return choose(logits, options, streams).tolist()
