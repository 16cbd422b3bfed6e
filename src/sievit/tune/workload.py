"""The model that is tuned, the images that it is tuned on, and the clock."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from sievit import terminal
from sievit.measure.clock import clocked, in_turns
from sievit.models.base import Answer, Model
from sievit.policies import Policy, PolicyConfig
from sievit.policies.base import BlockRange
from sievit.tokens import Trace
from sievit.vit.execution import Execution

R = TypeVar("R")


@dataclass(frozen=True)
class TimedBlocks(BlockRange):
    """Blocks that are timed by themselves.

    Attributes:
        pruned: with the tokens that the policy chooses, and the choice itself; else with all tokens.
    """

    pruned: bool


@dataclass(frozen=True)
class Setup:
    """A policy, and how the model is run with it."""

    policy: PolicyConfig
    execution: Execution


class Clock(Protocol):
    """Runs a call, waits for the device, and returns the milliseconds that it took, and its result."""

    def __call__(self, what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        """`what` is what the call runs: some of the blocks, or the whole model."""
        ...


def wall_clock(what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
    """The time that passes."""
    return clocked(call, device)


@dataclass(frozen=True)
class PolicyCost:
    """What a policy costs on the images.

    Attributes:
        gflops: per image, mean.
        shares: (depth, images or windows), of tokens.
        tokens: per image, of all its windows, mean.
    """

    gflops: float
    shares: Tensor
    tokens: float


class Workload:
    """A model on its device, and batches of images: the cost of any policy on them, and times of setups in turns.

    Args:
        batches: all of the same number of images.
        execution: how everything is run whose setup does not say otherwise.
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
        self._costs: dict[PolicyConfig, PolicyCost] = {}
        self._warm: dict[Setup, Policy] = {}

    def with_progress(self, items: Iterable[R], title: str, total: int) -> Iterable[R]:
        """The same items, with a progress bar if there is a console."""
        return terminal.track(items, title, total=total, console=self.console)

    def policy(self, config: PolicyConfig) -> Policy:
        """The policy that `config` describes, with the weights of the model's policy if that is of the same class."""
        return self.model.build_policy(config)

    def run(self, policy: Policy, execution: Execution, images: list[Tensor]) -> Answer:
        """A pass with a policy in place of the model's."""
        return self.model(images, policy=policy, execution=execution)

    def traces(self, config: PolicyConfig) -> Iterator[Trace]:
        """The traces of a policy, batch by batch."""
        policy = self.policy(config)
        for images in self.batches:
            yield self.run(policy, self.execution, images).trace

    def cost(self, config: PolicyConfig) -> PolicyCost:
        """What a policy costs, over all images."""
        if config not in self._costs:
            policy = self.policy(config)
            gflops, shares, tokens, images = 0.0, [], 0.0, 0
            for batch in self.with_progress(self.batches, "counting", len(self.batches)):
                answer = self.run(policy, self.execution, batch)
                gflops += self.model.gflops(answer).sum().item()
                shares.append(answer.trace.shares().cpu())
                tokens += answer.trace.valid.sum().item()
                images += len(batch)
            self._costs[config] = PolicyCost(gflops / images, torch.cat(shares, dim=1), tokens / images)
        return self._costs[config]

    def setup(self, config: PolicyConfig, **changes: Any) -> Setup:
        """A policy that is run as everything else is, but for `changes` of the execution."""
        return Setup(config, replace(self.execution, **changes))

    def keeps_different_counts(self, config: PolicyConfig) -> bool:
        """Whether images, or windows, that go through the network together keep different numbers of tokens."""
        shares = self.cost(config).shares
        return shares.shape[1] > len(self.batches) and bool((shares.amax(1) > shares.amin(1)).any())

    def warm_up(self, setup: Setup) -> Policy:
        """The policy of a setup, after some passes; a compiled one after passes on all batches, the first time only."""
        if setup in self._warm:
            return self._warm[setup]
        policy, compiled = self.policy(setup.policy), setup.execution.compiled
        for _ in range(3 if compiled else 2):  # graphs are recorded in the second pass
            for images in self.batches if compiled else self.batches[:1]:
                self.run(policy, setup.execution, images)
        if compiled:
            self._warm[setup] = policy
        return policy

    def race(self, setups: Sequence[Setup], rounds: int) -> list[list[float]]:
        """Milliseconds per image of each setup in each round, all in turns on the same images, warmed up."""
        calls = [partial(self.run, self.warm_up(setup), setup.execution) for setup in setups]
        batches = (self.batches[turn % len(self.batches)] for turn in range(rounds))
        turns = in_turns(
            calls,
            self.with_progress(batches, "timing", rounds),
            clock=lambda which, call: self.clock(setups[which], call, self.model.device),
            kept=lambda *_: None,
        )
        return [[elapsed / len(self.batches[0]) for elapsed, _ in taken] for taken in zip(*turns, strict=True)]

    def model_with(self, setup: Setup, model: Model | None = None) -> Model:
        """A model (by default the one that is tuned) with another setup."""
        model = self.model if model is None else model
        return model.with_config(policy=setup.policy, execution=setup.execution)
