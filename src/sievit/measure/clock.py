"""The clock: calls in turns on the same inputs, and the figures of their times."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
C = TypeVar("C")


@dataclass(frozen=True)
class Quartiles:
    """Median, first and third quartile of some values, interpolated between them."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    @classmethod
    def of_ratios(cls, slow: Sequence[float], fast: Sequence[float]) -> "Quartiles":
        """Of times on the same inputs, one by the other, pair by pair."""
        return cls.of([a / b for a, b in zip(slow, fast, strict=True)])

    def to_json(self) -> dict[str, Any]:
        return {"median": round(self.median, 3), "quartiles": [round(self.low, 3), round(self.high, 3)]}


def median_and_p95(name: str, milliseconds: Sequence[float], digits: int = 2) -> dict[str, float]:
    """`name`, the median of some times, and `name`_p95, the time that 95 of 100 do not exceed."""
    ordered = sorted(milliseconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {name: round(statistics.median(ordered), digits), f"{name}_p95": round(p95, digits)}


def clocked(call: Callable[[], R], device: torch.device) -> tuple[float, R]:
    """Milliseconds that a call took, and what it returned."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3, result


def synchronise(device: torch.device) -> None:
    """Wait until a device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    calls: Sequence[Callable[[T], R]],
    inputs: Iterable[T],
    clock: Callable[[int, Callable[[], R]], tuple[float, R]],
    kept: Callable[[int, R], Any] = lambda which, result: None,
) -> list[list[tuple[float, Any]]]:
    """All calls on each input, one after the other; with each input another call is the first.

    Args:
        clock: the index of a call and the call on an input, to its milliseconds and its result.
        kept: the index of a call and its result, to what is returned of it. It runs right after the call and is not
            timed: a CUDA graph overwrites its result.

    Returns:
        Of each call milliseconds and what is kept, input by input.
    """
    taken: list[list[tuple[float, Any]]] = [[] for _ in calls]
    for turn, value in enumerate(inputs):
        for place in range(len(calls)):
            which = (place + turn) % len(calls)
            elapsed, result = clock(which, partial(calls[which], value))
            taken[which].append((elapsed, kept(which, result)))
    return taken


class Pair(NamedTuple, Generic[C]):
    """A dense and a sparse run on the same input: milliseconds, and what is kept of the results."""

    dense_ms: float
    sparse_ms: float
    dense: C
    sparse: C


def alternately(
    dense: tuple[Callable[[T], R], Callable[[R], C]],
    sparse: tuple[Callable[[T], R], Callable[[R], C]],
    inputs: Sequence[T],
    device: torch.device,
    *,
    warm_up: int = 2,
    warm_on: int = 1,
) -> list[Pair[C]]:
    """Both calls on each input, in turns.

    Args:
        dense, sparse: what is timed, and what is kept of its result.
        warm_up: calls of each before the first that is timed.
        warm_on: on so many of the inputs.
    """
    sides = (dense, sparse)
    for value in inputs[:warm_on]:
        for call, _ in sides * warm_up:
            call(value)
    taken = in_turns(
        [call for call, _ in sides],
        inputs,
        clock=lambda _, call: clocked(call, device),
        kept=lambda which, result: sides[which][1](result),
    )
    return [Pair(a_ms, b_ms, a, b) for (a_ms, a), (b_ms, b) in zip(*taken, strict=True)]
