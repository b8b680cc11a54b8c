"""A time limit for templates that costs next to nothing for each of them.

While templates run, a timer asks ten times a second whether it is still the same one; when none ran, it stops itself.
"""

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

MAX_SECONDS = 1.0  # of processor time for one conversation
TICK = 0.1


class _Watch:
    """`runs`: templates begun so far; `seen`: the one that ran at the last tick, from `since` on."""

    def __init__(self) -> None:
        self.process = self.runs = self.seen = 0
        self.running = False
        self.since = 0.0

    def start(self) -> None:
        """Timers are not inherited: every process starts its own. Python's end takes the handler away first, and the
        signal would then kill."""
        atexit.register(self.stop)
        signal.signal(signal.SIGVTALRM, self.tick)
        signal.setitimer(signal.ITIMER_VIRTUAL, TICK, TICK)
        self.process = os.getpid()

    def stop(self) -> None:
        atexit.unregister(self.stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        self.process = 0

    def tick(self, *_: object) -> None:
        """The timer counts all threads; the limit is of this one's time."""
        if self.seen != self.runs:
            self.seen, self.since = self.runs, time.thread_time()
        elif not self.running:
            self.stop()
        elif time.thread_time() - self.since >= MAX_SECONDS:
            raise TimeoutError(f"it ran for more than {MAX_SECONDS:g} s")


_watch = _Watch()


def limited(work: Callable[..., Any], given: Any) -> Any:
    """work(given), or TimeoutError. Without a limit outside the main thread: no other hears of signals."""
    if threading.current_thread() is not threading.main_thread():
        return work(given)
    if _watch.process != os.getpid():
        _watch.start()
    _watch.runs += 1
    _watch.running = True
    try:
        return work(given)
    finally:
        _watch.running = False
