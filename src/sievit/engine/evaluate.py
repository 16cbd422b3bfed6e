"""Accuracy, tokens, cost and time of a model on a data set."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sievit import terminal
from sievit.config import ConfigError, kind_of
from sievit.data.dataset import ImageDataset
from sievit.distributed import gathered, rank, world_size
from sievit.engine.batches import leave_signals_to_parent, loading
from sievit.engine.bootstrap import differences
from sievit.measure.clock import Quartiles, clocked, in_turns, median_and_p95
from sievit.models.base import Answer, Model
from sievit.tasks import Metric, task_of


class _Records:
    """What the images took: by name a value, or values by block or stage, for each of them."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}

    def add(self, model: Model, answer: Answer, elapsed: float) -> None:
        """Add a batch that took `elapsed` milliseconds."""
        spent = {name: value.tolist() for name, value in model.spent(answer).items()}
        images = len(answer.sizes)
        for name, values in {**spent, "ms": [elapsed / images] * images}.items():
            self.values.setdefault(name, []).extend(values)

    def gather(self) -> None:
        """Join with the records of all processes."""
        parts = gathered(self.values)
        self.values = {name: [v for part in parts for v in part.get(name, ())] for part in parts for name in part}

    def figures(self) -> dict:
        """Means over images; time as median and 95th percentile."""
        if not self.values:
            return {"images": 0}
        known, gflops, ms = dict(self.values), self.values["gflops"], self.values["ms"]
        figures = {
            "keep": [round(statistics.fmean(column), 4) for column in zip(*known.pop("keep"), strict=True)],
            "tokens": [round(statistics.fmean(column), 1) for column in zip(*known.pop("tokens"), strict=True)],
            "gflops": round(statistics.fmean(gflops), 3),
            "gflops_std": round(statistics.pstdev(gflops), 3),
            "gflops_min": round(min(gflops), 3),
            "gflops_max": round(max(gflops), 3),
            **median_and_p95("ms_per_image", ms),
            "images": len(ms),
        }
        for name in known.keys() - {"gflops", "ms"}:
            stages = list(zip(*known[name], strict=True))
            for suffix, of in (("", statistics.fmean), ("_std", statistics.pstdev), ("_min", min), ("_max", max)):
                figures[name + suffix] = [round(of(stage), 4) for stage in stages]
        return figures


class _Part(Dataset):
    """Every `step`-th sample of a data set from `first` on; a sample that cannot be had is what is wrong with it."""

    def __init__(self, dataset: ImageDataset, first: int, total: int, step: int, *, skip: bool) -> None:
        self.dataset, self.indices, self.skip = dataset, range(first, total, step), skip

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[self.indices[index]]
        except ConfigError as error:
            if not self.skip:
                raise
            return str(error)


def evaluate(
    model: Model,
    dataset: ImageDataset,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    precision: str = "32-true",
    workers: int = 0,
    skip_failures: bool = False,
    metric: Metric | None = None,
    console: Console | None = None,
    title: str = "evaluating",
) -> dict:
    """Every figure of a model on a data set; with several processes each takes its share and all get the figures.

    Args:
        limit: the first so many images.
        precision: "32-true", or "bf16-mixed" or "16-mixed" for automatic mixed precision.
        workers: processes that load images; 0 loads in this one.
        skip_failures: go on without images that cannot be used; the figures then hold `failures`, what is wrong.
        metric: a new one of the task, for a caller that asks it for more; by default one of its own.
        console: where the progress bar goes; None for none.

    Returns:
        Of a detector box_ap, box_ap50, ... and mask_ap, ...; of a segmenter miou, pixel_accuracy, mean_accuracy and iou
        per class (all 0..1); per block `keep` (mean share of an image's tokens) and `tokens` (mean count); `gflops` per
        image (mean, `_std`, `_min`, `_max`); `ms_per_image` of the model alone (median, and `_p95`); where tokens leave
        early, `left_at`: the share of an image's tokens that leave at each stage (mean, `_std`, `_min`, `_max`);
        `images`.

    Raises:
        ConfigError: an image cannot be read, and the message names it; or there is none.
    """
    total = _number(dataset, limit)
    part = _Part(dataset, rank(), total, world_size(), skip=skip_failures)
    loader = DataLoader(part, batch_size, collate_fn=list, num_workers=workers, worker_init_fn=leave_signals_to_parent)
    metric, records, failures = metric or task_of(model.config).metric(dataset), _Records(), []
    batches: Iterable[Any] = loading(loader)
    batches = terminal.track(batches, title, total=len(loader), console=console)
    training = model.training
    model.eval()
    try:
        for batch in batches:
            failures += [sample for sample in batch if isinstance(sample, str)]
            samples: list[Any] = [sample for sample in batch if not isinstance(sample, str)]
            if samples:
                answer, elapsed = timed(model, [image for image, _ in samples], precision=precision)
                records.add(model, answer, elapsed)
                for (_, target), result in zip(samples, answer.results, strict=True):
                    metric.update(target, result)
    finally:
        model.train(training)
    records.gather()
    figures = {**_rounded(metric.compute()), **records.figures()}
    failures = [failure for part in gathered(failures) for failure in part]
    return {**figures, "failures": failures} if failures else figures


