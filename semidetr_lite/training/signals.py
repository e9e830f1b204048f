"""Ctrl-C and SIGTERM.

A run ends its step and saves, and what may be broken off is broken off at once.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from semidetr_lite import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TORCHRUN_REPEATS_WITHIN = 5  # seconds in which torchrun sends a signal of the user once more


class SignalHandler:
    """While inside, the first Ctrl-C or SIGTERM is noted in `requested`; a second one stops.

    `status` is the exit status that goes with the signal.
    """

    def __init__(self):
        self.requested, self.deferred, self.status = False, True, 130
        self.first_at = 0.0  # seconds on the monotonic clock
        self.previous: dict = {}

    def __enter__(self) -> "SignalHandler":
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python handles signals only there
            self.previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _) -> None:
        grace = TORCHRUN_REPEATS_WITHIN if distributed.world_size() > 1 else 0
        again = self.requested and time.monotonic() > self.first_at + grace
        if not self.requested:
            self.first_at = time.monotonic()
        self.requested, self.status = True, 128 + number
        if again or not self.deferred:
            self.interrupt()

    def interrupt(self) -> None:
        """Stop the program now."""
        raise KeyboardInterrupt

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What is done inside is broken off by the first signal."""
        self.deferred = False
        try:
            if self.requested:
                self.interrupt()
            yield
        finally:
            self.deferred = True


def ignore_signals(worker: int) -> None:
    """In a process that loads data.

    Signals may reach a whole group of processes, and the run handles them.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
