"""What a dial is turned for."""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sievit.policies import PolicyConfig
from sievit.tune.kinds import Turn
from sievit.tune.subject import DENSE, Ratio, Subject

Switch = Callable[[PolicyConfig], PolicyConfig]
Accuracy = Callable[[PolicyConfig], float]
"""Points (0..100) of a policy on annotated images."""


@dataclass(frozen=True)
class Found:
    """Where the dials were left.

    Attributes:
        config: the policy there.
        met: whether the target is met; where not, this is the most pruning that there is.
        tried: what was tried on the way, a dict for each.
    """

    config: PolicyConfig
    met: bool
    tried: tuple[dict[str, Any], ...] = ()


class Aim(ABC):
    """A target, and how it is reached."""

    name: str = ""

    def dense_suffices(self) -> bool:
        """Whether the dense model meets the target, so that nothing has to be left out."""
        return False

    @abstractmethod
    def find(self, dials: Sequence[Turn], own: PolicyConfig, off: Switch, *, start: PolicyConfig | None) -> Found:
        """Turn the dials.

        Args:
            own: the policy as it is.
            off: switches off what is slower with tokens left out.
            start: a setting that is near: of another mode, or from before something was switched off.
        """


class AsItIs(Aim):
    """No target: the model's own setting, without what does not pay."""

    def find(self, dials: Sequence[Turn], own: PolicyConfig, off: Switch, *, start: PolicyConfig | None) -> Found:
        return Found(off(own), met=True)


class Ceiling(Aim):
    """The least pruning whose cost is at most the target."""

    tolerance: float
    steps: int

    def __init__(self, subject: Subject, target: float) -> None:
        self.subject, self.target = subject, target

    @abstractmethod
    def cost(self, config: PolicyConfig) -> float:
        """What the target is a limit of."""

    def dense_suffices(self) -> bool:
        return self.cost(DENSE) <= self.target

    def find(self, dials: Sequence[Turn], own: PolicyConfig, off: Switch, *, start: PolicyConfig | None) -> Found:
        tried: list[dict[str, Any]] = []

        def look(turn: Turn, position: float) -> tuple[PolicyConfig, float]:
            config = off(turn(position))
            cost = self.cost(config)
            tried.append({"dial": round(position, 4), self.name: round(cost, 6)})
            return config, cost

        best: tuple[float, PolicyConfig] | None = None
        for turn in dials:
            config, cost = look(turn, 1.0)
            if best is None or cost < best[0]:
                best = cost, config
            if cost > self.target:
                continue  # does not reach that low
            if len(dials) > 1 and look(turn, 0.0)[1] < self.target * (1 - self.tolerance):
                continue  # starts below: another one comes closer
            low, high = 0.0, 1.0
            for _ in range(self.steps):
                if cost >= self.target * (1 - self.tolerance):
                    break
                middle = (low + high) / 2
                there, its_cost = look(turn, middle)
                if its_cost > self.target:
                    low = middle
                else:
                    high, config, cost = middle, there, its_cost
            return Found(config, met=True, tried=tuple(tried))
        assert best is not None
        return Found(best[1], met=best[0] <= self.target, tried=tuple(tried))


class Operations(Ceiling):
    """At most so many GFLOPs per image, mean over the images."""

    name, tolerance, steps = "gflops", 0.01, 14

    def cost(self, config: PolicyConfig) -> float:
        return self.subject.spent(config).gflops


class Milliseconds(Ceiling):
    """At most so many milliseconds per image, by the ratio to dense runs in turn with it."""

    name, tolerance, steps = "ms", 0.03, 7

    def __init__(self, subject: Subject, target: float, rounds: int) -> None:
        super().__init__(subject, target)
        self.rounds = rounds
        self.dense = statistics.median(subject.race([subject.plain(DENSE)], rounds)[0])

    def cost(self, config: PolicyConfig) -> float:
        if config == DENSE:
            return self.dense
        dense, other = self.subject.race([self.subject.plain(DENSE), self.subject.plain(config)], self.rounds)
        return self.dense * Ratio.of(other, dense).median


class Drop(Aim):
    """The most pruning whose accuracy is at most so many points below the dense model's."""

    name, steps = "accuracy", 6

    def __init__(self, subject: Subject, most: float, accuracy: Accuracy) -> None:
        self.subject, self.most, self.accuracy = subject, most, accuracy

    def allows(self, config: PolicyConfig) -> bool:
        """Whether the accuracy is good enough."""
        return self.accuracy(DENSE) - self.accuracy(config) <= self.most + 1e-9

    def find(self, dials: Sequence[Turn], own: PolicyConfig, off: Switch, *, start: PolicyConfig | None) -> Found:
        tried: list[dict[str, Any]] = []
        fits: list[PolicyConfig] = []

        def look(config: PolicyConfig, position: float | None) -> bool:
            tried.append({"dial": position, self.name: round(self.accuracy(config), 3)})
            tried[-1]["gflops"] = round(self.subject.spent(config).gflops, 6)
            if self.allows(config):
                fits.append(config)
            return self.allows(config)

        if look(off(own if start is None else start), None) and start is not None:
            return Found(fits[0], met=True, tried=tuple(tried))
        low, high = 0.0, 1.0
        for _ in range(self.steps):
            middle = (low + high) / 2
            if look(off(dials[0](middle)), round(middle, 4)):
                low = middle
            else:
                high = middle
        if not fits:
            return Found(off(dials[0](0.0)), met=False, tried=tuple(tried))
        return Found(min(fits, key=lambda config: self.subject.spent(config).gflops), met=True, tried=tuple(tried))