def compare(
    dense: Model,
    sparse: Model,
    dataset: ImageDataset,
    *,
    limit: int | None = None,
    precision: str = "32-true",
    metrics: Mapping[str, Metric] | None = None,
    seen: Callable[[int, dict[str, tuple[Any, float]]], None] | None = None,
    console: Console | None = None,
    title: str = "comparing",
) -> dict:
    """Two models on the same images, one at a time and in alternating order.

    Args:
        metrics: new ones of the task for `dense` and `sparse`, for a caller that asks them for more.
        seen: is told of each image its index, and by model the answer and the milliseconds that it took.

    Returns:
        `dense` and `sparse`, each as `evaluate` returns it; `speedup`, the median over images of the ratio of times,
        and `speedup_quartiles`, the first and the third; `differences`, of the sparse model minus the dense one, see
        `engine.bootstrap`.

    Raises:
        ConfigError: an image cannot be read, and the message names it; there is none; or the models are of other
            kinds or have other classes.
    """
    if (kind_of(dense.config), dense.config.classes) != (kind_of(sparse.config), sparse.config.classes):
        raise ConfigError("the two models are not of one kind with the same classes, and cannot be compared")
    models = {"dense": dense.eval(), "sparse": sparse.eval()}
    total = _number(dataset, limit)
    metrics = metrics or {name: task_of(model.config).metric(dataset) for name, model in models.items()}
    records = {name: _Records() for name in models}
    for model in models.values():
        timed(model, [dataset[0][0]], precision=precision)
    for index in terminal.track(range(total), title, console=console):
        image, target = dataset[index]
        answers = {}
        for name in sorted(models, reverse=index % 2 == 1):
            answers[name] = answer, elapsed = timed(models[name], [image], precision=precision)
            records[name].add(models[name], answer, elapsed)
            metrics[name].update(target, answer.results[0])
        if seen is not None:
            seen(index, answers)
    speedup = Quartiles.of_ratios(records["dense"].values["ms"], records["sparse"].values["ms"]).to_json()
    figures: dict = {name: {**_rounded(metrics[name].compute()), **records[name].figures()} for name in models}
    figures["speedup"], figures["speedup_quartiles"] = speedup["median"], speedup["quartiles"]
    figures["differences"] = differences(metrics["dense"], metrics["sparse"], total)
    return figures


@torch.inference_mode()
def timed(model: Model, images: Sequence[Tensor], *, precision: str = "32-true") -> tuple[Any, float]:
    """A pass, and the milliseconds it took, from images in memory to answers on their pixels."""
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    with torch.autocast(model.device.type, dtype=dtype) if precision != "32-true" else nullcontext():
        elapsed, answer = clocked(lambda: model(list(images)), model.device)
    return answer, elapsed


def timed_in_turns(
    models: Sequence[Model],
    images: Sequence[Tensor],
    *,
    console: Console | None,
    title: str = "timing",
    kept: Callable[[Any], Any] = lambda answer: None,
) -> list[list[tuple[float, Any]]]:
    """All models on each image alone, in turns, after a pass that is not timed.

    Args:
        kept: an answer to what is returned of it.

    Returns:
        Of each model milliseconds and what is kept, image by image.
    """
    calls = [partial(timed, model) for model in models]
    for call in calls:
        call([images[0]])
    inputs = terminal.track([[image] for image in images], title, console=console)
    return in_turns(calls, inputs, lambda _, call: call()[::-1], lambda _, answer: kept(answer))


def _number(dataset: ImageDataset, limit: int | None) -> int:
    """How many images are looked at."""
    total = len(dataset) if limit is None else min(limit, len(dataset))
    if total < 1:
        raise ConfigError(f"{dataset.source}: no image to evaluate on")
    return total


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: [round(x, 5) for x in v] if isinstance(v, list) else round(v, 5) for k, v in figures.items()}
