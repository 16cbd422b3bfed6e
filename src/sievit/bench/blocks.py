"""The backbone's blocks alone, and a backbone with its neck: dense against a policy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sievit.bench.common import ModesBench, Workplace, known, run, table_of
from sievit.bench.random_models import ADAPTERS, SIZES, random_adapter, random_vit
from sievit.bench.timing import Timed, time_modes
from sievit.config import Share
from sievit.measure.flops import blocks_gflops
from sievit.models.backbone import backbone_gflops
from sievit.models.inputs import Size
from sievit.necks.adapter import ViTAdapter
from sievit.policies import Policy
from sievit.tokens import Tokens, Trace
from sievit.vit import ViT
from sievit.vit.execution import Execution


@dataclass(frozen=True, kw_only=True)
class BlocksBench(ModesBench):
    """The backbone's blocks alone, dense against SViT or another policy.

    Attributes:
        models: names of backbones, random weights.
        targets: share of tokens to keep, spread over blocks 3 to 11; SViT's gates, or the dial of another policy with
            weights, are set to it on the images.
    """

    name = "blocks"

    models: tuple[str, ...] = ("vit_s",)
    targets: tuple[Share, ...] = (0.7, 0.49, 0.343)

    def networks(self) -> dict[str, Any]:
        return known(self.models, {name: name for name in SIZES})

    def rows(
        self, network: str, size: Size | None, batch: int, place: Workplace, modes: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        assert size is not None
        images = place.normalised(size, batch)
        vit, policy = random_vit(SIZES[network], images, self, self.targets)
        timed = timed_blocks(vit, policy, images.split(batch), autotune=self.autotune)
        return time_modes(timed, modes, multiple=self.multiple)

    def table(self, rows: list[dict[str, Any]]) -> Table:
        return table_of(f"blocks: dense against {self.policy or 'svit'}, its own cost included", rows)


@dataclass(frozen=True, kw_only=True)
class BackboneBench(BlocksBench):
    """ViT-Adapter, from normalised images to its four maps, dense against SViT or another policy."""

    name = "backbone"

    def networks(self) -> dict[str, Any]:
        return known(self.models, {name: name for name in ADAPTERS})

    def rows(
        self, network: str, size: Size | None, batch: int, place: Workplace, modes: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        assert size is not None
        images = place.normalised((_up(size[0]), _up(size[1])), batch)
        backbone = random_adapter(network, images, self, self.targets)
        timed = timed_backbone(backbone, images.split(batch), autotune=self.autotune)
        return time_modes(timed, modes, multiple=self.multiple)

    def table(self, rows: list[dict[str, Any]]) -> Table:
        return table_of(f"ViT-Adapter: dense against {self.policy or 'svit'}, its own cost included", rows)


@torch.inference_mode()
def bench_blocks(config: BlocksBench, console: Console | None = None) -> dict[str, Any]:
    """Time the blocks of backbones, see `run`."""
    return run(config, console)


@torch.inference_mode()
def bench_backbone(config: BackboneBench, console: Console | None = None) -> dict[str, Any]:
    """Time backbones with their neck, see `run`."""
    return run(config, console)


class _Blocks(nn.Module):
    """The blocks of a backbone, from the values of a canvas to those behind the last block."""

    def __init__(self, vit: ViT, policy: Policy, tokens: Tokens) -> None:
        super().__init__()
        self.vit, self.policy, self.tokens = vit, policy, tokens

    def forward(self, x: Tensor, *, policy: Policy, execution: Execution) -> tuple[Tensor, Trace]:
        tokens = replace(self.tokens, x=x)
        tokens, trace = self.vit.run_blocks(tokens, policy, Trace.start(tokens), execution=execution)
        return tokens.x, trace


def timed_blocks(
    vit: ViT, policy: Policy, batches: Sequence[Tensor], **options: Any
) -> Timed[Tensor, tuple[Tensor, Trace]]:
    """The blocks on the canvases of images; `options` as in `timed_model`."""
    canvases = [vit.embed(images) for images in batches]

    def gflops(policy: Policy, result: tuple[Tensor, Trace]) -> Tensor:
        return blocks_gflops(vit.config, result[1]).double() + policy.macs(result[1]).double() / 1e9

    network, inputs = _Blocks(vit, policy, canvases[0]), [tokens.x for tokens in canvases]
    return Timed(network=network, inputs=inputs, gflops=gflops, **options)


def timed_backbone(
    backbone: ViTAdapter, batches: Sequence[Tensor], **options: Any
) -> Timed[Tensor, tuple[dict[str, Tensor], Trace]]:
    """A backbone, from normalised images to its maps; `options` as in `timed_model`."""
    sizes = [(batches[0].shape[2], batches[0].shape[3])] * len(batches[0])

    def gflops(policy: Policy, result: tuple[dict[str, Tensor], Trace]) -> Tensor:
        return torch.stack(list(backbone_gflops(backbone, result[1], sizes).values())).sum(0)

    return Timed(network=backbone, inputs=batches, gflops=gflops, **options)


def _up(side: int) -> int:
    """The next multiple of 32."""
    return -(-side // 32) * 32
