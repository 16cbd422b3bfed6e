"""One piece of work at a time, and a short line of those that wait for it."""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

R = TypeVar("R")


class Refused(Exception):  # no mistake of the program
    """What a client is told, and with which HTTP status."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def too_large(max_bytes: int) -> Refused:
    """For a file of more bytes."""
    return Refused(413, f"the file is too large; at most {max_bytes / 1e6:.3g} MB are taken")


class Desk:
    """Runs work in one thread, for one client after the other.

    Args:
        waiting: so many may wait while one is served; the next is refused.
        seconds: nobody waits longer for the turn.
    """

    def __init__(self, waiting: int, seconds: float) -> None:
        self.waiting, self.seconds, self.inside = waiting, seconds, 0
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    @contextmanager
    def place(self) -> Generator[None]:
        """A place in the line, from before the image is received.

        Raises:
            Refused: there is none.
        """
        if self.inside > self.waiting:
            raise self._busy()
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def serve(self, work: Callable[[], R]) -> R:
        """The result of the work, when it is its turn; for who has a `place`.

        Cancelled, it leaves the line; work that has begun is finished all the same, and the next waits for the thread.

        Raises:
            Refused: the turn did not come.
        """
        try:
            await asyncio.wait_for(self._turn.acquire(), self.seconds)
        except TimeoutError as error:
            raise self._busy() from error
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._turn.release()

    def _busy(self) -> Refused:
        return Refused(503, "others are being served; please try again in a few seconds", Retry_After="5")
