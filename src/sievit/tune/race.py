"""All candidates against the dense model, in every mode that may differ in time."""

from dataclasses import dataclass, replace

from sievit.measure.clock import Quartiles
from sievit.measure.modes import DENSE
from sievit.tune.candidates import Candidate, Say, modes_of
from sievit.tune.options import Tuning
from sievit.tune.targets import MaxMilliseconds, Target
from sievit.tune.workload import Setup, Workload


@dataclass(frozen=True)
class Times:
    """Milliseconds per image of runs in turns.

    Attributes:
        dense: of the dense model, uncompiled and perhaps compiled.
        other: of another setup.
    """

    dense: list[list[float]]
    other: list[float]

    @property
    def ratio(self) -> Quartiles:
        """To the dense model that it is harder to be faster than."""
        ratios = [Quartiles.of_ratios(dense, self.other) for dense in self.dense]
        return min(ratios, key=lambda ratio: ratio.low)


@dataclass(frozen=True)
class Outcome:
    """The result of a race.

    Attributes:
        chosen: None where it is the dense model.
        setup: what is written, and `times` of its last race.
        candidates: all that there were, with the times of those that ran in `raced`, by their id.
    """

    chosen: Candidate | None
    setup: Setup
    why: str
    times: Times
    candidates: list[Candidate]
    raced: dict[int, Times]


def dense_setups(workload: Workload, tuning: Tuning) -> list[Setup]:
    """The dense model as it can be run: uncompiled and, with `tuning.compile`, compiled."""
    return [workload.setup(DENSE, compiled=compiled) for compiled in (False, True)[: 1 + tuning.compile]]


def run_race(
    workload: Workload, candidates: list[Candidate], target: Target, tuning: Tuning, why: str, say: Say
) -> Outcome:
    """The candidates against the dense model, in turns."""
    setups = dense_setups(workload, tuning)
    competing = [c for c in candidates if not c.is_dense]
    ran = [c for c in candidates if c.is_dense]
    raced: dict[int, Times] = {}
    dense: list[list[float]] = []
    while competing:
        running = [each for c in competing for each in _in_all_modes(c, workload, tuning)]
        running.sort(key=lambda c: c.execution.compiled)  # last, so that within the noise nothing is compiled
        ran += running
        say(f"racing: dense, {', '.join(c.name for c in running)}")
        times = workload.race([*setups, *(c.setup for c in running)], tuning.repeats)
        dense = times[: len(setups)]
        raced |= {id(c): Times(dense, other) for c, other in zip(running, times[len(setups) :], strict=True)}
        wins = [c for c in running if raced[id(c)].ratio.low > 1]
        while wins:
            best = _best(wins, raced, target, workload)
            say(f"once more: dense, {best.name}")  # the winner of many may have been lucky
            *dense, other = workload.race([*setups, best.setup], tuning.repeats)
            last = Times(dense, other)
            if last.ratio.low > 1:
                why = _reason(best, wins, raced, last.ratio)
                return Outcome(best, best.setup, why, last, ran, raced | {id(best): last})
            wins = [c for c in wins if c is not best]
        why = "no policy was faster than the dense model by more than the noise"
        competing = [c for c in (_cautious(c, target) for c in competing) if c is not None]
    dense = dense or workload.race(setups, tuning.repeats)
    which = 0
    if len(dense) > 1 and (ratio := Quartiles.of_ratios(*dense)).low > 1:
        which, why = 1, f"{why}; compiled it is {ratio.median:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"
    return Outcome(None, setups[which], why, Times(dense, dense[which]), ran, raced)


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


def _best(wins: list[Candidate], raced: dict[int, Times], target: Target, workload: Workload) -> Candidate:
    """The fastest, the first (dynamic) where it is within the noise; at a target time the one that computes most."""
    if isinstance(target, MaxMilliseconds):
        return max(wins, key=lambda c: workload.cost(c.config).gflops)
    best = wins[0]
    for other in wins[1:]:
        if Quartiles.of_ratios(raced[id(best)].other, raced[id(other)].other).low > 1:
            best = other
    return best


def _reason(best: Candidate, wins: list[Candidate], raced: dict[int, Times], ratio: Quartiles) -> str:
    """Why it was chosen: its `ratio` to the dense model, and to the other winners of the race."""
    times = raced[id(best)]
    text = f"{best.name} is {ratio.median:.2f} times as fast as dense ({ratio.low:.2f} to {ratio.high:.2f})"
    if len(times.dense) > 1:
        text += ", compiled or not"
    for other in wins:
        if other is not best:
            to = Quartiles.of_ratios(raced[id(other)].other, times.other)
            text += f", and {to.median:.2f} times as fast as {other.name} ({to.low:.2f} to {to.high:.2f})"
    return text
