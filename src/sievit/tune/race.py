"""Policies turned to a target, and their race against the dense model in all the ways to run them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sievit.config import ConfigError
from sievit.policies import PolicyConfig
from sievit.tune.goals import Aim, AsItIs, Drop, Found, Milliseconds, Operations
from sievit.tune.guard import Verdict, judge, loses, unsure
from sievit.tune.kinds import Kind, StaticExits, StaticGates, Turn
from sievit.tune.options import Tuning
from sievit.tune.subject import DENSE, Ratio, Setup, Subject
from sievit.vit.execution import Execution


@dataclass
class Candidate:
    """A policy in one mode, tuned, and how it is run."""

    kind: Kind
    found: Found
    verdicts: list[Verdict]
    off: set[int]
    execution: Execution

    @property
    def name(self) -> str:
        """The mode, as the benches call it."""
        mode = "bucketed" if self.execution.mode == "bucketed" else self.kind.mode
        return mode + "_batched" * (self.execution.attention == "batched") + "_compiled" * self.execution.compiled

    @property
    def setup(self) -> Setup:
        return Setup(self.config, self.execution)

    @property
    def config(self) -> PolicyConfig:
        return self.found.config


@dataclass(frozen=True)
class Times:
    """Milliseconds per image of the dense model, as it stands and perhaps compiled, and of another setup, in turns."""

    dense: list[list[float]]
    own: list[float]

    @property
    def ratio(self) -> Ratio:
        """Of the dense model that it is harder to be faster than."""
        return min((Ratio.of(dense, self.own) for dense in self.dense), key=lambda ratio: ratio.low)


@dataclass(frozen=True)
class Outcome:
    """Who won.

    Attributes:
        chosen: None where it is the dense model.
        setup: what is written, and `times` its last race.
        candidates: all that there were, with the times of those that ran in `raced`, by their id.
    """

    chosen: Candidate | None
    setup: Setup
    why: str
    times: Times
    candidates: list[Candidate]
    raced: dict[int, Times]


def candidates_of(
    subject: Subject, ways: Sequence[Kind], aim: Aim, tuning: Tuning, say: Callable[[str], None]
) -> tuple[list[Candidate], str]:
    """Each mode turned to the target, and why there is none, if so.

    Raises:
        ConfigError: no setting of any mode reaches the target.
    """
    if aim.dense_suffices():
        return [], "the dense model meets the target"
    candidates, missed, why = [], [], ""
    before: Found | None = None
    for kind in ways:
        if before is not None and isinstance(kind, StaticGates | StaticExits):
            kind.calibrate(before.config)
        say(f"{kind.mode}: turning the dial")
        own = kind.own()
        found = aim.find(_dials(kind, aim), own, lambda config: config, start=None if before is None else own)
        if isinstance(aim, Drop) and not found.met:
            why = "every setting that was tried loses more accuracy than it may"
            continue
        if kind.mode == "dynamic":
            before = found
        say(f"{kind.mode}: blocks, dense against pruned")
        verdicts = judge(subject, kind, found.config, tuning.repeats)
        off = {verdict.part.start for verdict in verdicts if loses(verdict)}
        if verdicts and len(off) == len(verdicts):
            why = "every block is slower with tokens left out"
            candidates.append(Candidate(kind, found, verdicts, off, subject.execution))
            continue
        if off:
            found = _again(kind, aim, off, found)
        candidate = Candidate(kind, found, verdicts, off, subject.execution)
        if found.met:
            candidates.append(candidate)
        elif not isinstance(aim, Drop):
            missed.append(candidate)
    if missed and not candidates:
        raise ConfigError(_unreachable(aim, missed[0]))
    return candidates, why


def _dials(kind: Kind, aim: Aim) -> list[Turn]:
    return [] if isinstance(aim, AsItIs) else kind.dials()


def _again(kind: Kind, aim: Aim, off: set[int], before: Found) -> Found:
    """The dial once more, with some of the blocks dense."""
    start = before.config if isinstance(kind, StaticGates | StaticExits) else None
    found = aim.find(_dials(kind, aim), kind.own(), lambda config: kind.without(config, off), start=start)
    return replace(found, tried=before.tried + found.tried)


def _unreachable(aim: Aim, candidate: Candidate) -> str:
    """What is told of a target that no setting reaches."""
    least = min((step[aim.name] for step in candidate.found.tried), default=None)
    assert isinstance(aim, Milliseconds | Operations)
    blocks = f" (blocks {', '.join(map(str, sorted(candidate.off)))} are faster dense)" if candidate.off else ""
    return (
        f"--target-{aim.name} {aim.target:g}: out of reach; with hardly any tokens left the model takes {least:g}, "
        f"the dense one {aim.cost(DENSE):g}{blocks}; give a target in between, a smaller --size or a smaller model"
    )


def modes_of(subject: Subject, tuning: Tuning) -> tuple[str, ...]:
    """The modes that race; where nobody says, buckets do only where their few shapes become graphs."""
    graphs = tuning.compile and subject.model.device.type == "cuda"
    return tuning.modes or (("dynamic", "bucketed", "static") if graphs else ("dynamic", "static"))


def denses_of(subject: Subject, tuning: Tuning) -> list[Setup]:
    """The dense model, in all forms that are to be beaten."""
    plain = subject.plain(DENSE)
    return [plain, replace(plain, execution=replace(plain.execution, compiled=True))] if tuning.compile else [plain]


def _run_in_all_ways(candidate: Candidate, subject: Subject, tuning: Tuning) -> list[Candidate]:
    """The same policy in all the ways to run it that may differ in time."""
    kind, plain, modes = candidate.kind, candidate.execution, modes_of(subject, tuning)
    ways = [plain] if kind.mode in modes else []
    if ways and kind.ragged and subject.ragged(candidate.config):
        ways.append(replace(plain, attention="batched"))
    if kind.ragged and "bucketed" in modes:
        ways.append(replace(plain, mode="bucketed"))
    if tuning.compile:
        ways += [replace(way, compiled=True) for way in ways if kind.one_graph or way.mode == "bucketed"]
    return [replace(candidate, execution=way) for way in ways]


def run_race(
    subject: Subject, candidates: list[Candidate], aim: Aim, tuning: Tuning, why: str, say: Callable[[str], None]
) -> Outcome:
    """All that is left against the dense model, in turns."""
    denses = denses_of(subject, tuning)
    paying = [c for c in candidates if not c.verdicts or len(c.off) < len(c.verdicts)]
    ran = [c for c in candidates if c.verdicts and len(c.off) == len(c.verdicts)]
    raced: dict[int, Times] = {}
    dense: list[list[float]] = []
    while paying:
        running = [way for c in paying for way in _run_in_all_ways(c, subject, tuning)]
        running.sort(key=lambda c: c.execution.compiled)  # last, so that within the noise nothing is compiled
        ran += running
        say(f"racing: dense, {', '.join(c.name for c in running)}")
        times = subject.race([*denses, *(c.setup for c in running)], tuning.repeats)
        dense = times[: len(denses)]
        raced |= {id(c): Times(dense, own) for c, own in zip(running, times[len(denses) :], strict=True)}
        wins = [c for c in running if raced[id(c)].ratio.low > 1]
        while wins:
            best = _best(wins, raced, aim, subject)
            say(f"once more: dense, {best.name}")  # the winner of many may have been lucky
            *dense, own = subject.race([*denses, best.setup], tuning.repeats)
            last = Times(dense, own)
            if last.ratio.low > 1:
                why = _because(best, wins, raced, last.ratio)
                return Outcome(best, best.setup, why, last, ran, raced | {id(best): last})
            wins = [c for c in wins if c is not best]
        why = "no policy was faster than the dense model by more than the noise"
        paying = [c for c in (_cautious(c, aim) for c in paying) if c is not None]
    dense = dense or subject.race(denses, tuning.repeats)
    place = 0
    if len(dense) > 1 and (ratio := Ratio.of(*dense)).low > 1:
        place, why = 1, f"{why}; compiled it is {ratio.median:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"
    return Outcome(None, denses[place], why, Times(dense, dense[place]), ran, raced)


def _cautious(candidate: Candidate, aim: Aim) -> Candidate | None:
    """The same with every block dense that is not clearly faster; None where that changes nothing, or is dense."""
    kind = candidate.kind
    off = candidate.off | {verdict.part.start for verdict in candidate.verdicts if unsure(verdict)}
    if off == candidate.off or len(off) >= len(candidate.verdicts):
        return None
    found = _again(kind, aim, off, candidate.found)
    return replace(candidate, found=found, off=off) if found.met else None


def _best(wins: list[Candidate], raced: dict[int, Times], aim: Aim, subject: Subject) -> Candidate:
    """The faster one, the first (dynamic) where it is within the noise; at a time that was asked for the one that
    computes more."""
    if isinstance(aim, Milliseconds):
        return max(wins, key=lambda c: subject.spent(c.config).gflops)
    best = wins[0]
    for other in wins[1:]:
        if Ratio.of(raced[id(best)].own, raced[id(other)].own).low > 1:
            best = other
    return best


def _because(best: Candidate, wins: list[Candidate], raced: dict[int, Times], ratio: Ratio) -> str:
    """Why it was chosen: its `ratio` to the dense model, and how it did in the race with the others."""
    times = raced[id(best)]
    said = f"{best.name} is {ratio.median:.2f} times as fast as dense ({ratio.low:.2f} to {ratio.high:.2f})"
    if len(times.dense) > 1:
        said += ", compiled or not"
    for other in wins:
        if other is not best:
            to = Ratio.of(raced[id(other)].own, times.own)
            said += f", and {to.median:.2f} times as fast as {other.name} ({to.low:.2f} to {to.high:.2f})"
    return said
