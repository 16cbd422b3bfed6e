"""What is printed: no path, name or message is taken for markup, and long work shows where it is without a terminal."""

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal."""


def console(*, stderr: bool = True) -> Console:
    """Prints text as it is."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def progress(console: Console, *, shown: bool = True) -> Progress:
    """The bar of every long work; nothing where there is no terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


def track(items: Iterable[T], title: str, *, console: Console | None, total: int | None = None) -> Iterator[T]:
    """The items, while a bar shows how many are done; without a terminal a line does, every half a minute."""
    if console is None:
        yield from items
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    if console.is_terminal:
        with progress(console) as bar:
            yield from bar.track(items, total=total, description=title)
        return
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said >= EVERY:
            console.print(f"{title}: {done}{remaining(done, total, now - started)}", soft_wrap=True)
            said = now
        yield item


def remaining(done: int, total: int | None, seconds: float) -> str:
    """How many there are, and how long the rest takes at the rate of the first `done` in `seconds`."""
    if total is None or not done:
        return ""
    left = round(seconds / done * (total - done))
    return f" of {total}, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
