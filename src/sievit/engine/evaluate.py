"""Accuracy, tokens, cost and time of a detector on a data set."""

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from sievit.config import ConfigError
from sievit.data.coco import CocoDetection, collate
from sievit.detector import Detector, Output
from sievit.distributed import world_size
from sievit.engine.batches import leave_signals_to_parent, loading
from sievit.flops import detector_gflops
from sievit.metrics import CocoMetric


@dataclass
class _Records:
    """What is collected image by image, beside the detections."""

    gflops: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    shares: list[list[float]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def add(self, model: Detector, output: Output, elapsed: float) -> None:
        """Add a batch that took `elapsed` milliseconds."""
        images = len(output.sizes)
        self.gflops += detector_gflops(model, output).tolist()
        self.milliseconds += [elapsed / images] * images
        self.shares += output.trace.shares().T.tolist()
        self.tokens += output.trace.counts().T.tolist()

    def gather(self) -> None:
        """Join with the records of all processes."""
        if world_size() > 1:
            parts: list[_Records] = [_Records()] * world_size()
            dist.all_gather_object(parts, self)
            for name in ("gflops", "milliseconds", "shares", "tokens"):
                setattr(self, name, [value for part in parts for value in getattr(part, name)])

    def figures(self) -> dict:
        """Means over images; time as median and 95th percentile."""
        ordered = sorted(self.milliseconds)
        return {
            "keep": [round(statistics.fmean(column), 4) for column in zip(*self.shares, strict=True)],
            "tokens": [round(statistics.fmean(column), 1) for column in zip(*self.tokens, strict=True)],
            "gflops": round(statistics.fmean(self.gflops), 3),
            "gflops_std": round(statistics.pstdev(self.gflops), 3),
            "ms_per_image": round(statistics.median(ordered), 2),
            "ms_per_image_p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
            "images": len(ordered),
        }


def evaluate(
    model: Detector,
    dataset: CocoDetection,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    max_detections: int = 100,
    precision: str = "32-true",
    workers: int = 0,
    console: Console | None = None,
    title: str = "evaluating",
) -> dict:
    """Every figure of a model on a data set; with several processes each takes its share and all get the figures.

    Args:
        limit: the first so many images.
        max_detections: per image, judged by the metric.
        precision: "32-true", or "bf16-mixed" or "16-mixed" for automatic mixed precision.
        workers: processes that load images; 0 loads in this one.
        console: where the progress bar goes; None for none.

    Returns:
        box_ap, box_ap50, ... and mask_ap, ... (0..1); per block `keep` (mean share of an image's tokens) and `tokens`
        (mean count); `gflops` per image and its `gflops_std`; `ms_per_image` of the model alone (median, and `_p95`);
        `images`.

    Raises:
        ConfigError: an image cannot be read, and the message names it; or there is none.
    """
    total = _number(dataset, limit)
    rank = dist.get_rank() if world_size() > 1 else 0
    part = Subset(dataset, range(rank, total, world_size()))
    loader = DataLoader(
        part, batch_size, collate_fn=collate, num_workers=workers, worker_init_fn=leave_signals_to_parent
    )
    metric = _metric(model, dataset, max_detections)
    records = _Records()
    batches = loading(loader)
    if console is not None:
        batches = track(batches, title, total=len(loader), console=console, transient=True)
    training = model.training
    model.eval()
    try:
        for images, targets in batches:
            output, elapsed = timed(model, images, precision=precision)
            records.add(model, output, elapsed)
            for target, detection in zip(targets, output.detections, strict=True):
                metric.update(target["image_id"], detection)
    finally:
        model.train(training)
    records.gather()
    return {**{k: round(v, 5) for k, v in metric.compute().items()}, **records.figures()}


def compare(
    dense: Detector,
    sparse: Detector,
    dataset: CocoDetection,
    *,
    limit: int | None = None,
    max_detections: int = 100,
    precision: str = "32-true",
    console: Console | None = None,
    title: str = "comparing",
) -> dict:
    """Two models on the same images, one at a time and in alternating order.

    Returns:
        `dense` and `sparse`, each as `evaluate` returns it; `speedup`, the median over images of the ratio of times,
        and `speedup_quartiles`, the first and the third.
    """
    models = {"dense": dense.eval(), "sparse": sparse.eval()}
    total = _number(dataset, limit)
    metrics = {name: _metric(model, dataset, max_detections) for name, model in models.items()}
    records = {name: _Records() for name in models}
    for model in models.values():
        timed(model, [dataset[0][0]], precision=precision)
    indices = range(total) if console is None else track(range(total), title, console=console, transient=True)
    for index in indices:
        image, target = dataset[index]
        for name in sorted(models, reverse=index % 2 == 1):
            output, elapsed = timed(models[name], [image], precision=precision)
            records[name].add(models[name], output, elapsed)
            metrics[name].update(target["image_id"], output.detections[0])
    pairs = zip(records["dense"].milliseconds, records["sparse"].milliseconds, strict=True)
    ratios = [a / b for a, b in pairs]
    figures: dict = {
        name: {**{k: round(v, 5) for k, v in metrics[name].compute().items()}, **records[name].figures()}
        for name in models
    }
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    figures["speedup"] = round(statistics.median(ratios), 3)
    figures["speedup_quartiles"] = [round(quartiles[0], 3), round(quartiles[2], 3)]
    return figures


@torch.inference_mode()
def timed(model: Detector, images: Sequence[Tensor], *, precision: str = "32-true") -> tuple[Output, float]:
    """A pass, and the milliseconds it took, from images in memory to detections on their pixels."""
    device = model.device
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    mixed = nullcontext() if precision == "32-true" else torch.autocast(device.type, dtype=dtype)
    _synchronise(device)
    start = time.perf_counter()
    with mixed:
        output = model(list(images))
    _synchronise(device)
    return output, (time.perf_counter() - start) * 1e3


def _number(dataset: CocoDetection, limit: int | None) -> int:
    """How many images are looked at."""
    total = len(dataset) if limit is None else min(limit, len(dataset))
    if total < 1:
        raise ConfigError(f"{dataset.annotations.source}: no image to evaluate on")
    return total


def _metric(model: Detector, dataset: CocoDetection, max_detections: int) -> CocoMetric:
    """Masks are judged where both the model and the truth have them."""
    with_masks = model.config.head.with_masks and dataset.annotations.has_masks
    return CocoMetric(dataset.annotations, with_masks=with_masks, max_detections=max_detections)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
