"""What is printed: no path, name or message is taken for markup, and long work shows where it is without a terminal."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal."""


def console(*, stderr: bool = True) -> Console:
    """Prints text as it is; into a file, tables as wide as they need to be."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 160
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


class Work:
    """Long work: a bar in a terminal, elsewhere a line every half a minute; with no console nothing is shown."""

    def __init__(self, title: str, *, total: int | None, done: int = 0, console: Console | None) -> None:
        self.title, self.total, self.first, self.console = title, total, done, console
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = console is not None and console.is_terminal
        self.bar = Progress(*columns, console=console, transient=True, disable=not shown)
        self.task = self.bar.add_task(title, total=total, completed=done)

    def __enter__(self) -> Self:
        self.began = self.said = time.monotonic()
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def show(self, done: int, text: str = "") -> None:
        """So much is done; `text` says more."""
        self.bar.update(self.task, completed=done, description=text or self.title)
        now = time.monotonic()
        if self.console is None or self.console.is_terminal or now - self.said < EVERY:
            return
        parts = [f"{self.title}: {done}" + ("" if self.total is None else f" of {self.total}"), text]
        if self.total is not None and done > self.first:
            left = round((now - self.began) / (done - self.first) * (self.total - done))
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        self.console.print(", ".join(part for part in parts if part), soft_wrap=True)
        self.said = now


def track(items: Iterable[T], title: str, *, console: Console | None, total: int | None = None) -> Iterator[T]:
    """The items, while `Work` shows how many are done."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with Work(title, total=total, console=console) as work:
        for done, item in enumerate(items):
            work.show(done)
            yield item
