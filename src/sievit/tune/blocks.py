"""The ranges of blocks that are faster with tokens left out: each is timed alone, on the tokens that reach it."""

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sievit.measure.clock import Quartiles, in_turns
from sievit.policies import Policy, PolicyConfig
from sievit.policies.base import BlockRange
from sievit.tokens import Tokens, Trace
from sievit.tune.workload import TimedBlocks, Workload

CANVASES = 5
"""Batches on which blocks are timed. Of several runs on each the fastest counts: other load only adds time."""


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

    @property
    def is_uncertain(self) -> bool:
        """Whether they are not faster by more than the noise."""
        return self.ratio.low <= 1

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
        workload.run(recorder, workload.execution, images)
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
            canvas, policy = canvases[which], policies[which]
            return vit.run_blocks(canvas, policy, trace, start=blocks.start, stop=blocks.stop, inplace=True)

    def copies() -> list[Tokens]:
        return [replace(tokens, x=tokens.x.clone()) for _ in policies]

    for which in (0, 1):
        run(which, copies())
    turns = in_turns(
        [lambda canvases: run(0, canvases), lambda canvases: run(1, canvases)],
        (copies() for _ in range(repeats)),
        clock=lambda which, call: workload.clock(sides[which], call, device),
        kept=lambda *_: None,
    )
    return [min(elapsed for elapsed, _ in taken) for taken in zip(*turns, strict=True)]


def _recorder(policy: Policy, seen: dict[int, list[tuple[Tokens, Trace]]]) -> Policy:
    """The policy, which from now on adds the canvas and the trace before each decision to `seen`, by block."""
    decide = policy.before_block

    def before_block(index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Any]]:
        canvas = replace(tokens, x=tokens.x.clone())  # blocks may write into it
        seen.setdefault(index, []).append((canvas, trace))
        return decide(index, tokens, trace)

    policy.__dict__["before_block"] = before_block
    return policy
