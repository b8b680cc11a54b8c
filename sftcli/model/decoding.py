"""Batched decoding: a table of columns, a key/value cache beside it, rows that leave and rows that take their places.

    left    . . 7 8 | 5      right    7 8 . . | 5      mask    0 0 1 1 | 1
            1 3 6 2 | 9               1 3 6 2 | 9              1 1 1 1 | 1

Every step appends one column for all rows. Positions come from the mask (cumsum - 1), so where pads lie changes
nothing but the table; pad columns stay masked for ever.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sftcli.model.attention import Group, KeepingAttention, Sight, Tokens, attend, visible
from sftcli.model.gpt import GPT
from sftcli.model.growth import Grown, Prompt, tensors_of
from sftcli.model.rope import LongRope
from sftcli.model.sampling import choose, repetition_penalised, stream
from sftcli.recipe import Generate

SPARE_COLUMNS = 64  # columns that the cache grows by


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


def positions_of(mask: Tensor) -> Tensor:
    """Positions (B, K) of a 0/1 mask: max(cumsum - 1, 0). Right pads repeat the last real position."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def padded(rows: Sequence[Sequence[int]], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """ids and 0/1 mask (B, K) of rows padded on one side to the longest."""
    width = max(map(len, rows))
    left = [(width - len(row) if side == "left" else 0) for row in rows]
    ids = [
        [pad] * before + list(row) + [pad] * (width - before - len(row)) for before, row in zip(left, rows, strict=True)
    ]
    mask = [
        [0] * before + [1] * len(row) + [0] * (width - before - len(row))
        for before, row in zip(left, rows, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


class Table:
    """The columns of a decoding batch: which are real (mask) and the keys and values of each layer.

    mask (B, capacity); keys, values: a list over layers of (B, G, capacity, D). Columns 0..width-1 are in use.
    """

    def __init__(self, model: GPT, side: str):
        self.model, self.side = model, side
        self.width = 0
        config = model.config
        shape = (0, config.kv_heads, 0, config.head_dim)
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=model.device)
        self.keys = [torch.zeros(shape, device=model.device) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, device=model.device) for _ in range(config.layers)]
        self._seen: dict[int | None, Tensor] = {}  # by window, of the newest column

    def __len__(self) -> int:
        return len(self.mask)

    def keep(self, slots: Sequence[int]) -> None:
        """Let the other rows leave; columns that are then empty for all go with them."""
        at = torch.tensor(slots, dtype=torch.long, device=self.mask.device)
        mask = self.mask[at]
        used = mask.any(0).nonzero()[:, 0]
        first = int(used[0]) if len(used) else self.width
        holes = len(used) < self.width - first  # on the right, between the prompts and what was generated later
        columns = used if holes else slice(first, None)
        self.mask = mask[:, columns]
        self.keys = [k[at][:, :, columns] for k in self.keys]
        self.values = [v[at][:, :, columns] for v in self.values]
        self.width = len(used)

    def add(self, lengths: Sequence[int], keys: list[Tensor], values: list[Tensor]) -> None:
        """Rows enter: keys and values of their prompts (T, G, D) a layer, laid end to end in the order of `lengths`.

        They end at the last column in use (left), or begin at the first (right); the table widens if it must.
        """
        width = max(self.width, *lengths)
        old, new = len(self), len(lengths)
        shift = width - self.width if self.side == "left" else 0  # present rows keep their last column
        mask = self.mask.new_zeros(old + new, width + SPARE_COLUMNS)
        mask[:old, shift : shift + self.width] = self.mask[:, : self.width]
        starts = [width - length if self.side == "left" else 0 for length in lengths]
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            mask[old + i, start : start + length] = True
        for present, entering in ((self.keys, keys), (self.values, values)):
            for layer, (now, flat) in enumerate(zip(present, entering, strict=True)):
                _, heads, _, size = now.shape
                wider = flat.new_zeros(old + new, heads, width + SPARE_COLUMNS, size)
                wider[:old, :, shift : shift + self.width] = now[:, :, : self.width]
                for i, piece in enumerate(flat.split(list(lengths))):  # (length, G, D)
                    wider[old + i, :, starts[i] : starts[i] + lengths[i]] = piece.transpose(0, 1)
                present[layer] = wider
        self.mask, self.width = mask, width

    def open_column(self) -> Tensor:
        """Append a column that is real for every row; returns the position (B,) of its tokens."""
        if self.width == self.mask.shape[1]:
            self.mask = F.pad(self.mask, (0, SPARE_COLUMNS))
            self.keys = [F.pad(k, (0, 0, 0, SPARE_COLUMNS)) for k in self.keys]
            self.values = [F.pad(v, (0, 0, 0, SPARE_COLUMNS)) for v in self.values]
        self.mask[:, self.width] = True
        self.width += 1
        self._seen.clear()
        return self.lengths - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens (B,) of each row so far, the newest included."""
        return self.mask[:, : self.width].sum(1)

    def seen(self, window: int | None) -> Tensor:
        """What the newest column sees: (B, 1, 1, K). Every real column of its row, within the window; no pads."""
        if window not in self._seen:
            mask = self.mask[:, : self.width]
            if window is not None:
                index = positions_of(mask)  # of every column in its row
                mask = mask & (index[:, -1:] - index < window)
            self._seen[window] = mask[:, None, None]
        return self._seen[window]

    def __call__(self, sight: Sight, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the newest column: q (B, H, D), k and v (B, G, D) -> (B, H, D)."""
        keys, values = self.keys[sight.layer], self.values[sight.layer]
        keys[:, :, self.width - 1] = k
        values[:, :, self.width - 1] = v
        keys, values = keys[:, :, : self.width], values[:, :, : self.width]
        return attend(q[:, :, None], keys, values, self.seen(sight.window), sight)[:, :, 0]


def prefill(model: GPT, table: Table, prompts: Sequence[Sequence[int] | Grown]) -> Tensor:
    """Encode prompts (or rows under way) without padding, each in one call, and let them enter the table; returns the
    logits (B, V) of their last tokens."""
    rows = [prompt if isinstance(prompt, Grown) else Grown(prompt) for prompt in prompts]
    lengths = [len(row) for row in rows]
    attention = KeepingAttention([Group(1, len(row), row.order(model.device)) for row in rows])
    ids, positions, blocks = tensors_of(rows, model.device)
    hidden = model.hidden(ids, positions, attention, blocks)
    table.add(lengths, attention.keys, attention.values)
    ends = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    return model.logits(hidden[ends])


def generate(
    model: GPT,
    prompts: Iterable[Prompt],
    options: Generate,
    stops: Sequence[int],
    text_stops: "TextStops | None" = None,
) -> Iterator[Completion]:
    """Complete prompts; yields each as it finishes, in any order, numbered by its place in `prompts`."""
    for event in decode(model, prompts, options, stops, text_stops):
        if isinstance(event, Completion):
            yield event


@torch.no_grad()
def decode(
    model: GPT,
    prompts: Iterable[Prompt],
    options: Generate,
    stops: Sequence[int],
    text_stops: "TextStops | None" = None,
    held: "Held | None" = None,
) -> Iterator[Token | Completion]:
    """Complete prompts, token by token; the Completion of a prompt comes after its last Token.

    A single prompt may go on from what an earlier one `held`, and leaves there what it was fed.

    Rows of the batch that finish leave it and waiting rows enter. A row ends at a stop id or a stop text, after
    max_new_tokens, or when the model's context is full. With `deterministic` rows are decoded one after the other: the
    bits of a row never depend on the others.
    """
    model.eval()
    waiting = enumerate(prompts)
    size = 1 if options.deterministic else options.batch_size
    table, slots = Table(model, options.pad_side), list[_Slot]()
    logits = torch.empty(0, model.config.vocab_size, device=model.device)
    more = True  # prompts are waiting, as far as we know
    while more or slots:
        if more and len(slots) < size:
            entering, done = _entering(waiting, size - len(slots), model.config.context, options)
            more = len(slots) + len(entering) == size
            yield from done
            if entering:
                rows = [slot.row for slot in entering]
                first = prefill(model, table, rows) if held is None else prefill_rest(model, table, rows[0].ids, held)
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
            table.keep(staying)
            slots = [slots[i] for i in staying]
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


TextStops = Callable[[list[int]], bool]  # generated ids -> whether a stop text is among them


def _advance(
    slot: _Slot, token: int, stops: Sequence[int], text_stops: TextStops | None, context: int
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


# ---- one row that goes on: the turns of a conversation


@dataclass
class Held:
    """What a row was fed, and its keys and values (T, G, D) a layer: a prompt that begins alike need not encode it."""

    ids: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def take(self, table: Table, ids: list[int]) -> None:
        """Hold the only row of a table; its last token may not have been fed."""
        self.ids = ids[: table.width]
        self.keys = [k[0, :, : table.width].transpose(0, 1) for k in table.keys]
        self.values = [v[0, :, : table.width].transpose(0, 1) for v in table.values]

    def common(self, ids: Sequence[int]) -> int:
        """How many ids at the start are held, the last one never: its logits are asked for."""
        pairs = enumerate(zip(self.ids, ids, strict=False))
        return next((t for t, (mine, other) in pairs if mine != other), min(len(self.ids), len(ids) - 1))


class _Rest:
    """Attention of a row's last tokens, the keys and values of its first `common` ones being held."""

    def __init__(self, held: Held, common: int, length: int, device: torch.device):
        index = torch.arange(length, device=device)
        self.held, self.common = held, common
        self.lengths = torch.full((length - common,), length)
        self.row = Tokens(torch.zeros_like(index), index, index)
        self.rest = Tokens(*(t[common:] for t in (self.row.row, self.row.order, self.row.index)))
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, sight: Sight, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.cat([self.held.keys[sight.layer][: self.common], k])  # (length, G, D)
        values = torch.cat([self.held.values[sight.layer][: self.common], v])
        self.keys.append(keys)
        self.values.append(values)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, keys, values))  # (1, heads, rest or length, D)
        return attend(q, k, v, visible(self.rest, self.row, sight.window), sight)[0].transpose(0, 1)


def prefill_rest(model: GPT, table: Table, ids: Sequence[int], held: Held) -> Tensor:
    """Encode what of a prompt is not held; it enters the table as a whole. Returns the logits (1, V) of its end."""
    common = held.common(ids)
    if not common or any(rope and rope.by_length for rope in model.config.ropes):  # those turn old keys anew
        return prefill(model, table, [ids])
    attention = _Rest(held, common, len(ids), model.device)
    positions = torch.arange(common, len(ids), device=model.device)
    hidden = model.hidden(torch.tensor(ids[common:], device=model.device), positions, attention)
    table.add([len(ids)], attention.keys, attention.values)
    return model.logits(hidden[-1:])
