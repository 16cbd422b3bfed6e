"""What all benches share: options, pictures, the clock, runs in turns, and the table."""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sievit.config import ConfigError, nearest
from sievit.data.images import list_images, read_image, to_tensor
from sievit.data.scenes import draw
from sievit.devices import device_name, pick_device
from sievit.engine.recipe import default_data_root
from sievit.inputs import Size
from sievit.vit import ViTConfig

T = TypeVar("T")
R = TypeVar("R")

SIZES = {
    "vit_t": ViTConfig(embed_dim=192, num_heads=3),
    "vit_s": ViTConfig(embed_dim=384, num_heads=6),
    "vit_b": ViTConfig(embed_dim=768, num_heads=12),
    "vit_l": ViTConfig(embed_dim=1024, num_heads=16, depth=24),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCENE = (480, 640)
"""Height and width of the scenes that stand in where there are no pictures and no size is asked for."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is timed, and how.

    Attributes:
        sizes: (height, width) of the images in pixels; 512x512 are 1024 tokens, 800x1216 are 3800.
        batches: images at once.
        images: folder of pictures; by default photos/ in the folder of data sets, and without it generated scenes.
        repeats: timed pairs per row, each on other images; at least 2.
        threads: CPU threads; torch's own choice where it is not given.
        device: "auto" takes CUDA where there is one.
        precision: "float32", or "bfloat16".
    """

    sizes: tuple[tuple[int, int], ...] = ((512, 512), (800, 1216))
    batches: tuple[int, ...] = (1, 4)
    images: Path | None = None
    repeats: int = 9
    threads: int | None = None
    device: str = "auto"
    precision: str = "float32"


@dataclass(frozen=True)
class Place:
    """Where a bench runs, and the pictures it runs on.

    Attributes:
        folder: of the pictures; None: generated scenes.
        count: pictures per image of a batch, one for each timed pair.
    """

    device: torch.device
    dtype: torch.dtype
    folder: Path | None
    count: int

    def pictures(self, size: Size, batch: int) -> Tensor:
        """(count * batch, 3, h, w), normalised, cropped to the aspect of `size` and resized to it."""
        return load_pictures(self.folder, size, self.count * batch).to(self.device, self.dtype)

    def images(self, size: Size | None, batch: int) -> list[list[Tensor]]:
        """`count` batches of images (3, h, w) in 0..1, in memory: of their own sizes, or fitted to one."""
        images = load_images(self.folder, size, self.count * batch)
        return [images[start : start + batch] for start in range(0, len(images), batch)]


class Pair(NamedTuple, Generic[R]):
    """A dense and a sparse run on the same images: milliseconds, and what came of it."""

    dense_ms: float
    sparse_ms: float
    dense: R
    sparse: R


def run(
    name: str,
    config: Bench,
    models: Iterable[str],
    sizes: Sequence[Size | None],
    row_of: Callable[[str, Size | None, int, Place], dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], Table],
    console: Console | None,
) -> dict[str, Any]:
    """Every combination of model, size and batch: a table for people, and a dict.

    Args:
        sizes: None among them: images of their own sizes.
        row_of: (model, size, batch, place) to the figures of a row.

    Raises:
        ConfigError: fewer than two repeats, an unknown precision, or a folder without pictures.
    """
    console = console or Console()
    if config.repeats < 2:
        raise ConfigError(f"repeats is at least 2, not {config.repeats}")
    if config.precision not in ("float32", "bfloat16"):
        raise ConfigError(f"unknown precision {config.precision!r}{nearest(config.precision, ('float32', 'bfloat16'))}")
    if config.threads:
        torch.set_num_threads(config.threads)
    photos = default_data_root() / "photos"
    folder = photos if config.images is None and photos.is_dir() else config.images
    place = Place(pick_device(config.device), getattr(torch, config.precision), folder, config.repeats)
    jobs = [(model, size, batch) for model in models for size in sizes for batch in config.batches]
    rows = []
    for model, size, batch in track(jobs, "timing", console=console, transient=True):
        shown = "own" if size is None else list(size)
        row = {"model": model, "size": shown, "batch": batch, "device": device_name(place.device)}
        rows.append({**row, "precision": config.precision, **row_of(model, size, batch, place)})
    console.print(table(rows))
    return {
        "bench": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "pictures": "scenes" if folder is None else folder.name,
        "rows": rows,
    }


def check_known(models: Sequence[str], known: Iterable[str]) -> None:
    """Raise unless all are known.

    Raises:
        ConfigError: an unknown model; the nearest name is given.
    """
    for model in models:
        if model not in known:
            raise ConfigError(f"unknown model {model!r}{nearest(model, known)}")


