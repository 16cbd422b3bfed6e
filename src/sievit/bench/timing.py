"""Modes in turns with the dense model, and the figures of a row."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sievit.bench.common import ModesBench
from sievit.bench.modes import Way, reason
from sievit.measure.clock import C, Pair, R, T, alternately, summary
from sievit.measure.meters import Memory, counted_syncs, memory
from sievit.policies import Policy
from sievit.tokens import Trace


@dataclass(frozen=True)
class Cost:
    """What a pass over a batch took, by its trace.

    Attributes:
        images: of the batch. tokens: grid tokens of all of them.
        gflops: 1e9 multiply-adds of everything that was timed, all images.
        policy: the share of the policy's own products in it: gates.
        keep: per block the share of tokens that took part, mean over the images.
        more: what else a bench reports, by name.
    """

    images: int
    tokens: float
    gflops: float
    policy: float
    keep: tuple[float, ...]
    more: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(trace: Trace, gflops: Tensor, policy: Policy, *, images: int | None = None, **more: Any) -> "Cost":
        """The cost of a pass from its trace.

        Args:
            gflops: (b,) of everything that was timed.
            images: where the trace's batch is one of windows.
        """
        return Cost(
            images=len(trace.valid) if images is None else images,
            tokens=trace.valid.sum().item(),
            gflops=gflops.sum().item(),
            policy=policy.macs(trace).double().sum().item() / 1e9,
            keep=tuple(trace.shares().double().mean(1).tolist()),
            more=more,
        )


def time_modes(
    config: ModesBench,
    policies: Mapping[str, Policy | str],
    call_of: Callable[[Policy, Way], Callable[[T], R]],
    inputs: Sequence[T],
    device: torch.device,
    cost: Callable[[Policy, R], Cost],
    blocks: Sequence[nn.Module] = (),
    more: Callable[[list[Pair[Cost]]], dict[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each of `config.modes` as soon as it is measured, dense and that mode in turns on the same inputs.

    Args:
        policies: by `Way.base`; a text instead of a policy: why there is none. `dense` computes every token.
        call_of: what is timed, ready to be called with an input.
        cost: of what a call returned, with the policy it was called with.
        blocks: the backbone's, whose memory is told apart.
        more: further figures of a row.

    Yields:
        Rows of `mode`, `summary`'s figures, `gflops` per image (dense, sparse), `keep` by block, `memory_mb` (dense,
        sparse; None where graphs hold their own), `block_memory_mb`, the mean over the blocks in which tokens were left
        out, `syncs`, and `sync_places`. Rows of a mode that could not be timed have `skipped`, which says why.
    """
    dense = policies["dense"]
    assert isinstance(dense, Policy)
    as_it_is = Way.of("dense")
    held = memory(lambda: call_of(dense, as_it_is)(inputs[0]), device, blocks)
    for way in map(Way.of, config.modes):
        policy = policies[way.base]
        if isinstance(policy, str):
            yield {"mode": way.name, "skipped": policy}
            continue
        try:
            row = _time_mode(way, (dense, policy), call_of, inputs, device, cost, blocks, held, more)
        except Exception as error:  # a compiler has many kinds of them, and none shall cost the other rows
            if way.how == "eager" and not isinstance(error, torch.OutOfMemoryError):
                raise
            row = {"mode": way.name, "skipped": reason(error)}
        yield row


def _time_mode(
    way: Way,
    policies: tuple[Policy, Policy],
    call_of: Callable[[Policy, Way], Callable[[T], R]],
    inputs: Sequence[T],
    device: torch.device,
    cost: Callable[[Policy, R], Cost],
    blocks: Sequence[nn.Module],
    held: Memory,
    more: Callable[[list[Pair[Cost]]], dict[str, Any]] | None,
) -> dict[str, Any]:
    dense, policy = policies
    if way.how == "graphs" and device.type != "cuda":
        return {"mode": way.name, "skipped": "graphs are CUDA's"}
    reference, call = call_of(dense, Way.of("dense")), call_of(policy, way)
    new_each_time = not way.one_graph and (way.how != "eager" or device.type == "cuda")  # kernels, chosen by shape
    with way.many_shapes():
        pairs = alternately(
            (reference, lambda result: cost(dense, result)),
            (call, lambda result: cost(policy, result)),
            inputs,
            device,
            warm_up=3 if way.how == "graphs" else 2,
            warm_on=len(inputs) if new_each_time else 1,
        )
        own = (
            None
            if way.how == "graphs"
            else memory(lambda: call(inputs[0]), device, () if way.how != "eager" else blocks)
        )
        as_it_stands = call if device.type == "cuda" else call_of(policy, replace(way, how="eager"))
        with counted_syncs(device) as places:
            as_it_stands(inputs[0])
    figures = {"mode": way.name, **figures_of(pairs), **memory_figures(held, own, pairs[0].sparse.keep)}
    figures |= {"syncs": places.total(), "sync_places": dict(places)}
    return figures if more is None else {**figures, **more(pairs)}


def figures_of(pairs: Sequence[Pair[Cost]]) -> dict[str, Any]:
    """Times, ratios, costs and shares of a row."""
    images = sum(pair.dense.images for pair in pairs)
    figures = {
        "tokens": round(sum(pair.dense.tokens for pair in pairs) / images),
        **summary(pairs, [pair.dense.gflops / pair.sparse.gflops for pair in pairs]),
        "gflops": [round(sum(cost.gflops for cost in side) / images, 4) for side in _sides(pairs)],
        "keep": [round(statistics.fmean(shares), 3) for shares in zip(*(p.sparse.keep for p in pairs), strict=True)],
    }
    if any(pair.sparse.policy for pair in pairs):
        without = [(p.dense.gflops - p.dense.policy) / (p.sparse.gflops - p.sparse.policy) for p in pairs]
        figures["predicted_blocks"] = round(statistics.median(without), 3)
    return figures


def _sides(pairs: Sequence[Pair[C]]) -> tuple[list[C], list[C]]:
    return [pair.dense for pair in pairs], [pair.sparse for pair in pairs]


def memory_figures(dense: Memory, sparse: Memory | None, keep: Sequence[float]) -> dict[str, Any]:
    """What a row says of memory: at the peak of the pass, and in the blocks in which tokens were left out."""
    figures: dict[str, Any] = {"memory_mb": [dense.peak, None if sparse is None else sparse.peak]}
    pruned = [i for i, share in enumerate(keep) if share < 1]
    if sparse is not None and sparse.blocks and pruned:
        of_blocks = [[side.blocks[i] for i in pruned] for side in (dense, sparse)]
        figures["block_memory_mb"] = [round(statistics.fmean(side), 1) for side in of_blocks]
    return figures
