"""The targets that the dial of a policy is turned for."""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from sievit.bench.random_models import bisected
from sievit.config import ConfigError, kind_of
from sievit.measure.clock import Quartiles
from sievit.measure.modes import DENSE
from sievit.policies import PolicyConfig
from sievit.policies.base import Dial
from sievit.tune.options import Tuning
from sievit.tune.workload import Workload

Accuracy = Callable[[PolicyConfig], float]
"""Points (0..100) of a policy on annotated images."""


class Variant:
    """A policy with dynamic or with static counts.

    Args:
        base: the policy with dynamic counts; with static ones it is measured how many tokens this keeps.

    Attributes:
        config: its setting where there is no target.
        dials: see `Policy.dials`.
        is_static, is_ragged: see `Policy`.
    """

    def __init__(
        self, workload: Workload, counts: Literal["dynamic", "static"], base: PolicyConfig, tuning: Tuning
    ) -> None:
        self.workload, self.counts, self.config = workload, counts, base
        policy = workload.policy(base)
        self.dials = policy.dials(workload.traces)
        if counts == "static":
            shares, quantile = workload.cost(base).shares.double(), tuning.quantile
            kept = (shares.mean(1) if quantile is None else shares.quantile(quantile, dim=1)).tolist()

            def turn(position: float | None) -> PolicyConfig:
                static = policy.made_static(kept, multiple=tuning.multiple, position=position)
                assert static is not None
                return static

            self.config, self.dials = turn(None), [turn]
        policy = workload.policy(self.config)
        self.is_static, self.is_ragged = policy.is_static, policy.is_ragged

    def without(self, config: PolicyConfig, dense: Collection[int]) -> PolicyConfig:
        """A setting of it that leaves no token out in the ranges of blocks that start at `dense`."""
        return self.workload.policy(config).without(dense) if dense else config


@dataclass(frozen=True)
class Found:
    """Where the dials were left.

    Attributes:
        config: the policy there.
        met: whether the target is met; where not, `config` is the most pruning that there is.
        tried: the settings that were tried, a dict for each.
    """

    config: PolicyConfig
    met: bool
    tried: tuple[dict[str, Any], ...] = ()


class Target(ABC):
    """A target, and how it is reached."""

    name: str = ""

    def dense_suffices(self) -> bool:
        """Whether the dense model meets the target, so that nothing has to be left out."""
        return False

    @abstractmethod
    def find(self, variant: Variant, dense: Collection[int] = (), start: PolicyConfig | None = None) -> Found:
        """Turn the dials.

        Args:
            dense: first blocks of the ranges in which no token is left out.
            start: a setting that is near the target: of another mode, or from before blocks were made dense.

        Raises:
            ConfigError: a target that needs a dial, and there is none.
        """


class NoTarget(Target):
    """The policy as it is configured."""

    def find(self, variant: Variant, dense: Collection[int] = (), start: PolicyConfig | None = None) -> Found:
        return Found(variant.without(variant.config, dense), met=True)


