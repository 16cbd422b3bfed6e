"""A policy with dynamic and with static counts, each turned to the target, without the blocks that are faster dense.

All of them race against the dense model, in every mode that may differ in time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sievit.config import ConfigError, kind_of
from sievit.measure.clock import Quartiles
from sievit.measure.modes import DENSE, RunMode
from sievit.policies import PolicyConfig
from sievit.tune.options import Tuning
from sievit.tune.targets import Found, Limit, MaxDrop, MaxMilliseconds, Target, Variant
from sievit.tune.workload import BlockTiming, Setup, Workload, time_blocks
from sievit.vit.execution import Execution

Say = Callable[[str], None]


@dataclass(frozen=True)
class Times:
    """Milliseconds per image of runs in turns.

    Attributes:
        dense: of the dense model, uncompiled and perhaps compiled.
        other: of another setup.
    """

    dense: Sequence[Sequence[float]] = ()
    other: Sequence[float] = ()

    @property
    def ratio(self) -> Quartiles:
        """To the dense model that it is harder to be faster than."""
        ratios = [Quartiles.of_ratios(dense, self.other) for dense in self.dense]
        return min(ratios, key=lambda ratio: ratio.low)


@dataclass(frozen=True)
class Candidate:
    """A variant of the policy, turned to the target, and how it is run.

    Attributes:
        timings: of its ranges of blocks.
        dense: first blocks of the ranges in which it leaves no token out.
        times: in the last race that it was in.
    """

    variant: Variant
    found: Found
    timings: list[BlockTiming]
    dense: set[int]
    execution: Execution
    times: Times = Times()

    @property
    def name(self) -> str:
        """Its mode."""
        return RunMode(self.variant.counts, self.execution).name

    @property
    def setup(self) -> Setup:
        return Setup(self.found.config, self.execution)

    @property
    def is_dense(self) -> bool:
        """Whether no range of blocks is left in which tokens could be left out."""
        return bool(self.timings) and len(self.dense) == len(self.timings)

    def again(self, target: Target, dense: set[int]) -> "Candidate":
        """Turned to the target once more, with more blocks dense."""
        start = self.found.config if self.variant.counts == "static" else None
        found = target.find(self.variant, dense, start)
        return replace(self, found=replace(found, tried=self.found.tried + found.tried), dense=dense)


def modes_of(workload: Workload, tuning: Tuning) -> tuple[str, ...]:
    """The modes to be compared; buckets, if they are not asked for, only where their few shapes become graphs."""
    graphs = tuning.compile and workload.model.device.type == "cuda"
    return tuning.modes or (("dynamic", "bucketed", "static") if graphs else ("dynamic", "static"))


def check_modes(workload: Workload, tuning: Tuning) -> tuple[PolicyConfig, list[Literal["dynamic", "static"]]]:
    """The model's policy with dynamic counts, and which of its variants are to be compared.

    Raises:
        ConfigError: a policy that computes every token, or that has none of the modes.
    """
    config, modes = workload.model.config.policy, modes_of(workload, tuning)
    if config == DENSE:
        raise ConfigError(
            f"the policy {kind_of(config)!r} has nothing to tune: it computes every token; give a model that leaves "
            "some out, or another policy by --policy"
        )
    base = workload.policy(config).dynamic()
    policy = workload.policy(base)
    static = policy.made_static([1.0] * policy.depth) is not None
    there = ["dynamic", *["bucketed"] * policy.is_ragged, *["static"] * static]
    if not set(there) & set(modes):
        raise ConfigError(f"--modes {' '.join(modes)}: the policy {kind_of(config)!r} has {', '.join(there)}")
    variants: list[Literal["dynamic", "static"]] = []
    if "dynamic" in modes or ("bucketed" in modes and policy.is_ragged):
        variants.append("dynamic")
    return base, [*variants, "static"] if static and "static" in modes else variants


def candidates_of(workload: Workload, target: Target, tuning: Tuning, say: Say) -> tuple[list[Candidate], str]:
    """Each variant turned to the target, and why there is none, if so.

    Raises:
        ConfigError: no setting of any variant reaches the target, or the policy has no dial to reach it.
    """
    base, variants = check_modes(workload, tuning)
    if target.dense_suffices():
        return [], "the dense model meets the target"
    candidates: list[Candidate] = []
    missed, why = [], ""
    dynamic: Found | None = None
    for counts in variants:
        variant = Variant(workload, counts, base if dynamic is None else dynamic.config, tuning)
        say(f"{counts}: turning the dial")
        found = target.find(variant, start=None if dynamic is None else variant.config)
        if isinstance(target, MaxDrop) and not found.met:
            why = "every setting that was tried loses more accuracy than it may"
            continue
        if counts == "dynamic":
            dynamic = found
        say(f"{counts}: blocks, dense against pruned")
        timings = time_blocks(workload, found.config, tuning.repeats)
        dense = {timing.blocks.start for timing in timings if timing.is_slower}
        candidate = Candidate(variant, found, timings, dense, workload.execution)
        if candidate.is_dense:
            why = "every block is slower with tokens left out"
        elif dense:
            candidate = candidate.again(target, dense)
        if candidate.found.met or candidate.is_dense:
            candidates.append(candidate)
        elif isinstance(target, Limit):
            missed.append(target.unreachable(candidate.found, candidate.dense))
    if missed and not candidates:
        raise ConfigError(missed[0])
    return candidates, why


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
    if executions and variant.is_ragged and workload.keeps_different_counts(candidate.found.config):
        executions.append(replace(plain, attention="batched"))
    if variant.is_ragged and "bucketed" in modes:
        executions.append(replace(plain, mode="bucketed"))
    if tuning.compile:
        few_shapes = [each for each in executions if variant.is_static or each.mode == "bucketed"]
        executions += [replace(each, compiled=True) for each in few_shapes]
    return [replace(candidate, execution=each) for each in executions]


def _cautious(candidate: Candidate, target: Target) -> Candidate | None:
    """The same with all blocks dense that are not clearly faster; None where that changes nothing, or is dense."""
    dense = candidate.dense | {timing.blocks.start for timing in candidate.timings if timing.ratio.low <= 1}
    if dense == candidate.dense or len(dense) >= len(candidate.timings):
        return None
    cautious = candidate.again(target, dense)
    return cautious if cautious.found.met else None


def _best(wins: list[Candidate], target: Target, workload: Workload) -> Candidate:
    """The fastest, the first (dynamic) where it is within the noise; at a target time the one that computes most."""
    if isinstance(target, MaxMilliseconds):
        return max(wins, key=lambda c: workload.cost(c.found.config).gflops)
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
