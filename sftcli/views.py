"""Rows for people: trained tokens in colour, roles, and the table of what the model must say where."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from sftcli import console
from sftcli.rows import IGNORE, Document, Row, Segment

if TYPE_CHECKING:
    from rich.text import Text

TokenText = Callable[[int], str]
WHOLE_TABLE = 40  # rows up to this length show every position, longer ones the trained positions only
TABLE_LINES = 30


def show_row(row: Row, text_of: TokenText, segments: Sequence[Segment] = (), stderr: bool = True) -> None:
    """Print one row: its segments with trained tokens marked, then the aligned table."""
    screen = console.console(stderr)
    colour = console.coloured(stderr)
    weight = row.loss_weight or [1.0] * len(row.input_ids)
    title = f"--- row {row.id}: {len(row.input_ids)} tokens, {row.trained()} trained"
    screen.print(console.styled([(title, "bold")]))
    for start, end, role in _runs(row, segments):
        screen.print(_line(row, weight, (start, end), role, text_of, colour))
    for line in _table(row, weight, text_of):
        screen.print(line)


def show_document(document: Document, text_of: TokenText) -> None:
    """Print a tokenised conversation on stdout, a line a segment, the model's own words marked."""
    screen, colour = console.console(stderr=False), console.coloured(stderr=False)
    screen.print(console.styled([(f"--- document {document.id}: {len(document.input_ids)} tokens", "bold")]))
    for s in document.segments:
        text = "".join(text_of(token) for token in document.input_ids[s.start : s.end]).replace("\n", "⏎")
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


def _line(
    row: Row, weight: Sequence[float], span: tuple[int, int], role: str, text_of: TokenText, colour: bool
) -> "Text":
    """`role | text`, trained tokens green (bold), others dim; without colour trained runs stand in [[ ]]."""
    start, end = span
    pieces = [(f"{role or '-':>10} | ", "cyan")]
    for t in range(start, end):
        trained = row.labels[t] != IGNORE
        style = ("bold green" if weight[t] == 1.0 else "bold yellow") if trained else "dim"
        text = text_of(row.input_ids[t]).replace("\n", "⏎")
        if not colour:
            before = t > start and row.labels[t - 1] != IGNORE
            after = t + 1 < end and row.labels[t + 1] != IGNORE
            text = ("[[" if trained and not before else "") + text + ("]]" if trained and not after else "")
        pieces.append((text, style))
    return console.styled(pieces)


def _table(row: Row, weight: Sequence[float], text_of: TokenText) -> "list[Text]":
    """Aligned lines `at this token -> the model must say`: the shift that happens once, when a batch is built."""
    offset = 1 if row.align == "next" else 0
    scored = [(t, t + offset) for t in range(len(row.input_ids) - offset)]
    shown = scored
    if len(scored) > WHOLE_TABLE:
        shown = [pair for pair in scored if row.labels[pair[1]] != IGNORE]
    cells = []
    for at, said in shown[:TABLE_LINES] if len(scored) > WHOLE_TABLE else shown:
        trained = row.labels[said] != IGNORE
        target = text_of(row.labels[said] if trained else row.input_ids[said])
        mark = "" if weight[said] == 1.0 or not trained else f"x {weight[said]:g}"
        cells.append((str(at), _cell(text_of(row.input_ids[at])), _cell(target), trained, mark))
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


def _cell(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "·") or "''"
