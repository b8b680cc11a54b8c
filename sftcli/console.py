"""Everything a person sees: notes and progress on stderr, tables, coloured masks. Nothing here writes to stdout."""

import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BAR = 20  # columns of the progress bar, where there is room for it
QUIET = False  # set once by the command line's --quiet
RANK = 0  # set once by a process of several: only the first talks, the others say which they are if they fail


def safe(text: str) -> str:
    """Text from data made harmless for a terminal: control, bidi and zero-width characters become visible escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(c) for c in text)


def _visible(c: str) -> str:
    if c == "\n":
        return "⏎\n"
    if c == "\t" or c.isprintable():
        return c
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" if unicodedata.category(c) != "Zs" else " "


def console(stderr: bool = True) -> "Console":
    """A rich console on stderr, or on stdout for `sft show` (imported late: rich costs 70 ms)."""
    from rich.console import Console

    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return Console(stderr=stderr, highlight=False, no_color=plain or None, soft_wrap=True)


def tell_of_waiting(path: str) -> None:
    """Say that a stage reads what is typed: a file may have been forgotten."""
    if path == "-" and sys.stdin is not None and sys.stdin.isatty():
        note("reading from the terminal: a JSON object a line, Ctrl-D ends; or name a FILE")


def note(text: str) -> None:
    """One line of talk on stderr; on a terminal the stage that talks (`mask: ...`) is coloured."""
    if QUIET or RANK:
        return
    stage, colon, rest = text.partition(":")
    if colon and stage.isidentifier() and coloured():
        print(f"\x1b[1;36m{stage}:\x1b[0m{safe(rest)}", file=sys.stderr, flush=True)
    else:
        print(safe(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """One line on stderr that stands out."""
    if RANK:
        return
    label = "\x1b[1;33mwarning:\x1b[0m" if coloured() else "warning:"
    print(f"{label} {safe(text)}", file=sys.stderr, flush=True)


def fail(text: str, hint: str | None) -> None:
    """The last line of a failing command, and what to do about it."""
    label, second = ("\x1b[1;31merror:\x1b[0m", "\x1b[1;36mhint:\x1b[0m") if coloured() else ("error:", "hint:")
    rank = f"[rank {RANK}] " if RANK else ""
    print(f"{rank}{label} {safe(text)}" + (f"; {second} {safe(hint)}" if hint else ""), file=sys.stderr, flush=True)


@contextmanager
def libraries_silenced() -> Iterator[None]:
    """What libraries write to stderr (Rust's account of a panic) is not shown; what is printed here is."""
    ours, kept = sys.stderr, os.dup(2)
    with suppress(OSError):  # of a stream without a number
        if ours.fileno() == 2:
            sys.stderr = os.fdopen(kept, "w", 1, ours.encoding, ours.errors, closefd=False)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        sys.stderr = ours
        os.close(kept)


def coloured(stderr: bool = True) -> bool:
    """Colour only where a person looks: a terminal, and not against NO_COLOR or TERM=dumb."""
    stream = sys.stderr if stderr else sys.stdout
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def clock(seconds: float) -> str:
    """75 -> '1:15', 4000 -> '1:06:40'."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Live:
    """One line that is rewritten in place on a terminal; elsewhere a plain line now and then."""

    def __init__(self, every: float = 10.0):
        self.terminal = sys.stderr.isatty() and not QUIET and not RANK and os.environ.get("TERM") != "dumb"
        self.every, self.shown = every, time.monotonic()

    def show(self, text: str, share: float | None = None) -> None:
        """Show what is going on; `share` of the work that is done, where that is known, as a bar."""
        now = time.monotonic()
        if self.terminal and now - self.shown > 0.1:
            room = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            text = fitted(safe(text), room)
            width = min(room - len(text) - 1, BAR)
            bar = "" if share is None or width < BAR // 4 else progress_bar(share, width) + " "
            line = bar + text
            colour = ("\x1b[36m", "\x1b[0m") if coloured() else ("", "")
            sys.stderr.write(f"\r\x1b[2K{colour[0]}{line[: len(bar)]}{colour[1]}{line[len(bar) :]}")
        elif not self.terminal and now - self.shown > self.every:
            note(text)
        else:
            return
        sys.stderr.flush()
        self.shown = now

    def clear(self) -> None:
        if self.terminal:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


def fitted(text: str, room: int) -> str:
    """A line of parts, two spaces between them, in so many columns: the second goes first, the rate and what is left of
    the time stay longest."""
    parts = text.split("  ")
    while len("  ".join(parts)) > room and len(parts) > 2:
        del parts[1]
    return "  ".join(parts)[:room]


def progress_bar(share: float, width: int) -> str:
    """0.4 -> '████████░░░░░░░░░░░░' (in ASCII where the terminal has no more)."""
    full, empty = "█░" if (sys.stderr.encoding or "").lower().startswith("utf") else "#-"
    done = round(min(max(share, 0.0), 1.0) * width)
    return full * done + empty * (width - done)


@contextmanager
def live(every: float = 10.0) -> Iterator[Live]:
    line = Live(every)
    try:
        yield line
    finally:
        line.clear()


class Counter:
    """Progress of a filter whose total is unknown: a live line `tokenize 12,000 rows  8,000 rows/s`."""

    def __init__(self, line: Live, verb: str):
        self.line, self.verb, self.count, self.start = line, verb, 0, time.monotonic()

    def add(self, rows: int) -> None:
        self.count += rows
        rate = self.count / max(time.monotonic() - self.start, 1e-9)
        self.line.show(f"{self.verb} {self.count:,} rows  {rate:,.0f} rows/s")


def styled(pieces: Iterable[tuple[str, str]]) -> "Text":
    """(text from data, style) pieces as a rich Text that cannot carry markup or escapes."""
    from rich.text import Text

    text = Text()
    for piece, style in pieces:
        text.append(safe(piece), style=style)
    return text
