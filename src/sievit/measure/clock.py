"""The clock: calls in turns on the same inputs, and the figures of their times."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    kept: Callable[[int, R], C],
) -> Iterator[list[tuple[float, C]]]:
    """All calls on each input, one after the other; with each input another call is the first.

    Args:
        clock: the index of a call and the call on an input, to its milliseconds and its result.
        kept: the index of a call and its result, to what is yielded of it. It runs right after the call and is not
            timed: a CUDA graph overwrites its result.

    Yields:
        Of each input milliseconds and what is kept, call by call.
    """
    for turn, value in enumerate(inputs):
        taken: dict[int, tuple[float, C]] = {}
        for place in range(len(calls)):
            which = (place + turn) % len(calls)
            call = calls[which]
            elapsed, result = clock(which, lambda call=call, value=value: call(value))
            taken[which] = elapsed, kept(which, result)
        yield [taken[which] for which in range(len(calls))]


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
    turns = in_turns(
        [call for call, _ in sides],
        inputs,
        clock=lambda _, call: clocked(call, device),
        kept=lambda which, result: sides[which][1](result),
    )
    return [Pair(a_ms, b_ms, a, b) for (a_ms, a), (b_ms, b) in turns]


def summary(pairs: Sequence[Pair], predicted: Sequence[float]) -> dict[str, Any]:
    """Medians over the pairs, and their spread; `predicted` is the ratio of multiply-adds of each pair."""
    ratios = [pair.dense_ms / pair.sparse_ms for pair in pairs]
    realised = Quartiles.of([a / b for a, b in zip(ratios, predicted, strict=True)])
    return {
        **median_and_p95("dense_ms", [pair.dense_ms for pair in pairs]),
        **median_and_p95("sparse_ms", [pair.sparse_ms for pair in pairs]),
        "speedup": round(statistics.median(ratios), 3),
        "predicted": round(statistics.median(predicted), 3),
        "realised": round(realised.median, 3),
        "realised_quartiles": [round(realised.low, 3), round(realised.high, 3)],
        "pairs": len(pairs),
    }
