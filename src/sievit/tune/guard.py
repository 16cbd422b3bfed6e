"""Which blocks are faster with tokens left out: each alone, on what really comes to it."""

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sievit.policies import Policy, PolicyConfig
from sievit.tokens import Tokens, Trace
from sievit.tune.kinds import Kind, Run
from sievit.tune.subject import Part, Ratio, Subject

CANVASES = 5
"""Batches on which blocks are timed. Of several runs on each the best counts: what else the machine does only adds."""


@dataclass(frozen=True)
class Verdict:
    """What the clock says of a run of blocks.

    Attributes:
        part: the blocks.
        dense_ms, pruned_ms: of a batch, medians over the batches.
        ratio: dense time by pruned time, batch by batch.
    """

    part: Part
    dense_ms: float
    pruned_ms: float
    ratio: Ratio

    def to_json(self, *, dense: bool) -> dict[str, Any]:
        return {
            "blocks": [self.part.start, self.part.stop - 1],
            "dense_ms": round(self.dense_ms, 3),
            "pruned_ms": round(self.pruned_ms, 3),
            "speedup": self.ratio.to_json(),
            "dense": dense,
        }


def judge(subject: Subject, kind: Kind, config: PolicyConfig, rounds: int) -> list[Verdict]:
    """Every place at which a policy leaves tokens out, pruned against dense, alternately and warm.

    Where tokens leave for good, the last place is judged first, those before it with what was found behind them, and
    all once more when one of them was found to lose.
    """
    places = kind.places(config)
    if not kind.whole:
        return _judge(subject, kind, config, places, (), rounds)
    verdicts: dict[Part, Verdict] = {}
    off: set[int] = set()
    while True:
        before = set(off)
        for place in reversed(places):
            if place.start not in off:
                (verdicts[place],) = _judge(subject, kind, config, [place], off, rounds)
                if loses(verdicts[place]):
                    off.add(place.start)
        if off == before or len(off) == len(places):
            return [verdicts[place] for place in places]


def loses(verdict: Verdict) -> bool:
    """Whether the blocks are slower with tokens left out."""
    return verdict.ratio.median <= 1


def unsure(verdict: Verdict) -> bool:
    """Whether they are not faster by more than the noise."""
    return verdict.ratio.low <= 1


def _judge(
    subject: Subject, kind: Kind, config: PolicyConfig, places: list[Part], off: Collection[int], rounds: int
) -> list[Verdict]:
    device = subject.model.device
    used = subject.batches[:CANVASES]
    repeats = max(3, -(-rounds // len(used)))
    taken: dict[Part, tuple[list[float], list[float]]] = {place: ([], []) for place in places}
    recorder = _Recorder(subject.policy(kind.without(config, off)))
    runs = {place: kind.runs(config, place, off) for place in places}
    for batch in subject.watched(used, "blocks", len(used)):
        recorder.seen.clear()
        subject.answer(recorder, batch)
        for place in places:
            for tokens, trace in recorder.seen[place.start]:  # more than one where there are many windows
                best = [math.inf, math.inf]
                for turn in range(-1, repeats):  # the first only warms up
                    for which in (0, 1) if turn % 2 else (1, 0):
                        given, run = replace(tokens, x=tokens.x.clone()), runs[place][which]

                        def call(given: Tokens = given, run: Run = run, trace: Trace = trace) -> object:
                            with subject.execution.autocast(device):
                                return run(given, trace)

                        if turn < 0:
                            call()
                            continue
                        what = replace(place, pruned=which == 1)
                        best[which] = min(best[which], subject.clock(what, call, device)[0])
                for side, value in zip(taken[place], best, strict=True):
                    side.append(value)
    return [
        Verdict(place, statistics.median(dense), statistics.median(pruned), Ratio.of(dense, pruned))
        for place, (dense, pruned) in taken.items()
    ]


class _Recorder(Policy):
    """Another policy, and what it was shown before each block."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.seen: dict[int, list[tuple[Tokens, Trace]]] = {}

    def decides_at(self, index: int) -> bool:
        return self.policy.decides_at(index)

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Tensor]]:
        kept = replace(tokens, x=tokens.x.clone())  # blocks may write into it
        self.seen.setdefault(index, []).append((kept, trace))
        return self.policy.before_block(index, tokens, trace)

    def after_blocks(self, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Tensor]]:
        return self.policy.after_blocks(tokens, trace)
