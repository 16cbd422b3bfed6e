"""A policy with dynamic and with static counts, each turned to the target, without the blocks that are faster dense."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sievit.config import ConfigError, kind_of
from sievit.measure.clock import Quartiles
from sievit.measure.modes import DENSE, RunMode
from sievit.policies import PolicyConfig
from sievit.tune.blocks import BlockTiming, time_blocks
from sievit.tune.options import Tuning
from sievit.tune.targets import Found, MaxDrop, Target
from sievit.tune.variant import Variant
from sievit.tune.workload import Setup, Workload
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
    def config(self) -> PolicyConfig:
        return self.found.config

    @property
    def setup(self) -> Setup:
        return Setup(self.config, self.execution)

    @property
    def is_dense(self) -> bool:
        """Whether no range of blocks is left in which tokens could be left out."""
        return bool(self.timings) and len(self.dense) == len(self.timings)

    def again(self, target: Target, dense: set[int]) -> "Candidate":
        """Turned to the target once more, with more blocks dense."""
        start = self.config if self.variant.counts == "static" else None
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
        elif not isinstance(target, MaxDrop):
            missed.append(candidate)
    if missed and not candidates:
        raise ConfigError(target.unreachable(missed[0].found, missed[0].dense))
    return candidates, why
