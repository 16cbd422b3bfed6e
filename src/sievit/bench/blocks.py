"""The backbone's blocks alone, dense against SViT."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sievit.bench.common import SIZES, ModesBench, Place, check_known, kept, run, table_of
from sievit.bench.modes import Way, static_config
from sievit.bench.timing import Cost, time_modes
from sievit.measure.flops import blocks_gflops
from sievit.models.inputs import Size
from sievit.policies import KeepAllConfig, Policy, SViTConfig, build_policy
from sievit.policies.svit import SViT
from sievit.tokens import Trace
from sievit.vit import ViT, ViTConfig


@dataclass(frozen=True, kw_only=True)
class BlocksBench(ModesBench):
    """The backbone's blocks alone, dense against SViT.

    Attributes:
        models: names of backbones, random weights.
        targets: share of tokens that the gates keep, spread over blocks 3 to 11; they are set to it on the images.
    """

    models: tuple[str, ...] = ("vit_s",)
    targets: tuple[float, ...] = (0.7, 0.49, 0.343)


@torch.inference_mode()
def bench_blocks(config: BlocksBench, console: Console | None = None) -> dict[str, Any]:
    """Run, print a table, and return it as a dict with `rows`.

    Raises:
        ConfigError: an unknown model, or a folder without pictures.
    """
    check_known(config.models, SIZES)

    def rows_of(
        model: str, size: Size | None, batch: int, place: Place, modes: tuple[str, ...]
    ) -> Iterator[dict[str, Any]]:
        assert size is not None
        pictures = place.pictures(size, batch)
        vit, policies = calibrated(SIZES[model], pictures, config.targets)
        return time_blocks(vit, policies, pictures.split(batch), replace(config, modes=modes))

    def table(rows: list[dict[str, Any]]) -> Table:
        return table_of("blocks: dense against SViT, gates included", rows, {"keep": kept(rows)})

    return run("blocks", config, config.models, config.sizes, config.modes, rows_of, table, console)


def time_blocks(
    vit: ViT, policies: tuple[Policy, Policy], batches: Sequence[Tensor], config: ModesBench
) -> Iterator[dict[str, Any]]:
    """Dense and sparse blocks alternately on the same canvases, a row for each mode."""
    dense, sparse = policies
    canvases = [vit.embed(batch) for batch in batches]
    traces = [vit.run_blocks(tokens, sparse, Trace.start(tokens))[1] for tokens in canvases[:CALIBRATED]]

    def call_of(policy: Policy, way: Way) -> Callable[[Tensor], tuple[Tensor, Trace]]:
        def run(x: Tensor) -> tuple[Tensor, Trace]:
            tokens = replace(canvases[0], x=x)
            tokens, trace = vit.run_blocks(tokens, policy, Trace.start(tokens), execution=way.execution)
            return tokens.x, trace

        return way.compiled(run, autotune=config.autotune)

    def cost(policy: Policy, result: tuple[Tensor, Trace]) -> Cost:
        _, trace = result
        gflops = blocks_gflops(vit.config, trace).double() + policy.macs(trace).double() / 1e9
        return Cost.of(trace, gflops, policy)

    ways = {"dense": dense, "dynamic": sparse, "bucketed": sparse, "static": frozen(sparse, traces, config.multiple)}
    inputs = [tokens.x for tokens in canvases]
    return time_modes(config, ways, call_of, inputs, inputs[0].device, cost, list(vit.blocks))


CALIBRATED = 12
"""Batches at most whose counts go into the static ones."""


def frozen(sparse: Policy, traces: Sequence[Trace], multiple: int) -> SViT:
    """The same gates with static counts, as many tokens as they kept in these passes."""
    assert isinstance(sparse, SViT)
    config = static_config(sparse, traces, multiple)
    assert config is not None
    hidden = sparse.gates[0].get_parameter("fc1.weight")
    depth = sparse.config.first_block + len(sparse.gates)
    static = build_policy(config, embed_dim=hidden.shape[1], depth=depth)
    static.load_state_dict(sparse.state_dict())
    assert isinstance(static, SViT)
    return static.eval().to(hidden)


def calibrated(config: ViTConfig, pictures: Tensor, targets: tuple[float, ...]) -> tuple[ViT, tuple[Policy, Policy]]:
    """A backbone with random weights, and a dense and an SViT policy whose gates keep `targets` on these pictures.

    Gates are set one after the other: each one's bias moves to the quantile of its logits that keeps its share.
    """
    torch.manual_seed(0)
    vit = ViT(config).eval().to(pictures)
    dense = build_policy(KeepAllConfig(), embed_dim=config.embed_dim, depth=config.depth)
    sparse = build_policy(SViTConfig(targets=targets), embed_dim=config.embed_dim, depth=config.depth)
    assert isinstance(sparse, SViT)
    sparse.eval().to(pictures)
    canvases = [vit.embed(picture[None]) for picture in pictures[:4]]
    traces = [Trace.start(tokens) for tokens in canvases]
    first = sparse.config.first_block
    for index in range(config.depth):
        if index >= first:
            gate = sparse.gates[index - first]
            logits = torch.cat([gate(tokens.patches).float().flatten(0, 1) for tokens in canvases])
            margin = (logits[:, 0] - logits[:, 1]).quantile(1 - sparse.targets[index - first])
            bias = gate.get_parameter("fc2.bias")
            bias[0] -= margin.to(bias.dtype)
        steps = [
            vit.run_blocks(tokens, sparse, trace, start=index, stop=index + 1)
            for tokens, trace in zip(canvases, traces, strict=True)
        ]
        canvases, traces = [step[0] for step in steps], [step[1] for step in steps]
    return vit, (dense, sparse)
