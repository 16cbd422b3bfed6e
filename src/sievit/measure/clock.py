"""The clock: runs in turns, and the figures of pairs."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
C = TypeVar("C")


class Pair(NamedTuple, Generic[C]):
    """A dense and a sparse run on the same images: milliseconds, and what is kept of what came of it."""

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
    """Both calls on each input, in turns as to which comes first.

    Args:
        dense, sparse: what is timed, and what is kept of its result, which is found out at once and not timed: graphs
            overwrite their results.
        warm_up: calls of each before the first that is timed.
        warm_on: on so many of the inputs.
    """
    for images in inputs[:warm_on]:
        for call, _ in (dense, sparse) * warm_up:
            call(images)
    pairs = []
    for i, images in enumerate(inputs):
        done = {}
        for side in (0, 1) if i % 2 else (1, 0):
            call, kept = (dense, sparse)[side]
            elapsed, result = clocked(lambda call=call, images=images: call(images), device)
            done[side] = (elapsed, kept(result))
        (dense_ms, of_dense), (sparse_ms, of_sparse) = done[0], done[1]
        pairs.append(Pair(dense_ms, sparse_ms, of_dense, of_sparse))
    return pairs


def summary(pairs: Sequence[Pair], predicted: Sequence[float]) -> dict[str, Any]:
    """Medians over the pairs, and their spread; `predicted` is the ratio of multiply-adds of each pair."""
    ratios = [pair.dense_ms / pair.sparse_ms for pair in pairs]
    shares = [a / b for a, b in zip(ratios, predicted, strict=True)]
    figures: dict[str, Any] = {}
    for name in ("dense_ms", "sparse_ms"):
        ordered = sorted(getattr(pair, name) for pair in pairs)
        figures[name] = round(statistics.median(ordered), 2)
        figures[f"{name}_p95"] = round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2)
    return {
        **figures,
        "speedup": round(statistics.median(ratios), 3),
        "predicted": round(statistics.median(predicted), 3),
        "realised": round(statistics.median(shares), 3),
        "realised_quartiles": [round(q, 3) for q in statistics.quantiles(shares, n=4)[::2]],
        "pairs": len(pairs),
    }


def clocked(call: Callable[[], R], device: torch.device) -> tuple[float, R]:
    """Milliseconds that a call took, and what it returned."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3, result


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
