"""The model that is tuned, the images that it is tuned on, and the clock."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sievit.measure.clock import clocked
from sievit.measure.flops import model_gflops
from sievit.models.build import Model, build
from sievit.models.detector import Output
from sievit.models.segmenter import Segmentation, Segmenter
from sievit.policies import KeepAllConfig, Policy, PolicyConfig
from sievit.vit.execution import Execution

R = TypeVar("R")


@dataclass(frozen=True)
class Part:
    """A run of blocks that is timed by itself.

    Attributes:
        start, stop: blocks from `start` on, up to and without `stop`.
        pruned: whether tokens are left out, and chosen first.
    """

    start: int
    stop: int
    pruned: bool


@dataclass(frozen=True)
class Setup:
    """A policy, and how the model is run with it."""

    policy: PolicyConfig
    execution: Execution


class Clock(Protocol):
    """Runs a call that waits for its device, and says how many milliseconds it took."""

    def __call__(self, what: Part | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        """`what` is run: some of the blocks, or the whole model."""
        ...


def wall_clock(what: Part | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
    """The clock on the wall."""
    return clocked(call, device)


@dataclass(frozen=True)
class Spent:
    """What a policy spends on the images.

    Attributes:
        gflops: per image, mean.
        shares: (depth, images or windows), of tokens.
        tokens: per image, of all its windows, mean.
    """

    gflops: float
    shares: Tensor
    tokens: float


@dataclass(frozen=True)
class Ratio:
    """Of two times, pair by pair: median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> "Ratio":
        ratios = [a / b for a, b in zip(slow, fast, strict=True)]
        low, median, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4, method="inclusive")
        return cls(median, low, high)

    def to_json(self) -> dict[str, Any]:
        return {"median": round(self.median, 3), "quartiles": [round(self.low, 3), round(self.high, 3)]}


class Subject:
    """A model on its device with batches of images, any policy's cost, and the time of setups in turns.

    Args:
        execution: how everything is run that no setup says otherwise of.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[list[Tensor]],
        clock: Clock = wall_clock,
        console: Console | None = None,
        execution: Execution = Execution(),
    ) -> None:
        self.model, self.batches, self.clock, self.console = model, batches, clock, console
        self.execution = execution
        self._spent: dict[PolicyConfig, Spent] = {}
        self._warm: dict[Setup, Policy] = {}

    @property
    def depth(self) -> int:
        """Blocks of the backbone."""
        return self.model.config.vit.depth

    def watched(self, items: Iterable[R], title: str, total: int) -> Iterable[R]:
        """The same, with a progress bar where there is somewhere to show it."""
        if self.console is None:
            return items
        return track(items, title, total=total, console=self.console, transient=True)

    def policy(self, config: PolicyConfig) -> Policy:
        """The policy that `config` describes, with the weights of the model's own if it is of the same kind."""
        model = self.model
        if isinstance(model, Segmenter):
            policy = model.net.build_policy(config)
        else:
            policy = model.vit.build_policy(config)
        if type(config) is type(model.config.policy):
            policy.load_state_dict(model.policy.state_dict())
        return policy.eval().to(model.device)

    def answer(self, policy: Policy, images: list[Tensor], execution: Execution | None = None) -> Output | Segmentation:
        """A pass with a policy in place of the model's own."""
        return self.model(images, policy=policy, execution=self.execution if execution is None else execution)

    def spent(self, config: PolicyConfig) -> Spent:
        """What a policy spends, over all images."""
        if config not in self._spent:
            policy = self.policy(config)
            gflops, shares, tokens, images = 0.0, [], 0.0, 0
            for batch in self.watched(self.batches, "counting", len(self.batches)):
                answer = self.answer(policy, batch)
                gflops += model_gflops(self.model, answer).sum().item()
                shares.append(answer.trace.shares().cpu())
                tokens += answer.trace.valid.sum().item()
                images += len(batch)
            self._spent[config] = Spent(gflops / images, torch.cat(shares, dim=1), tokens / images)
        return self._spent[config]

    def plain(self, config: PolicyConfig) -> Setup:
        """A policy, run as everything is that no setup says otherwise of."""
        return Setup(config, self.execution)

    def ragged(self, config: PolicyConfig) -> bool:
        """Whether images, or windows, that go through the network together may keep different numbers of tokens."""
        shares = self.spent(config).shares
        return shares.shape[1] > len(self.batches) and bool((shares.amax(1) > shares.amin(1)).any())

    def warmed(self, setup: Setup) -> Policy:
        """The policy of a setup that has run; where it is compiled, on all batches, and only the first time."""
        if setup in self._warm:
            return self._warm[setup]
        policy, compiled = self.policy(setup.policy), setup.execution.compiled
        for _ in range(3 if compiled else 2):  # graphs are recorded in the second pass
            for images in self.batches if compiled else self.batches[:1]:
                self.answer(policy, images, setup.execution)
        if compiled:
            self._warm[setup] = policy
        return policy

    def race(self, setups: Sequence[Setup], rounds: int) -> list[list[float]]:
        """Milliseconds per image of each setup in each round, all in turns on the same images, warmed up."""
        policies = [self.warmed(setup) for setup in setups]
        taken: list[list[float]] = [[] for _ in setups]
        for turn in self.watched(range(rounds), "timing", rounds):
            images = self.batches[turn % len(self.batches)]
            for place in range(len(setups)):
                which = (place + turn) % len(setups)
                policy, setup = policies[which], setups[which]
                call = lambda policy=policy, setup=setup: self.answer(policy, images, setup.execution)  # noqa: E731, B023
                elapsed, _ = self.clock(setup, call, self.model.device)
                taken[which].append(elapsed / len(images))
        return taken

    def set_up(self, setup: Setup, model: Model | None = None) -> Model:
        """A model (by default the one that is tuned) with another policy, run in another way."""
        model = self.model if model is None else model
        same = build(replace(model.config, policy=setup.policy, execution=setup.execution)).eval().to(model.device)
        tensors = model.state_dict()
        same.load_state_dict({name: tensors[name] for name in same.state_dict()})
        return same


DENSE = KeepAllConfig()
