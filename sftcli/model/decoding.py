"""The decoding loop: rows that leave and rows that take their places, a token for each at every step."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sftcli.model.cache import Held, Table, hold_beginning, prefill
from sftcli.model.gpt import GPT
from sftcli.model.growth import Grown, Prompt, tensors_of
from sftcli.model.rope import LongRope
from sftcli.model.sampling import choose, repetition_penalised, stream
from sftcli.recipe import Generate

TextStops = Callable[[list[int]], bool]  # generated ids -> whether a stop text is among them


@dataclass
class Token:
    """The next token of the prompt with this number."""

    number: int
    id: int


@dataclass
class Completion:
    """What was generated for the prompt with this number; the stop token that ended it is not included."""

    number: int
    ids: list[int]
    finish_reason: str  # stop | length
    context_full: bool = False  # length, because the model's context is full
    ends: list[int] = field(default_factory=list)  # of a prompt with blanks: where in `ids` each filling ends


@dataclass(eq=False)
class _Slot:
    """A row that is being generated."""

    number: int
    prompt: Prompt
    limit: int  # tokens it may generate
    generator: torch.Generator
    row: Grown
    made: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # in `made`


def generate(
    model: GPT,
    prompts: Iterable[Prompt],
    options: Generate,
    stops: Collection[int],
    text_stops: TextStops | None = None,
) -> Iterator[Completion]:
    """Complete prompts; yields each as it finishes, in any order, numbered by its place in `prompts`."""
    for event in decode(model, prompts, options, stops, text_stops):
        if isinstance(event, Completion):
            yield event


@torch.inference_mode()
def decode(
    model: GPT,
    prompts: Iterable[Prompt],
    options: Generate,
    stops: Collection[int],
    text_stops: TextStops | None = None,
    held: Held | None = None,
) -> Iterator[Token | Completion]:
    """Complete prompts, token by token; the Completion of a prompt comes after its last Token.

    A single prompt may go on from what an earlier one `held`, and leaves there what it was fed.

    Rows of the batch that finish leave it and waiting rows enter. A row ends at a stop id or a stop text, after
    max_new_tokens, or when the model's context is full. With `deterministic` rows are decoded one after the other: the
    bits of a row never depend on the others.
    """
    model.eval()
    stops = frozenset(stops)
    waiting = enumerate(prompts)
    size = 1 if options.deterministic else options.batch_size
    table, slots = Table(model, options.pad_side), list[_Slot]()
    logits = torch.empty(0, model.config.vocab_size, device=model.device)
    beginning = Held()  # of several prompts
    more = True  # prompts are waiting, as far as we know
    while more or slots:
        if more and len(slots) < size:
            entering, done = _entering(waiting, size - len(slots), model.config.context, options)
            more = len(slots) + len(entering) == size
            yield from done
            if entering:
                rows = [slot.row for slot in entering]
                if held is None and len(rows) > 1:
                    hold_beginning(model, rows, beginning)
                first = prefill(model, table, rows, beginning if held is None else held)
                logits = torch.cat([logits, first])
                slots += entering
        if not slots:
            continue
        chosen = _choose(logits, slots, options)
        staying = []
        for i, (slot, token) in enumerate(zip(slots, chosen, strict=True)):
            finished = _advance(slot, token, stops, text_stops, model.config.context)
            if token not in stops:  # it is part of the row
                yield Token(slot.number, token)
            if finished:
                yield finished
            else:
                staying.append(i)
        if held is not None and not staying:
            held.take(table, slots[0].prompt.ids + slots[0].made)
        if len(staying) < len(slots):
            places = _closed_up(staying)
            table.keep(places)
            slots = [slots[i] for i in places]
        logits, slots = _fed(model, table, slots)


def _fed(model: GPT, table: Table, slots: list[_Slot]) -> tuple[Tensor, list[_Slot]]:
    """Feed each row its newest token: logits (B, V), and the rows in the table's order after it.

    Where a row grows past the length at which LongRoPE turns to other frequencies, its keys were turned by the wrong
    ones: it is encoded anew.
    """
    turning = [rope.scaling.original + 1 for rope in model.config.ropes if rope and isinstance(rope.scaling, LongRope)]
    before = model.prefix.length if model.prefix else 0
    anew = [slot for slot in slots if before + len(slot.row) in turning]
    if anew:
        kept = [i for i, slot in enumerate(slots) if slot not in anew]
        table.keep(kept)
        slots = [slots[i] for i in kept]
    logits = torch.empty(0, model.config.vocab_size, device=model.device)
    if slots:
        table.open_column()
        ids, positions, blocks = tensors_of([slot.row for slot in slots], model.device, start=-1)
        logits = model.logits(model.hidden(ids, positions, table, blocks))
    if anew:
        logits = torch.cat([logits, prefill(model, table, [slot.row for slot in anew])])
    return logits, slots + anew


def _closed_up(staying: list[int]) -> list[int]:
    """Who takes which place when the others left: rows from the end fill the gaps, all others stay where they are."""
    there = set(staying)
    return [i if i in there else staying.pop() for i in range(len(staying))]


def _entering(
    waiting: Iterator[tuple[int, Prompt]], count: int, context: int, options: Generate
) -> tuple[list[_Slot], list[Completion]]:
    """The next rows to enter; prompts that leave no room in the context are finished at once."""
    entering: list[_Slot] = []
    done: list[Completion] = []
    while len(entering) < count:
        following = next(waiting, None)
        if following is None:
            break
        number, prompt = following
        row = Grown(prompt.ids, prompt.blanks)
        room = context - len(prompt.ids) - (len(prompt.blanks.places) if prompt.blanks else 0)
        if room <= 0:
            done.append(Completion(number, [], "length", context_full=True))
            continue
        limit = min(options.max_new_tokens, room)
        entering.append(_Slot(number, prompt, limit, stream(options.seed, prompt.key, prompt.sample), row))
    return entering, done


def _choose(logits: Tensor, slots: list[_Slot], options: Generate) -> list[int]:
    if options.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for i, slot in enumerate(slots):
            seen[i, torch.tensor(slot.prompt.ids + slot.made, device=logits.device)] = True
        logits = repetition_penalised(logits, seen, options.repetition_penalty)
    return choose(logits, options, [slot.generator for slot in slots]).tolist()


def _advance(
    slot: _Slot, token: int, stops: Collection[int], text_stops: TextStops | None, context: int
) -> Completion | None:
    """Take a row's next token; its completion if that ends it, and not only one of its blanks."""
    if token in stops:
        slot.ends += [len(slot.made)] if slot.prompt.blanks else []
        return None if slot.row.next_blank() else Completion(slot.number, slot.made, "stop", ends=slot.ends)
    slot.made.append(token)
    slot.row.feed(token)
    if text_stops and text_stops(slot.made):
        return Completion(slot.number, slot.made, "stop", ends=slot.ends)
    if len(slot.made) >= slot.limit:
        full = len(slot.row) >= context
        return Completion(slot.number, slot.made, "length", context_full=full, ends=slot.ends)
    return None


def in_order(completions: Iterable[Completion]) -> Iterator[Completion]:
    """Completions by number, each as soon as all before it are there."""
    held: dict[int, Completion] = {}
    following = 0
    for completion in completions:
        held[completion.number] = completion
        while following in held:
            yield held.pop(following)
            following += 1
