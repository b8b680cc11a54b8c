"""What a signal does: it ends a command at once or, while a model trains, at the next safe place."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

TERMINATING = [signal.SIGTERM, *filter(None, [getattr(signal, "SIGUSR1", None)])]  # batch systems warn by SIGUSR1


class Terminated(SystemExit):
    """A SystemExit, so that no `except Exception` on the way takes it for a failure of its own."""

    def __init__(self, number: int):
        super().__init__(exit_code(number))
        self.number = number

    def __str__(self) -> str:
        return f"ended by {signal.Signals(self.number).name}"


class Interrupted(Exception):
    """Raised by the `poll` of `polled` once a signal has come."""

    def __init__(self, code: int):
        super().__init__(f"interrupted ({code})")
        self.code = code


def exit_code(number: int) -> int:
    return 130 if number == signal.SIGINT else 143


STOPPED = tuple(exit_code(number) for number in (signal.SIGINT, signal.SIGTERM))  # the codes of what signals end


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may ask for signals
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs keep theirs
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end a command as Python ends it at SIGINT: by an exception, which tidies up on its way."""

    def handler(number: int, frame: Any) -> None:
        raise Terminated(number)

    with handled(TERMINATING, handler):
        yield


@contextmanager
def polled() -> Iterator[Callable[[], None]]:
    """Signals wait for the next call of what this gives, which raises Interrupted; a SIGINT after one ends at once."""
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            os._exit(130)
        received.append(number)

    def poll() -> None:
        if received:
            raise Interrupted(exit_code(received[0]))

    with handled([signal.SIGINT, *TERMINATING], handler):
        yield poll
