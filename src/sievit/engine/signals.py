"""SIGINT and SIGTERM stop a run after its state is saved."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after its state was saved; the message says how to go on."""


class Stop:
    """Whether SIGINT or SIGTERM came. A second SIGINT stops at once."""

    def __init__(self, advice: str) -> None:
        self.advice = f"go on with {advice}"
        self.received = self._nothing_to_save = False

    @contextmanager
    def at_once(self) -> Generator[None]:
        """Around work that changes nothing of the saved state: signals interrupt it."""
        self._nothing_to_save = True
        try:
            if self.received:
                raise Interrupted(f"stopped; {self.advice}")
            yield
        finally:
            self._nothing_to_save = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        if self._nothing_to_save:
            raise Interrupted(f"stopped; {self.advice}")


@contextmanager
def stopping(advice: str) -> Generator[Stop]:
    """Handle SIGINT and SIGTERM meanwhile."""
    stop = Stop(advice)
    try:
        before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where no signal arrives
        yield stop
        return
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
