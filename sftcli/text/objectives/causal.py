"""Next-token prediction: which tokens of a document are trained, and by how much."""

from collections.abc import Callable, Sequence

import msgspec

from sftcli.errors import DataError, UsageError
from sftcli.recipe import Mask
from sftcli.rows import FORMAT, IGNORE, REASONING, Document, Row, Segment, own_turns

Weights = list[float]  # one a token; 0 = not trained
Rule = Callable[[Document], Weights | None]  # None: nothing in this document matches the rule


class NothingTrained(Exception):
    """A well-formed document that leaves nothing to train; `str(error)` is the reason it is counted under."""


def rule_of(options: Mask) -> Rule:
    """`--train-on` and `--roles` as a function of a document. Raises UsageError."""
    name, _, given = options.train_on.partition(":")
    if options.roles:
        if options.train_on != "own":
            raise UsageError("--roles and --train-on are two answers to one question: give one of them")
        return lambda document: of_roles(document, options.roles)
    if name in RULES and not given:
        return RULES[name]
    if name == "after" and given:
        pattern = _ids(given)
        return lambda document: after(document.input_ids, pattern)
    if name == "between" and given.count(":") == 1:
        start, end = (_ids(part) for part in given.split(":"))
        return lambda document: between(document.input_ids, start, end)
    raise UsageError(
        f"train_on {options.train_on!r} is unknown", hint=f"{', '.join(RULES)}, after:4,5 or between:1,1388:2,234"
    )


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"expected ids such as 4,5, got {text!r}") from None


def by_segment(document: Document, trained: Callable[[Segment], bool]) -> Weights:
    weights = [0.0] * len(document.input_ids)
    for segment in document.segments:
        if trained(segment):
            weights[segment.start : segment.end] = [segment.weight] * (segment.end - segment.start)
    return weights


def own(document: Document) -> Weights:
    """Every turn of the model, its end-of-turn token included."""
    return by_segment(document, lambda segment: segment.own)


def last(document: Document) -> Weights | None:
    """The last turn of the model only."""
    turns = own_turns(document.segments)
    return by_segment(document, lambda segment: segment.own and segment.start >= turns[-1].start) if turns else None


def own_final(document: Document) -> Weights:
    """What the model says outside of its reasoning, its end-of-turn token included."""
    return by_segment(document, lambda segment: segment.own and segment.role != REASONING)


def own_reasoning(document: Document) -> Weights:
    """The reasoning of the model's turns, from their beginning to what closes it."""
    if not any(segment.own and segment.role == REASONING for segment in document.segments):
        raise NothingTrained("no reasoning")
    return by_segment(document, lambda segment: segment.own and segment.role == REASONING)


def of_roles(document: Document, roles: Sequence[str]) -> Weights:
    """Segments of these roles; `assistant` is the whole turn."""
    reasoning = REASONING in roles or "assistant" in roles
    return by_segment(document, lambda s: reasoning if s.role == REASONING else s.role in roles)


def everything(document: Document) -> Weights:
    """All tokens, whoever wrote them; turns with a weight of their own keep it."""
    weights = [1.0] * len(document.input_ids)
    for segment in document.segments:
        weights[segment.start : segment.end] = [segment.weight] * (segment.end - segment.start)
    return weights


RULES: dict[str, Rule] = {
    "own": own,
    "own-final": own_final,
    "own-reasoning": own_reasoning,
    "last": last,
    "all": everything,
}


def after(ids: Sequence[int], pattern: Sequence[int]) -> Weights | None:
    """What follows the first occurrence of a pattern; up to and including it is masked.

    As GPT-NeoX's preprocess_data_with_mask, but for the answer to "no match" (there: all is trained).
    """
    start = find(ids, pattern, 0)
    if start is None:
        return None
    end = start + len(pattern)
    return [0.0] * end + [1.0] * (len(ids) - end)


def between(ids: Sequence[int], start: Sequence[int], end: Sequence[int]) -> Weights | None:
    """What lies between a start marker and the next end marker (included) or the end of the row, every time.

    As MiniMind's dataset/lm_dataset.py since 2026-01-15.
    """
    weights = [0.0] * len(ids)
    at = find(ids, start, 0)
    if at is None:
        return None
    while at is not None:
        begin = at + len(start)
        close = find(ids, end, begin)
        stop = len(ids) if close is None else close + len(end)
        weights[begin:stop] = [1.0] * (stop - begin)
        at = find(ids, start, stop)
    return weights


def find(ids: Sequence[int], pattern: Sequence[int], start: int) -> int | None:
    """Where a pattern first occurs at or after `start`."""
    size = len(pattern)
    for i in range(start, len(ids) - size + 1):
        if list(ids[i : i + size]) == list(pattern):
            return i
    return None


def eod_masked(ids: Sequence[int], weights: Weights, eod: int) -> Weights:
    """GPT-NeoX's eod_mask_loss: what an end-of-document token would predict (the next document) is not trained."""
    return [0.0 if i and ids[i - 1] == eod else weight for i, weight in enumerate(weights)]


def weights_of(document: Document, rule: Rule, options: Mask) -> Weights:
    """The rule's weights, --no-match applied. Raises NothingTrained with the reason, DataError for `error`."""
    weights = rule(document)
    if weights is not None:
        return weights
    if options.no_match == "error":
        raise DataError(f"nothing matches train_on {options.train_on}")
    if options.no_match == "drop":
        raise NothingTrained("no match")
    return everything(document)


def after_eod(document: Document, weights: Weights, options: Mask) -> Weights:
    """The weights under --eod-mask-loss."""
    if options.eod_mask_loss is None:
        return weights
    return eod_masked(document.input_ids, weights, options.eod_mask_loss)


def row_of(document: Document, weights: Weights) -> Row:
    """Labels where the weight is not 0; `loss_weight` only where a trained token's weight is not 1."""
    ids = document.input_ids
    labels = [token if weight else IGNORE for token, weight in zip(ids, weights, strict=True)]
    turns = own_turns(document.segments)
    uneven = not {0.0, 1.0}.issuperset(weights)
    return Row(
        id=document.id,
        input_ids=ids,
        labels=labels,
        align="next",
        objective="causal",
        tokenizer=document.tokenizer,
        template=document.template,
        format=FORMAT,
        loss_weight=[weight if weight else 1.0 for weight in weights] if uneven else None,
        source=document.source,
        turns=[(s.start, s.end, s.role, number) for number, s in enumerate(turns)] or None,
    )


def window(row: Row, limit: int, policy: str) -> tuple[int, int]:
    """The tokens start..end that stay of a row longer than `limit`. Raises NothingTrained where none can."""
    length = len(row.input_ids)
    if policy == "truncate":
        return 0, limit
    first = next(i for i, label in enumerate(row.labels) if label != IGNORE)
    if policy == "truncate-prompt" and length - limit < first:  # a token of the prompt stays: it predicts the answer
        return length - limit, length
    raise NothingTrained("too long")


def slice_row(row: Row, start: int, end: int) -> Row:
    """Tokens start..end of a causal row; nothing is invented at its new end."""
    turns = [
        (max(a, start) - start, min(b, end) - start, role, number)
        for a, b, role, number in row.turns or ()
        if a < end and b > start
    ]
    return msgspec.structs.replace(
        row,
        input_ids=row.input_ids[start:end],
        labels=row.labels[start:end],
        loss_weight=row.loss_weight[start:end] if row.loss_weight else None,
        turns=turns or None,
    )
