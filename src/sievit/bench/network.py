"""Whole networks, dense against a policy: SegViT of random weights, or trained models.

Random segmenters are timed from normalised images to scores on their pixels; trained models from images in memory to
answers on the pixels of the images, resizing, padding and windows included.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sievit.bench.common import ModesBench, Workplace, known, run, table_of
from sievit.bench.random_models import SEGMENTERS, SIZES, random_exits, random_segmenter
from sievit.bench.timing import Cost, Timed, time_modes
from sievit.config import ConfigError, Count, Natural, Share, kind_of
from sievit.heads import SemanticHead
from sievit.hub.fetch import HUB
from sievit.measure.clock import Pair
from sievit.measure.modes import DENSE
from sievit.models.base import Answer, Model
from sievit.models.build import load
from sievit.models.inputs import Size
from sievit.models.segmenter import Segmentation, Segmenter
from sievit.policies import Policy, PolicyOptions
from sievit.tokens import Trace

PAPER_SIZES = ((512, 512), (640, 640))


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

    name = "network"

    checkpoints: tuple[Path, ...] = ()
    models: tuple[str, ...] = ("vit_b",)
    sizes: tuple[tuple[Count, Count], ...] = ()
    left: tuple[Share, ...] = (0.35, 0.55)
    keep_per_class: Natural = 5

    def all_sizes(self) -> Sequence[Size | None]:
        return self.sizes or ((None,) if self.checkpoints else PAPER_SIZES)

    def networks(self) -> dict[str, Any]:
        return opened(self.checkpoints, self) or known(self.models, {name: name for name in SEGMENTERS})

    def rows(
        self, network: Any, size: Size | None, batch: int, place: Workplace, modes: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        if isinstance(network, str):
            assert size is not None
            images = place.normalised(size, batch)
            segmenter = random_segmenter(SIZES[network], *SEGMENTERS[network]).eval().to(images)
            segmenter.net.policy = random_exits(segmenter, images, self, self.left, self.keep_per_class)
            timed = timed_network(segmenter, images.split(batch), autotune=self.autotune)
            yield from time_modes(timed, modes, multiple=self.multiple)
            return
        model = (network if size is None else network.as_given()).to(place.device)
        timed = timed_model(model, place.images(size, batch), precision=self.precision, autotune=self.autotune)
        for row in time_modes(timed, modes, multiple=self.multiple):
            yield {**row, "kind": kind_of(model.config), "policy": kind_of(model.config.policy)}

    def table(self, rows: list[dict[str, Any]]) -> Table:
        title = "network: dense against its policy, everything included"
        if all("left" in row for row in rows):
            return table_of(title, rows, {"left": [" ".join(f"{x:.0%}" for x in row["left"]) for row in rows]})
        return table_of(title, rows)


@torch.inference_mode()
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


def timed_model(model: Model, batches: Sequence[list[Tensor]], **options: Any) -> Timed[list[Tensor], Answer]:
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
        **options,
    )


def found_figures(pairs: Sequence[Pair[Cost]]) -> dict[str, Any]:
    """What the cost of the sparse passes depends on beside tokens, such as detections: per image, by name."""
    images = sum(pair.sparse.images for pair in pairs)
    names = pairs[0].sparse.extra["found"]
    return {name: round(sum(pair.sparse.extra["found"][name] for pair in pairs) / images, 1) for name in names}


def timed_network(
    segmenter: Segmenter, batches: Sequence[Tensor], **options: Any
) -> Timed[Tensor, tuple[Tensor, Trace]]:
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

    return Timed(
        network=net,
        inputs=batches,
        gflops=gflops,
        new_policy=net.build_policy,
        extra=extra,
        figures=figures,
        **options,
    )
