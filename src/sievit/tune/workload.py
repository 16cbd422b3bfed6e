"""The model that is tuned, the images that it is tuned on, and the clock.

Ranges of blocks are timed alone, on the tokens that reach them: which are faster with tokens left out?
"""

import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from sievit import terminal
from sievit.measure.clock import Quartiles, clocked, in_turns
from sievit.models.base import Model
from sievit.policies import Policy, PolicyConfig
from sievit.policies.base import BlockRange
from sievit.tokens import Tokens, Trace
from sievit.vit.execution import Execution

R = TypeVar("R")
CANVASES = 5
"""Batches on which blocks are timed. Of several runs on each the fastest counts: other load only adds time."""


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


Clock = Callable[[TimedBlocks | Setup, Callable[[], Any], torch.device], tuple[float, Any]]
"""Of what a call runs (some of the blocks, or the whole model), the call and the device: runs it, waits for the device,
and returns the milliseconds that it took, and its result."""


def wall_clock(what: TimedBlocks | Setup, call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
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

    def traces(self, config: PolicyConfig) -> Iterator[Trace]:
        """The traces of a policy, batch by batch."""
        policy = self.policy(config)
        for images in self.batches:
            yield self.model(images, policy=policy, execution=self.execution).trace

    def cost(self, config: PolicyConfig) -> PolicyCost:
        """What a policy costs, over all images."""
        if config not in self._costs:
            policy = self.policy(config)
            gflops, shares, tokens, images = 0.0, [], 0.0, 0
            for batch in self.with_progress(self.batches, "counting", len(self.batches)):
                answer = self.model(batch, policy=policy, execution=self.execution)
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
                self.model(images, policy=policy, execution=setup.execution)
        if compiled:
            self._warm[setup] = policy
        return policy

    def race(self, setups: Sequence[Setup], rounds: int) -> list[list[float]]:
        """Milliseconds per image of each setup in each round, all in turns on the same images, warmed up."""
        runs = [partial(self.model, policy=self.warm_up(setup), execution=setup.execution) for setup in setups]
        batches = (self.batches[turn % len(self.batches)] for turn in range(rounds))
        taken = in_turns(
            runs,
            self.with_progress(batches, "timing", rounds),
            clock=lambda which, call: self.clock(setups[which], call, self.model.device),
        )
        return [[elapsed / len(self.batches[0]) for elapsed, _ in of_setup] for of_setup in taken]


@dataclass(frozen=True)
class BlockTiming:
    """Times of a range of blocks.

    Attributes:
        dense_ms, pruned_ms: of a batch, medians over the batches.
        ratio: dense time by pruned time, batch by batch.
    """

    blocks: BlockRange
    dense_ms: float
    pruned_ms: float
    ratio: Quartiles

    @property
    def is_slower(self) -> bool:
        """Whether the blocks are slower with tokens left out."""
        return self.ratio.median <= 1

    def to_json(self, *, dense: bool) -> dict[str, Any]:
        return {
            "blocks": [self.blocks.start, self.blocks.stop - 1],
            "dense_ms": round(self.dense_ms, 3),
            "pruned_ms": round(self.pruned_ms, 3),
            "speedup": self.ratio.to_json(),
            "dense": dense,
        }


def time_blocks(workload: Workload, config: PolicyConfig, rounds: int) -> list[BlockTiming]:
    """The ranges of a policy, each dense and pruned, in turns and warm.

    Where tokens leave for good, the last range is timed first, those before it with what was found behind them, and all
    once more when one of them was found to be slower.
    """
    policy = workload.policy(config)
    ranges = policy.ranges()
    if not policy.cascades:
        return _time(workload, policy, ranges, (), rounds)
    timings: dict[BlockRange, BlockTiming] = {}
    dense: set[int] = set()
    while True:
        before = set(dense)
        for blocks in reversed(ranges):
            if blocks.start not in dense:
                (timings[blocks],) = _time(workload, policy, [blocks], dense, rounds)
                if timings[blocks].is_slower:
                    dense.add(blocks.start)
        if dense == before or len(dense) == len(ranges):
            return [timings[blocks] for blocks in ranges]


def _time(
    workload: Workload, policy: Policy, ranges: Sequence[BlockRange], dense: Collection[int], rounds: int
) -> list[BlockTiming]:
    """Times of some ranges, while the ranges that start at `dense` leave no token out."""
    batches = workload.batches[:CANVASES]
    repeats = max(3, -(-rounds // len(batches)))
    pruned = workload.policy(policy.without(dense))
    whole = [workload.policy(policy.without({*dense, blocks.start})) for blocks in ranges]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in ranges]
    seen: dict[int, list[tuple[Tokens, Trace]]] = {}
    recorder = _recorder(workload.policy(pruned.config), seen)
    for images in workload.with_progress(batches, "blocks", len(batches)):
        seen.clear()
        workload.model(images, policy=recorder, execution=workload.execution)
        for blocks, all_tokens, of_range in zip(ranges, whole, times, strict=True):
            for tokens, trace in seen[blocks.start]:  # more than one where there are many windows
                fastest = _fastest(workload, blocks, (all_tokens, pruned), tokens, trace, repeats)
                for values, value in zip(of_range, fastest, strict=True):
                    values.append(value)
    return [
        BlockTiming(blocks, *map(statistics.median, of_range), Quartiles.of_ratios(*of_range))
        for blocks, of_range in zip(ranges, times, strict=True)
    ]


def _fastest(
    workload: Workload, blocks: BlockRange, policies: tuple[Policy, Policy], tokens: Tokens, trace: Trace, repeats: int
) -> list[float]:
    """Milliseconds of the fastest of some runs of the blocks, with each policy: dense, pruned."""
    device, vit = workload.model.device, workload.model.vit
    sides = [TimedBlocks(blocks.start, blocks.stop, pruned=pruned) for pruned in (False, True)]

    def run(which: int, canvases: list[Tokens]) -> tuple[Tokens, Trace]:
        with workload.execution.autocast(device):
            options: dict[str, Any] = {"start": blocks.start, "stop": blocks.stop, "inplace": True}
            return vit.run_blocks(canvases[which], policies[which], trace, **options)

    def copies() -> list[Tokens]:
        return [replace(tokens, x=tokens.x.clone()) for _ in policies]

    for which in (0, 1):
        run(which, copies())
    taken = in_turns(
        [partial(run, 0), partial(run, 1)],
        (copies() for _ in range(repeats)),
        clock=lambda which, call: workload.clock(sides[which], call, device),
    )
    return [min(elapsed for elapsed, _ in of_side) for of_side in taken]


def _recorder(policy: Policy, seen: dict[int, list[tuple[Tokens, Trace]]]) -> Policy:
    """The policy, which from now on adds the canvas and the trace before each decision to `seen`, by block."""
    decide = policy.before_block

    def before_block(index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Any]]:
        canvas = replace(tokens, x=tokens.x.clone())  # blocks may write into it
        seen.setdefault(index, []).append((canvas, trace))
        return decide(index, tokens, trace)

    policy.__dict__["before_block"] = before_block
    return policy
