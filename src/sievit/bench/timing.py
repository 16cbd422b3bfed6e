"""A network in several modes, each in turns with the dense one, and the figures of a row."""

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sievit.config import kind_of
from sievit.measure.clock import Pair, Quartiles, alternately, median_and_p95
from sievit.measure.meters import Memory, counted_syncs, memory
from sievit.measure.modes import DENSE, RunMode
from sievit.policies import Policy, PolicyConfig
from sievit.tokens import Trace
from sievit.vit.execution import MANY_SHAPES

CALIBRATED = 12
"""Inputs at most whose counts go into the static ones."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What is timed: a network on inputs.

    Attributes:
        network: takes an input, `policy` and `execution`, and returns a result and its trace, or an answer
            (`models.base`); it has a `vit` and a `policy`.
        gflops: (b,) of everything that is timed, by policy and result.
        new_policy: another policy for the network, with random weights; None: the `vit` builds it.
        part: what is compiled in the compiled modes; None: the network with everything in it.
        extra: what a row needs of a result beside its cost, by name.
        figures: further figures of a row, from all its pairs.
        about: what all rows say of the network.
        autotune: graphs are those of `max-autotune`, which tries many kernels for each product.
        precision: of the execution; bfloat16 runs under autocast.
    """

    network: Any
    inputs: Sequence[Any]
    gflops: Callable[[Policy, Any], Tensor]
    new_policy: Callable[[PolicyConfig], Policy] | None = None
    part: nn.Module | None = None
    extra: Callable[[Any], dict[str, Any]] = lambda result: {}
    figures: Callable[[Sequence[Pair["Cost"]]], dict[str, Any]] = lambda pairs: {}
    about: Mapping[str, Any] = field(default_factory=dict)
    autotune: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"

    @property
    def policy(self) -> Policy:
        return self.network.policy

    @property
    def blocks(self) -> list[nn.Module]:
        """Of the backbone, whose memory is measured by themselves."""
        return list(self.network.vit.blocks)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def trace(self, result: Any) -> Trace:
        """Of a result of the network."""
        return result[1] if isinstance(result, tuple) else result.trace

    def call(self, policy: Policy, mode: RunMode) -> Callable[[Any], Any]:
        """What is timed, ready to be called; in the compiled modes it compiles with the first input of each shape."""
        execution, part = replace(mode.execution, compiled=False, precision=self.precision), self.part

        def run(value: Any) -> Any:
            return self.network(value, policy=policy, execution=execution)

        if not mode.execution.compiled:
            return run
        torch.compiler.reset()  # what was compiled for earlier rows would count as recompilation
        torch._logging.set_logs(dynamo=logging.ERROR)  # the bucketed mode consists of graph breaks
        how = None if not mode.graphs else "max-autotune" if self.autotune else "reduce-overhead"
        options: dict[str, Any] = {"fullgraph": is_one_graph(policy, mode), "dynamic": False, "mode": how}
        if part is None:
            fast = torch.compile(run, **options)
        else:
            forward = torch.compile(lambda given: type(part).forward(part, *given[0], **given[1]), **options)

            def fast(value: Any) -> Any:
                part.__dict__["forward"] = lambda *args, **kwargs: forward((args, kwargs))
                try:
                    return run(value)
                finally:
                    del part.__dict__["forward"]

        def step(value: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return fast(value)

        return step

    def build_policy(self, config: PolicyConfig) -> Policy:
        """Another policy, with the weights of the network's where it is of the same class."""
        policy = (self.new_policy or self.network.vit.build_policy)(config)
        if type(config) is type(self.policy.config):
            policy.load_state_dict(self.policy.state_dict())
        return policy.eval().to(next(self.network.parameters()))

    def static_policy(self, multiple: int) -> Policy | None:
        """The policy with static counts: as many tokens as it keeps of the inputs, mean over the images.

        None for a policy that has none.
        """
        if self.policy.is_static:
            return self.policy
        call = self.call(self.policy, RunMode("dynamic"))
        shares = [self.trace(call(value)).shares() for value in self.inputs[:CALIBRATED]]
        kept = torch.cat(shares, dim=1).double().mean(1).tolist()
        config = self.policy.made_static(kept, multiple=multiple)
        return None if config is None else self.build_policy(config)

    def cost(self, policy: Policy, result: Any) -> "Cost":
        """Of a result that was computed with `policy`."""
        trace, gflops = self.trace(result), self.gflops(policy, result)
        return Cost(
            images=len(gflops),
            tokens=trace.valid.sum().item(),
            gflops=gflops.sum().item(),
            policy=policy.cost(trace).sum().item() / 1e9,
            keep=tuple(trace.shares().double().mean(1).tolist()),
            extra=self.extra(result),
        )


@dataclass(frozen=True)
class Cost:
    """What a pass over a batch took, by its trace.

    Attributes:
        images: of the batch. tokens: grid tokens of all of them.
        gflops: 1e9 multiply-adds of everything that was timed, all images.
        policy: the policy's products among them, such as gates.
        keep: per block the share of tokens that took part, mean over the images.
        extra: what else a bench reports, by name.
    """

    images: int
    tokens: float
    gflops: float
    policy: float
    keep: tuple[float, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


def is_one_graph(policy: Policy, mode: RunMode) -> bool:
    """Whether no shape, branch or count depends on what is in the images."""
    return mode.counts != "dynamic" or (policy.is_static and mode.base == "dynamic")


def many_shapes(mode: RunMode) -> AbstractContextManager[Any]:
    """While it lasts torch.compile does not give up because of the number of sizes."""
    if not mode.execution.compiled:
        return nullcontext()
    from torch._dynamo import config

    return config.patch(MANY_SHAPES)


def time_modes(timed: Timed, modes: Sequence[str], *, multiple: int) -> Iterator[dict[str, Any]]:
    """A row for each mode as soon as it is measured, the dense network and that mode in turns on the same inputs.

    Args:
        multiple: static counts are rounded up to a multiple of it.

    Yields:
        Rows of `mode`, the times and ratios of `figures_of`, `gflops` per image (dense, sparse), `keep` by block,
        `memory_mb` (dense, sparse; None where graphs hold their own), `block_memory_mb`, the mean over the blocks in
        which tokens were left out, `syncs`, and `sync_places`. Rows of a mode that could not be timed have `skipped`,
        which is the reason.
    """
    dense, first = timed.build_policy(DENSE), timed.inputs[0]
    held = memory(lambda: timed.call(dense, RunMode("dense"))(first), timed.device, timed.blocks)
    policies: dict[str, Policy | None] = {"dense": dense, "dynamic": timed.policy}
    for mode in map(RunMode.of, modes):
        if mode.counts == "static" and "static" not in policies:
            policies["static"] = timed.static_policy(multiple)
        policy = policies[mode.counts]
        if policy is None:
            row = {"skipped": f"the policy {kind_of(timed.policy.config)!r} has no static counts"}
        elif mode.graphs and timed.device.type != "cuda":
            row = {"skipped": "graphs are CUDA's"}
        elif mode.execution.compiled and mode.base == "dynamic" and not policy.is_static:
            row = {"skipped": "each number of tokens would be compiled by itself; bucketed and static modes have few"}
        elif mode.execution.compiled and len({image.shape for value in timed.inputs for image in value}) > 1:
            row = {"skipped": "the images are of several sizes, and each would be compiled by itself; give --sizes"}
        else:
            try:
                row = _time_mode(timed, mode, (dense, policy), held)
            except Exception as error:  # compilers raise errors of many classes, and none shall cost the other rows
                if not mode.execution.compiled and not isinstance(error, torch.OutOfMemoryError):
                    raise
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                row = {"skipped": f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]}
        yield {"mode": mode.name, **row, **timed.about}


def _time_mode(timed: Timed, mode: RunMode, policies: tuple[Policy, Policy], dense_memory: Memory) -> dict[str, Any]:
    (dense, policy), device, first = policies, timed.device, timed.inputs[0]
    is_compiled = mode.execution.compiled
    reference, call = timed.call(dense, RunMode("dense")), timed.call(policy, mode)
    # compilers and CUDA choose kernels by shape
    new_shapes = not is_one_graph(policy, mode) and (is_compiled or device.type == "cuda")
    with many_shapes(mode):
        pairs = alternately(
            (reference, partial(timed.cost, dense)),
            (call, partial(timed.cost, policy)),
            timed.inputs,
            device,
            warm_up=3 if mode.graphs else 2,
            warm_on=len(timed.inputs) if new_shapes else 1,
        )
        held = None
        if not mode.graphs:
            held = memory(lambda: call(first), device, () if is_compiled else timed.blocks)
        counted = call
        if device.type != "cuda":
            counted = timed.call(policy, RunMode(mode.counts, replace(mode.execution, compiled=False)))
        with counted_syncs(device) as places:
            counted(first)
    figures = {**figures_of(pairs), **memory_figures(dense_memory, held, pairs[0].sparse.keep)}
    return {**figures, "syncs": places.total(), "sync_places": dict(places), **timed.figures(pairs)}


def figures_of(pairs: Sequence[Pair[Cost]]) -> dict[str, Any]:
    """Times, ratios, costs and shares of a row."""
    images = sum(pair.dense.images for pair in pairs)
    speedups = [pair.dense_ms / pair.sparse_ms for pair in pairs]
    predicted = [pair.dense.gflops / pair.sparse.gflops for pair in pairs]
    realised = Quartiles.of_ratios(speedups, predicted).to_json()
    figures = {
        "tokens": round(sum(pair.dense.tokens for pair in pairs) / images),
        **median_and_p95("dense_ms", [pair.dense_ms for pair in pairs]),
        **median_and_p95("sparse_ms", [pair.sparse_ms for pair in pairs]),
        "speedup": round(statistics.median(speedups), 3),
        "predicted": round(statistics.median(predicted), 3),
        "realised": realised["median"],
        "realised_quartiles": realised["quartiles"],
        "pairs": len(pairs),
        "gflops": [
            round(sum(cost.gflops for cost in side) / images, 4)
            for side in zip(*((pair.dense, pair.sparse) for pair in pairs), strict=True)
        ],
        "keep": [round(statistics.fmean(shares), 3) for shares in zip(*(p.sparse.keep for p in pairs), strict=True)],
    }
    if any(pair.sparse.policy for pair in pairs):
        without = [(p.dense.gflops - p.dense.policy) / (p.sparse.gflops - p.sparse.policy) for p in pairs]
        figures["predicted_blocks"] = round(statistics.median(without), 3)
    return figures


def memory_figures(dense: Memory, sparse: Memory | None, keep: Sequence[float]) -> dict[str, Any]:
    """The memory of a row: at the peak of the pass, and in the blocks in which tokens were left out."""
    figures: dict[str, Any] = {"memory_mb": [dense.peak, None if sparse is None else sparse.peak]}
    pruned = [i for i, share in enumerate(keep) if share < 1]
    if sparse is not None and sparse.blocks and pruned:
        of_blocks = [[side.blocks[i] for i in pruned] for side in (dense, sparse)]
        figures["block_memory_mb"] = [round(statistics.fmean(side), 1) for side in of_blocks]
    return figures