class Limit(Target):
    """The least pruning whose cost is at most the limit."""

    tolerance: float
    steps: int

    def __init__(self, workload: Workload, limit: float) -> None:
        self.workload, self.limit = workload, limit

    @abstractmethod
    def cost(self, config: PolicyConfig) -> float:
        """What the limit is of."""

    def dense_suffices(self) -> bool:
        return self.cost(DENSE) <= self.limit

    def find(self, variant: Variant, dense: Collection[int] = (), start: PolicyConfig | None = None) -> Found:
        dials = variant.dials
        if not dials:
            raise ConfigError(
                f"--target-{self.name} {self.limit:g}: the policy {kind_of(variant.config)!r} has no dial that could "
                "be turned to it; leave the target out, or give another policy by --policy"
            )
        tried: list[dict[str, Any]] = []

        def at(dial: Dial, position: float) -> tuple[PolicyConfig, float]:
            turned = variant.without(dial(position), dense)
            cost = self.cost(turned)
            tried.append({"dial": round(position, 4), self.name: round(cost, 6)})
            return turned, cost

        least: tuple[float, PolicyConfig] | None = None
        for dial in dials:
            turned, cost = at(dial, 1.0)
            if least is None or cost < least[0]:
                least = cost, turned
            if cost > self.limit:
                continue  # does not reach that low
            if len(dials) > 1 and at(dial, 0.0)[1] < self.limit * (1 - self.tolerance):
                continue  # starts below: another one comes closer
            low, high = 0.0, 1.0
            for _ in range(self.steps):
                if cost >= self.limit * (1 - self.tolerance):
                    break
                middle = (low + high) / 2
                there, its_cost = at(dial, middle)
                if its_cost > self.limit:
                    low = middle
                else:
                    high, turned, cost = middle, there, its_cost
            return Found(turned, met=True, tried=tuple(tried))
        assert least is not None
        return Found(least[1], met=least[0] <= self.limit, tried=tuple(tried))

    def unreachable(self, found: Found, dense: Collection[int]) -> str:
        """The error message for a limit that no setting meets."""
        least = min(step[self.name] for step in found.tried)
        blocks = f" (blocks {', '.join(map(str, sorted(dense)))} are faster dense)" if dense else ""
        option = f"--target-{self.name} {self.limit:g}"
        return (
            f"{option}: out of reach; with hardly any tokens left the model takes {least:g}, "
            f"the dense one {self.cost(DENSE):g}{blocks}; give a target in between, a smaller --size or a smaller model"
        )


class MaxGFLOPs(Limit):
    """At most so many GFLOPs per image, mean over the images."""

    name, tolerance, steps = "gflops", 0.01, 14

    def cost(self, config: PolicyConfig) -> float:
        return self.workload.cost(config).gflops


class MaxMilliseconds(Limit):
    """At most so many milliseconds per image, by the ratio to dense runs in turn with it."""

    name, tolerance, steps = "ms", 0.03, 7

    def __init__(self, workload: Workload, limit: float, rounds: int) -> None:
        super().__init__(workload, limit)
        self.rounds = rounds
        self.dense = statistics.median(workload.race([workload.setup(DENSE)], rounds)[0])

    def cost(self, config: PolicyConfig) -> float:
        if config == DENSE:
            return self.dense
        dense, other = self.workload.race([self.workload.setup(DENSE), self.workload.setup(config)], self.rounds)
        return self.dense * Quartiles.of_ratios(other, dense).median


class MaxDrop(Target):
    """The most pruning whose accuracy is at most so many points below the dense model's."""

    name, steps = "accuracy", 6

    def __init__(self, workload: Workload, most: float, accuracy: Accuracy) -> None:
        self.workload, self.most, self.accuracy = workload, most, accuracy

    def find(self, variant: Variant, dense: Collection[int] = (), start: PolicyConfig | None = None) -> Found:
        dials = variant.dials
        tried: list[dict[str, Any]] = []
        allowed: list[PolicyConfig] = []

        def is_allowed(config: PolicyConfig, position: float | None) -> bool:
            config = variant.without(config, dense)
            drop = self.accuracy(DENSE) - self.accuracy(config)
            gflops = round(self.workload.cost(config).gflops, 6)
            tried.append({"dial": position, self.name: round(self.accuracy(config), 3), "gflops": gflops})
            allowed.extend([config] if drop <= self.most + 1e-9 else [])
            return config in allowed

        if is_allowed(variant.config if start is None else start, None) and start is not None:
            return Found(allowed[0], met=True, tried=tuple(tried))
        if dials:
            bisected(lambda at: is_allowed(dials[0](at), round(at, 4)), 0.0, 1.0, steps=self.steps)
        if not allowed:
            least = dials[0](0.0) if dials else variant.config
            return Found(variant.without(least, dense), met=False, tried=tuple(tried))
        return Found(min(allowed, key=lambda c: self.workload.cost(c).gflops), met=True, tried=tuple(tried))
