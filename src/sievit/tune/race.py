"""All candidates against the dense model, in every mode that may differ in time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sievit.measure.clock import Quartiles
from sievit.measure.modes import DENSE
from sievit.tune.candidates import Candidate, Say, Times, modes_of
from sievit.tune.options import Tuning
from sievit.tune.targets import MaxMilliseconds, Target
from sievit.tune.workload import Setup, Workload


@dataclass(frozen=True)
class Outcome:
    """The result of a race.

    Attributes:
        chosen: None where it is the dense model.
        setup: what is written, and `times` of its last race.
        candidates: all that there were.
    """

    chosen: Candidate | None
    setup: Setup
    why: str
    times: Times
    candidates: list[Candidate]


def dense_setups(workload: Workload, tuning: Tuning) -> list[Setup]:
    """The dense model as it can be run: uncompiled and, with `tuning.compile`, compiled."""
    return [workload.setup(DENSE, compiled=compiled) for compiled in (False, True)[: 1 + tuning.compile]]


def run_race(
    workload: Workload, candidates: list[Candidate], target: Target, tuning: Tuning, why: str, say: Say
) -> Outcome:
    """The candidates against the dense model, in turns."""
    setups, ran = dense_setups(workload, tuning), [c for c in candidates if c.is_dense]

    def race(running: list[Candidate]) -> tuple[Sequence[Sequence[float]], list[Candidate]]:
        times = workload.race([*setups, *(c.setup for c in running)], tuning.repeats)
        dense, others = times[: len(setups)], times[len(setups) :]
        return dense, [replace(c, times=Times(dense, other)) for c, other in zip(running, others, strict=True)]

    dense: Sequence[Sequence[float]] = ()
    competing = [c for c in candidates if not c.is_dense]
    while competing:
        running = [each for c in competing for each in _in_all_modes(c, workload, tuning)]
        running.sort(key=lambda c: c.execution.compiled)  # last, so that within the noise nothing is compiled
        say(f"racing: dense, {', '.join(c.name for c in running)}")
        dense, running = race(running)
        wins = [c for c in running if c.times.ratio.low > 1]
        while wins:
            best = _best(wins, target, workload)
            say(f"once more: dense, {best.name}")  # the winner of many may have been lucky
            dense, (again,) = race([best])
            if again.times.ratio.low > 1:
                ran += [again if c is best else c for c in running]
                return Outcome(again, best.setup, _reason(best, wins, again.times.ratio), again.times, ran)
            wins = [c for c in wins if c is not best]
        ran += running
        why = "no policy was faster than the dense model by more than the noise"
        competing = [c for c in (_cautious(c, target) for c in competing) if c is not None]
    dense = dense or workload.race(setups, tuning.repeats)
    which = 0
    if len(dense) > 1 and (ratio := Quartiles.of_ratios(*dense)).low > 1:
        which, why = 1, f"{why}; compiled it is {ratio.median:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"
    return Outcome(None, setups[which], why, Times(dense, dense[which]), ran)


def _in_all_modes(candidate: Candidate, workload: Workload, tuning: Tuning) -> list[Candidate]:
    """The same policy in all modes that may differ in time."""
    variant, plain, modes = candidate.variant, candidate.execution, modes_of(workload, tuning)
    executions = [plain] if variant.counts in modes else []
    if executions and variant.is_ragged and workload.keeps_different_counts(candidate.config):
        executions.append(replace(plain, attention="batched"))
    if variant.is_ragged and "bucketed" in modes:
        executions.append(replace(plain, mode="bucketed"))
    if tuning.compile:
        few_shapes = [each for each in executions if variant.is_static or each.mode == "bucketed"]
        executions += [replace(each, compiled=True) for each in few_shapes]
    return [replace(candidate, execution=each) for each in executions]


def _cautious(candidate: Candidate, target: Target) -> Candidate | None:
    """The same with all blocks dense that are not clearly faster; None where that changes nothing, or is dense."""
    dense = candidate.dense | {timing.blocks.start for timing in candidate.timings if timing.is_uncertain}
    if dense == candidate.dense or len(dense) >= len(candidate.timings):
        return None
    cautious = candidate.again(target, dense)
    return cautious if cautious.found.met else None


def _best(wins: list[Candidate], target: Target, workload: Workload) -> Candidate:
    """The fastest, the first (dynamic) where it is within the noise; at a target time the one that computes most."""
    if isinstance(target, MaxMilliseconds):
        return max(wins, key=lambda c: workload.cost(c.config).gflops)
    best = wins[0]
    for other in wins[1:]:
        if Quartiles.of_ratios(best.times.other, other.times.other).low > 1:
            best = other
    return best


def _reason(best: Candidate, wins: list[Candidate], ratio: Quartiles) -> str:
    """Why it was chosen: its `ratio` to the dense model, and to the other winners of the race."""
    text = f"{best.name} is {ratio.median:.2f} times as fast as dense ({ratio.low:.2f} to {ratio.high:.2f})"
    if len(best.times.dense) > 1:
        text += ", compiled or not"
    for other in wins:
        if other is not best:
            to = Quartiles.of_ratios(other.times.other, best.times.other)
            text += f", and {to.median:.2f} times as fast as {other.name} ({to.low:.2f} to {to.high:.2f})"
    return text
