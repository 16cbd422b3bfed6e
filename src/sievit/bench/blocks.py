"""The backbone's blocks alone, dense against SViT."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sievit.bench.common import SIZES, Bench, Place, alternately, check_known, run, summary, table_of
from sievit.flops import blocks_gflops
from sievit.inputs import Size
from sievit.policies import KeepAllConfig, Policy, SViTConfig, build_policy
from sievit.policies.svit import SViT
from sievit.tokens import Tokens, Trace
from sievit.vit import Mode, ViT, ViTConfig


@dataclass(frozen=True, kw_only=True)
class BlocksBench(Bench):
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

    def row_of(model: str, size: Size | None, batch: int, place: Place) -> dict[str, Any]:
        assert size is not None
        pictures = place.pictures(size, batch)
        vit, policies = calibrated(SIZES[model], pictures, config.targets)
        return {"mode": "dynamic", **time_blocks(vit, policies, pictures.split(batch))}

    def table(rows: list[dict[str, Any]]):
        keep = [f"{statistics.mean(row['keep'][3:]):.0%}" for row in rows]
        return table_of("blocks: dense against SViT, gates included", rows, {"keep": keep})

    return run("blocks", config, config.models, config.sizes, row_of, table, console)


def time_blocks(vit: ViT, policies: tuple, batches: tuple[Tensor, ...], mode: Mode = "auto") -> dict:
    """Dense and sparse blocks alternately on the same canvases; medians over the batches, and their spread."""
    canvases = [vit.embed(batch) for batch in batches]

    def run(policy: Policy) -> Callable[[Tokens], Trace]:
        return lambda tokens: vit.run_blocks(tokens, policy, Trace.start(tokens), mode=mode)[1]

    pairs = alternately(run(policies[0]), run(policies[1]), canvases, canvases[0].x.device)
    costs = [[blocks_gflops(vit.config, trace).sum().item() for trace in (pair.dense, pair.sparse)] for pair in pairs]
    keep = torch.stack([pair.sparse.shares().mean(1) for pair in pairs]).mean(0)
    return {
        "tokens": canvases[0].x.shape[1],
        **summary(pairs, [dense / sparse for dense, sparse in costs]),
        "keep": [round(share, 3) for share in keep.tolist()],
    }


def calibrated(config: ViTConfig, pictures: Tensor, targets: tuple[float, ...]) -> tuple[ViT, tuple]:
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
