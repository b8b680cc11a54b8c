"""Rows for people: trained tokens in colour, roles, and the table of what the model must say where."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from sftcli import console
from sftcli.rows import IGNORE, Document, Row, Segment

if TYPE_CHECKING:
    from rich.text import Text


class Names(Protocol):
    """What turns ids into text: a Codec, or `Numbers` where the tokenizer is not known."""

    def token_text(self, token: int) -> str: ...

    def decode(self, ids: list[int], keep_special: bool = False) -> str: ...


class Numbers:
    """Ids as themselves."""

    def token_text(self, token: int) -> str:
        return str(token)

    def decode(self, ids: list[int], keep_special: bool = False) -> str:
        return " ".join(map(str, ids))


WHOLE_TABLE = 40  # rows up to this length show every position, longer ones the trained positions only
TABLE_LINES = 30


def show_row(row: Row, names: Names, segments: Sequence[Segment] = (), stderr: bool = True) -> None:
    """Print one row: its segments with trained tokens marked, then the aligned table."""
    screen = console.console(stderr)
    colour = console.coloured(stderr)
    weight = row.loss_weight or [1.0] * len(row.input_ids)
    title = f"--- row {row.id}: {len(row.input_ids)} tokens, {row.trained()} trained"
    if row.next_sentence_label is not None:
        title += ", B is random" if row.next_sentence_label else ", B follows A"
    screen.print(console.styled([(title, "bold")]))
    for start, end, role in _runs(row, segments):
        screen.print(_line(row, weight, (start, end), role, names, colour))
    for line in [*_table(row, weight, names), *_grid(row)]:
        screen.print(line)


def show_document(document: Document, names: Names) -> None:
    """Print a tokenised conversation on stdout, a line a segment, the model's own words marked."""
    screen, colour = console.console(stderr=False), console.coloured(stderr=False)
    screen.print(console.styled([(f"--- document {document.id}: {len(document.input_ids)} tokens", "bold")]))
    for s in document.segments:
        text = names.decode(document.input_ids[s.start : s.end], keep_special=True).replace("\n", "⏎")
        text = text if colour or not s.own else f"[[{text}]]"
        weight = f" x {s.weight:g}" if s.weight != 1 else ""
        screen.print(console.styled([(f"{s.role:>10} | ", "cyan"), (text + weight, "bold green" if s.own else "dim")]))


def show_record(title: str, parts: Iterable[tuple[str, str]]) -> None:
    """Print a record of text on stdout: a title, then name and text of each part."""
    screen = console.console(stderr=False)
    screen.print(console.styled([(f"--- {title}", "bold")]))
    for name, text in parts:
        screen.print(console.styled([(f"{name:>10} | ", "cyan"), (text.replace("\n", "\n" + " " * 13), "")]))


def _runs(row: Row, segments: Sequence[Segment]) -> list[tuple[int, int, str]]:
    """Stretches of one role; without segments, the turns and what lies between them."""
    if segments:
        return [(s.start, s.end, s.role) for s in segments]
    found, at = [], 0
    for start, end, role, _ in row.turns or ():
        found += [(at, start, ""), (start, end, role)]
        at = end
    return [run for run in [*found, (at, len(row.input_ids), "")] if run[0] < run[1]]


def _line(row: Row, weight: Sequence[float], span: tuple[int, int], role: str, names: Names, colour: bool) -> "Text":
    """`role | text`, trained tokens green (bold), others dim; without colour trained runs stand in [[ ]]."""
    pieces = [(f"{role or '-':>10} | ", "cyan")]
    kinds = groupby(range(*span), key=lambda t: weight[t] if row.labels[t] != IGNORE else 0.0)
    for value, places in kinds:  # decoded run by run: a character may be several tokens
        text = names.decode([row.input_ids[t] for t in places], keep_special=True).replace("\n", "⏎")
        style = "dim" if not value else "bold green" if value == 1.0 else "bold yellow"
        pieces.append((text if colour or not value else f"[[{text}]]", style))
    return console.styled(pieces)


def _table(row: Row, weight: Sequence[float], names: Names) -> "list[Text]":
    """Aligned lines `at this token -> the model must say`: the shift that happens once, when a batch is built."""
    offset = 1 if row.align == "next" else 0
    scored = [(t, t + offset) for t in range(len(row.input_ids) - offset)]
    shown = scored
    if len(scored) > WHOLE_TABLE:
        shown = [pair for pair in scored if row.labels[pair[1]] != IGNORE]
    cells = []
    for at, said in shown[:TABLE_LINES] if len(scored) > WHOLE_TABLE else shown:
        trained = row.labels[said] != IGNORE
        target = names.token_text(row.labels[said] if trained else row.input_ids[said])
        mark = "" if weight[said] == 1.0 or not trained else f"x {weight[said]:g}"
        cells.append((str(at), _cell(names.token_text(row.input_ids[at])), _cell(target), trained, mark))
    width = max((len(c[1]) for c in cells), default=0)
    lines = [console.styled([(f"{'at':>6}  {'this token':<{max(width, 10)}}     the model must say", "bold")])]
    for place, given, target, trained, mark in cells:
        arrow = "->" if trained else "  "
        end = f"{target}  {mark}".rstrip() if trained else f"{target}  (not trained)"
        lines.append(
            console.styled([(f"{place:>6}  {given:<{max(width, 10)}}  {arrow} {end}", "green" if trained else "dim")])
        )
    if len(shown) > len(cells):
        lines.append(console.styled([(f"{'':>6}  ... {len(shown) - len(cells)} more trained positions", "dim")]))
    return lines


def _grid(row: Row) -> "list[Text]":
    """Rows that see by an order of their own: where each token stands and which tokens it sees."""
    size = len(row.input_ids)
    if row.order is None or size > WHOLE_TABLE:
        return []
    second, values = ("type", row.token_type_ids) if row.token_type_ids else ("block", row.block_position_ids)
    lines = [f"{'at':>6}  {'pos':>4}  {second:>5}  sees"]
    for t, order in enumerate(row.order):
        seen = "".join("1" if other <= order else "0" for other in row.order)
        position = row.position_ids[t] if row.position_ids else t
        lines.append(f"{t:>6}  {position:>4}  {values[t] if values else 0:>5}  {seen}")
    return [console.styled([(line, "" if i else "bold")]) for i, line in enumerate(lines)]


def _cell(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "·") or "''"