def alternately(
    dense: Callable[[T], R], sparse: Callable[[T], R], inputs: Sequence[T], device: torch.device
) -> list[Pair[R]]:
    """Both calls on each input, warmed up on the first, in turns as to which comes first."""
    for call in (dense, sparse, dense, sparse):
        call(inputs[0])
    pairs = []
    for i, images in enumerate(inputs):
        done = {}
        for call in (dense, sparse) if i % 2 else (sparse, dense):
            done[call] = clocked(lambda call=call, images=images: call(images), device)
        (dense_ms, dense_result), (sparse_ms, sparse_result) = done[dense], done[sparse]
        pairs.append(Pair(dense_ms, sparse_ms, dense_result, sparse_result))
    return pairs


def summary(pairs: Sequence[Pair], predicted: Sequence[float]) -> dict[str, Any]:
    """Medians over the pairs, and their spread; `predicted` is the ratio of multiply-adds of each pair."""
    ratios = [pair.dense_ms / pair.sparse_ms for pair in pairs]
    shares = [a / b for a, b in zip(ratios, predicted, strict=True)]
    figures: dict[str, Any] = {}
    for name in ("dense_ms", "sparse_ms"):
        ordered = sorted(getattr(pair, name) for pair in pairs)
        figures[name] = round(statistics.median(ordered), 2)
        figures[f"{name}_p95"] = round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2)
    return {
        **figures,
        "speedup": round(statistics.median(ratios), 3),
        "predicted": round(statistics.median(predicted), 3),
        "realised": round(statistics.median(shares), 3),
        "realised_quartiles": [round(q, 3) for q in statistics.quantiles(shares, n=4)[::2]],
        "pairs": len(pairs),
    }


def clocked(call: Callable[[], R], device: torch.device) -> tuple[float, R]:
    """Milliseconds that a call took, and what it returned."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3, result


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(call: Callable[[], object], device: torch.device) -> float:
    """Megabytes (1e6 bytes) of tensors that a call held at once at most, beside those that were there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own remarks are not for whoever reads the table
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    held = peak = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return round(peak / 1e6, 1)


def load_pictures(folder: Path | None, size: Size, count: int) -> Tensor:
    """(count, 3, h, w), normalised: the pictures of a folder, cropped to the aspect and resized, in turn.

    Without a folder they are generated scenes.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return torch.stack([(picture - mean) / std for picture in load_images(folder, size, count)])


def load_images(folder: Path | None, size: Size | None, count: int) -> list[Tensor]:
    """`count` images (3, h, w) in 0..1 of a folder, in turn; of their own sizes, or fitted to one.

    Without a folder they are generated scenes.
    """
    if folder is None:
        scenes = [torch.from_numpy(draw(seed=1, index=i, size=size or SCENE)[0]) for i in range(min(count, 4))]
        pictures = [scene.permute(2, 0, 1).float() / 255 for scene in scenes]
    else:
        pictures = [to_tensor(read_image(path)).float() / 255 for path in list_images(folder)[:count]]
        pictures = pictures if size is None else [fitted(picture, size) for picture in pictures]
    return (pictures * math.ceil(count / len(pictures)))[:count]


def fitted(picture: Tensor, size: Size) -> Tensor:
    """(3, h, w) in 0..1: resized to cover `size`, then cropped around the middle."""
    scale = max(size[0] / picture.shape[1], size[1] / picture.shape[2])
    shape = [max(side, round(own * scale)) for side, own in zip(size, picture.shape[1:], strict=True)]
    resized = F.interpolate(picture[None], shape, mode="bilinear", antialias=True)[0]
    top, left = (resized.shape[1] - size[0]) // 2, (resized.shape[2] - size[1]) // 2
    return resized[:, top : top + size[0], left : left + size[1]].clamp(0, 1)


def table_of(title: str, rows: list[dict[str, Any]], extra: dict[str, list[str]]) -> Table:
    """Times and ratios of all rows; `extra` columns by name, one text per row."""
    table = Table(title=title, box=SIMPLE, collapse_padding=True)
    ratios = ("speed-\nup", "pre-\ndicted", "real-\nised")
    for column in ("model", "tokens", "batch", "dense\nms", "sparse\nms", *extra, *ratios):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for i, row in enumerate(rows):
        figures = [row["tokens"], row["batch"], row["dense_ms"], row["sparse_ms"]]
        figures += [*(column[i] for column in extra.values()), row["speedup"], row["predicted"]]
        table.add_row(row["model"], *map(str, figures), f"{row['realised']:.0%}")
    return table


def percent(shares: Iterable[float]) -> str:
    """Shares in a cell of a table."""
    return " ".join(f"{share:.0%}" for share in shares)
