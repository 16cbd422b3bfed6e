"""What a model costs: on paper, before anything is trained, and image by image on a folder of images."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table

from sievit import terminal
from sievit.config import ConfigError, Count, check_range, kind_of
from sievit.data.images import list_images, read_image, to_tensor
from sievit.models.base import Answer, Model
from sievit.models.build import build
from sievit.models.inputs import ModelConfig, Size

BINS = 8
"""Bars of the histogram."""
QUANTILES = (5, 25, 50, 75, 95)
"""Percentiles of the GFLOPs per image."""


def costs(config: ModelConfig, *, size: Size | None = None, console: Console | None = None) -> dict[str, Any]:
    """GFLOPs of a model for an image in which every token takes part in every block; no weights are made.

    Args:
        size: (height, width) in pixels; None: `ModelConfig.default_size`.
        console: where a table goes; None for none.

    Returns:
        `gflops` by the published rule (everything, where there is none), `gflops_full` with everything that is
        computed, with the policy's gates and heads, `by_module` its parts, `size`, `policy` and
        `parameters`.

    Raises:
        ConfigError: an image without pixels.
    """
    size = config.default_size if size is None else size
    check_range(tuple[Count, Count], size, "size")
    with torch.device("meta"):
        model = build(config)
    answer = model.dense_answer(size)
    parts = {name: round(value.item(), 6) for name, value in model.count(answer).items()}
    full, published = round(sum(parts.values()), 6), model.published_gflops(answer)
    figures = {
        "gflops": full if published is None else round(published.item(), 6),
        "gflops_full": full,
        "by_module": parts,
        "size": list(size),
        "policy": kind_of(config.policy),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if console is not None:
        console.print(_table(figures, published=published is not None))
    return figures


@torch.inference_mode()
def per_image(
    model: Model,
    folder: Path,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    console: Console | None = None,
    progress: Console | None = None,
) -> dict[str, Any]:
    """What a trained model spends on each image of a folder.

    Args:
        limit: the first so many images.
        console: where a table with a histogram goes. progress: where the progress bar does. None for none.

    Returns:
        Of GFLOPs with everything `mean`, `std`, `min`, `max` and `quantiles`; where there is a published rule,
        `published`, the mean by it; `keep`, the mean share of tokens in each block; where tokens leave early,
        `left_at`, the mean share that leaves at each stage; `images`, the same of each with its `file`; and `failures`,
        files that could not be read, if there are any.

    Raises:
        ConfigError: no such folder, or no image in it that can be read.
    """
    check_range(Count, batch_size, "batch_size")
    check_range(Count | None, limit, "limit")
    paths = list_images(folder)[:limit]
    model.eval()
    rows, failures = [], []
    starts = range(0, len(paths), batch_size)
    for start in terminal.track(starts, "counting", console=progress):
        images, names = [], []
        for path in paths[start : start + batch_size]:
            try:
                images.append(to_tensor(read_image(path)))
                names.append(path.relative_to(folder).as_posix())
            except ConfigError as error:
                failures.append(str(error))
        if images:
            as_it_stands = replace(model.config.execution, compiled=False)
            rows += _rows(model, model(images, execution=as_it_stands), names)
    if not rows:
        raise ConfigError(f"{folder}: none of its {len(paths)} images can be read; the first: {failures[0]}")
    figures = {**_summary([row["gflops"] for row in rows]), **_means(rows), "images": rows}
    if failures:
        figures["failures"] = failures
    if console is not None:
        console.print(_distribution(figures, str(folder)))
    return figures


def _rows(model: Model, answer: Answer, names: Sequence[str]) -> list[dict[str, Any]]:
    """The figures of each image of a pass."""
    spent, published = model.spent(answer), model.published_gflops(answer)
    gflops = {"gflops": spent.pop("gflops")} | ({} if published is None else {"published": published})
    del spent["tokens"]
    return [
        {
            "file": name,
            **{key: round(value[i].item(), 6) for key, value in gflops.items()},
            **{key: [round(share, 4) for share in value[i].tolist()] for key, value in spent.items()},
        }
        for i, name in enumerate(names)
    ]


def _summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, spread and quantiles."""
    quantiles = np.quantile(values, [q / 100 for q in QUANTILES]).tolist()
    return {
        "mean": round(statistics.fmean(values), 6),
        "std": round(statistics.pstdev(values), 6),
        "min": min(values),
        "max": max(values),
        "quantiles": {str(q): round(value, 6) for q, value in zip(QUANTILES, quantiles, strict=True)},
    }


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means over images of everything but GFLOPs."""
    keys = [key for key, value in rows[0].items() if key == "published" or isinstance(value, list)]
    means = {key: np.mean([row[key] for row in rows], axis=0) for key in keys}
    return {key: np.round(mean, 4 if mean.ndim else 6).tolist() for key, mean in means.items()}


def _table(figures: dict[str, Any], *, published: bool) -> Table:
    height, width = figures["size"]
    title = f"{height}x{width} pixels, every token in every block, {figures['parameters'] / 1e6:.1f} M parameters"
    table = Table(
        "", *(Column(name, justify="right") for name in ("GFLOPs", "share")), title=title, title_justify="left"
    )
    for name, value in figures["by_module"].items():
        table.add_row(name, f"{value:.3f}", f"{value / figures['gflops_full']:.1%}")
    table.add_section()
    table.add_row("everything", f"{figures['gflops_full']:.3f}", "")
    if published:
        table.add_row("by the published rule", f"{figures['gflops']:.3f}", "")
    return table


def _distribution(figures: dict[str, Any], source: str) -> Table:
    """A histogram of the GFLOPs per image."""
    values = [row["gflops"] for row in figures["images"]]
    low, high = figures["min"], figures["max"]
    counts, edges = np.histogram(values, np.linspace(low, high, 1 + (BINS if high > low else 1)))
    title = f"{source}: {len(values)} images, {figures['mean']:.2f} GFLOPs (± {figures['std']:.2f})"
    numbers = (Column(name, justify="right") for name in ("GFLOPs", "images"))
    table = Table(*numbers, Column("", min_width=30), title=title, title_justify="left")
    for first, last, count in zip(edges, edges[1:], counts.tolist(), strict=False):
        table.add_row(f"{first:.2f} - {last:.2f}", str(count), "█" * round(30 * count / max(counts)))
    if "left_at" in figures:
        table.add_section()
        for stage, share in enumerate(figures["left_at"]):
            table.add_row(f"left at stage {stage}", f"{share:.1%}", "")
    return table
