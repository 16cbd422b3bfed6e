"""Blocks alone, backbones and whole networks, dense against a policy: of random weights, or trained models.

Random segmenters are timed from normalised images to scores on their pixels; trained models from images in memory to
answers on the pixels of the images, resizing, padding and windows included.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sievit.bench.common import ModesBench, known, run, table_of
from sievit.bench.random_models import (
    ADAPTERS,
    SEGMENTERS,
    SIZES,
    random_adapter,
    random_exits,
    random_segmenter,
    random_vit,
)
from sievit.bench.timing import Cost, Timed
from sievit.config import ConfigError, Count, Natural, Share, kind_of
from sievit.devices import pick_device
from sievit.heads import SemanticHead
from sievit.hub.fetch import HUB
from sievit.measure.clock import Pair
from sievit.measure.flops import traced_macs
from sievit.measure.modes import DENSE
from sievit.models.backbone import backbone_gflops
from sievit.models.base import Model
from sievit.models.build import load
from sievit.models.inputs import Size, padded_size
from sievit.models.segmenter import Segmentation, Segmenter
from sievit.necks.adapter import ViTAdapter
from sievit.policies import Policy, PolicyOptions
from sievit.tokens import Tokens, Trace
from sievit.vit import Execution, ViT

PAPER_SIZES = ((512, 512), (640, 640))


@dataclass(frozen=True, kw_only=True)
class BlocksBench(ModesBench):
    """The backbone's blocks alone, dense against SViT or another policy.

    Attributes:
        models: names of backbones, random weights.
        targets: share of tokens to keep, spread over blocks 3 to 11; SViT's gates, or the dial of another policy with
            weights, are set to it on the images.
    """

    name, title = "blocks", "blocks: dense against {}, its own cost included"

    models: tuple[str, ...] = ("vit_s",)
    targets: tuple[Share, ...] = (0.7, 0.49, 0.343)

    def networks(self) -> dict[str, Any]:
        return known(self.models, SIZES)

    def timed(self, network: str, size: Size | None, batch: int) -> Timed:
        assert size is not None
        images = self.normalised(size, batch)
        vit, policy = random_vit(SIZES[network], images, self, self.targets)
        return timed_blocks(vit, policy, images.split(batch), autotune=self.autotune)


@dataclass(frozen=True, kw_only=True)
class BackboneBench(BlocksBench):
    """ViT-Adapter, from normalised images to its four maps, dense against SViT or another policy."""

    name, title = "backbone", "ViT-Adapter: dense against {}, its own cost included"

    def networks(self) -> dict[str, Any]:
        return known(self.models, ADAPTERS)

    def timed(self, network: str, size: Size | None, batch: int) -> Timed:
        """ViT-Adapter, from normalised images to its maps."""
        assert size is not None
        size = padded_size(size, ViTAdapter.size_divisor)
        images = self.normalised(size, batch)
        backbone = random_adapter(network, images, self, self.targets)

        def gflops(policy: Policy, result: tuple[dict[str, Tensor], Trace]) -> Tensor:
            return torch.stack(list(backbone_gflops(backbone, result[1], [size] * batch).values())).sum(0)

        return Timed(network=backbone, inputs=images.split(batch), gflops=gflops, autotune=self.autotune)


@dataclass(frozen=True, kw_only=True)
class NetworkBench(ModesBench):
    """A whole network, dense against a policy: trained models with theirs, or SegViT of random weights with DToP.

    Attributes:
        checkpoints: trained models of any kind; by default none, but `models`.
        models: names of backbones, random weights; with the papers' heads for 150 classes.
        sizes: (height, width) of the images in pixels; by default 512x512 and 640x640, and for checkpoints those that
            the model's own rule makes of the images.
        left: share of tokens that have left a random model after each auxiliary head; the thresholds of DToP, or the
            dial of another policy with weights, are set to it on the images.
        keep_per_class: DToP's k, for random models.
    """

    name, title = "network", "network: dense against its policy, everything included"

    checkpoints: tuple[Path, ...] = ()
    models: tuple[str, ...] = ("vit_b",)
    sizes: tuple[tuple[Count, Count], ...] = ()
    left: tuple[Share, ...] = (0.35, 0.55)
    keep_per_class: Natural = 5

    def all_sizes(self) -> Sequence[Size | None]:
        return self.sizes or ((None,) if self.checkpoints else PAPER_SIZES)

    def networks(self) -> dict[str, Any]:
        return opened(self.checkpoints, self) or known(self.models, SEGMENTERS)

    def timed(self, network: Any, size: Size | None, batch: int) -> Timed:
        if isinstance(network, str):
            assert size is not None
            images = self.normalised(size, batch)
            segmenter = random_segmenter(SIZES[network], *SEGMENTERS[network]).eval().to(images)
            segmenter.net.policy = random_exits(segmenter, images, self, self.left, self.keep_per_class)
            return timed_network(segmenter, images.split(batch), autotune=self.autotune)
        model = (network if size is None else network.as_given()).to(pick_device(self.device))
        return timed_model(model, self.unchanged(size, batch), precision=self.precision, autotune=self.autotune)

    def table(self, rows: list[dict[str, Any]]) -> Table:
        if all("left" in row for row in rows):
            return table_of(self.title, rows, {"left": [" ".join(f"{x:.0%}" for x in row["left"]) for row in rows]})
        return super().table(rows)


def bench_blocks(config: BlocksBench, console: Console | None = None) -> dict[str, Any]:
    """Time the blocks of backbones, see `run`."""
    return run(config, console)


def bench_backbone(config: BackboneBench, console: Console | None = None) -> dict[str, Any]:
    """Time backbones with their neck, see `run`."""
    return run(config, console)


def bench_network(config: NetworkBench, console: Console | None = None) -> dict[str, Any]:
    """Time whole networks, see `run`."""
    return run(config, console)


def opened(paths: Sequence[Path], policy: PolicyOptions) -> dict[str, Model]:
    """Trained models by the names that their rows have: the file's or folder's, or the whole path where two share one.

    Raises:
        ConfigError: see `sievit.load`; a policy that computes all tokens.
    """
    models: dict[str, Model] = {}
    for path in paths:
        name = str(path) if str(path).startswith(HUB) else path.stem if path.suffix == ".safetensors" else path.name
        model = load(path, policy=policy)
        if model.config.policy == DENSE:
            raise ConfigError(f"{path}: its policy computes every token: nothing to compare; give another by --policy")
        models[str(path) if name in models else name] = model
    return models


def timed_model(model: Model, batches: Sequence[list[Tensor]], **options: Any) -> Timed:
    """A model from images (3, h, w) in 0..1 to the answers on their pixels.

    In the compiled modes its network is compiled, from a batch to maps or scores; resizing, proposals, boxes and masks
    are not.

    Args:
        options: `autotune` and `precision` of `Timed`.
    """
    return Timed(
        network=model,
        inputs=batches,
        gflops=lambda policy, answer: model.gflops(answer),
        new_policy=model.new_policy,
        part=model.network,
        extra=lambda answer: {"found": answer.found()},
        figures=found_figures,
        about={"kind": kind_of(model.config), "policy": kind_of(model.config.policy)},
        **options,
    )


def found_figures(pairs: Sequence[Pair[Cost]]) -> dict[str, Any]:
    """What the cost of the sparse passes depends on beside tokens, such as detections: per image, by name."""
    images = sum(pair.sparse.images for pair in pairs)
    names = pairs[0].sparse.extra["found"]
    return {name: round(sum(pair.sparse.extra["found"][name] for pair in pairs) / images, 1) for name in names}


def timed_network(segmenter: Segmenter, batches: Sequence[Tensor], **options: Any) -> Timed:
    """The network of a segmenter, from normalised images to scores. The dense one computes the last head alone.

    Of early exits rows have `predicted_with_heads`, the ratio of multiply-adds to a dense network that computes the
    auxiliary heads too, as the released one does, and `left`, the share of tokens that are gone after each of them.
    """
    net, size = segmenter.net, (batches[0].shape[2], batches[0].shape[3])

    def extra(result: tuple[Tensor, Trace]) -> dict[str, Any]:
        trace = result[1]
        heads = [head for head in net.heads if isinstance(head, SemanticHead)]
        macs = sum(head.macs(trace.valid.sum(1), trace.grid).sum().item() for head in heads[:-1])
        return {"left": [exited.double().mean().item() for exited in trace.exited[:-1]], "heads": macs / 1e9}

    def figures(pairs: Sequence[Pair[Cost]]) -> dict[str, Any]:
        if "heads" not in net.policy.needs:
            return {}
        with_heads = [(pair.dense.gflops + pair.dense.extra["heads"]) / pair.sparse.gflops for pair in pairs]
        left = zip(*(pair.sparse.extra["left"] for pair in pairs), strict=True)
        return {
            "predicted_with_heads": round(statistics.median(with_heads), 3),
            "left": [round(statistics.fmean(shares), 3) for shares in left],
        }

    def gflops(policy: Policy, result: tuple[Tensor, Trace]) -> Tensor:
        return segmenter.gflops(Segmentation.whole(result[1], [size] * len(result[1].valid), size))

    new_policy = net.build_policy
    return Timed(
        network=net, inputs=batches, gflops=gflops, new_policy=new_policy, extra=extra, figures=figures, **options
    )


class _Blocks(nn.Module):
    """The blocks of a backbone, from the values of a canvas to those behind the last block."""

    def __init__(self, vit: ViT, policy: Policy, tokens: Tokens) -> None:
        super().__init__()
        self.vit, self.policy, self.tokens = vit, policy, tokens

    def forward(self, x: Tensor, *, policy: Policy, execution: Execution) -> tuple[Tensor, Trace]:
        tokens = replace(self.tokens, x=x)
        tokens, trace = self.vit.run_blocks(tokens, policy, Trace.start(tokens), execution=execution)
        return tokens.x, trace


def timed_blocks(vit: ViT, policy: Policy, batches: Sequence[Tensor], **options: Any) -> Timed:
    """The blocks on the canvases of images; `options` as in `timed_model`."""
    canvases = [vit.embed(images) for images in batches]

    def gflops(policy: Policy, result: tuple[Tensor, Trace]) -> Tensor:
        return (traced_macs(vit.config, result[1]).double() + policy.cost(result[1])) / 1e9

    network, inputs = _Blocks(vit, policy, canvases[0]), [tokens.x for tokens in canvases]
    return Timed(network=network, inputs=inputs, gflops=gflops, **options)
