"""What all benches share: options, images, the walk over all combinations, and the table."""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sievit import terminal
from sievit.bench.rows import RowsFile
from sievit.config import ConfigError, Count, nearest, to_json
from sievit.data.images import list_images, read_image, to_tensor
from sievit.data.scenes import draw
from sievit.devices import device_name, pick_device
from sievit.engine.recipe import default_data_root
from sievit.measure.modes import RunMode
from sievit.models.inputs import Size
from sievit.policies import PolicyOptions

N = TypeVar("N")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCENE = (480, 640)
"""Height and width of the scenes that stand in where there are no images and no size is asked for."""


@dataclass(frozen=True)
class Workplace:
    """Where a bench runs, and the images it runs on.

    Attributes:
        folder: of the images; None: generated scenes.
        count: batches, one for each timed pair.
    """

    device: torch.device
    dtype: torch.dtype
    folder: Path | None
    count: int

    def normalised(self, size: Size, batch: int) -> Tensor:
        """(count * batch, 3, h, w), normalised, cropped to the aspect of `size` and resized to it."""
        return normalised(load_images(self.folder, size, self.count * batch)).to(self.device, self.dtype)

    def images(self, size: Size | None, batch: int) -> list[list[Tensor]]:
        """`count` batches of images (3, h, w) in 0..1, in the device's memory: of their own sizes, or fitted to one."""
        images = [image.to(self.device) for image in load_images(self.folder, size, self.count * batch)]
        return [images[start : start + batch] for start in range(0, len(images), batch)]


@dataclass(frozen=True, kw_only=True)
class Bench(PolicyOptions, ABC):
    """What is timed, and how.

    Attributes:
        sizes: (height, width) of the images in pixels; 512x512 are 1024 tokens, 800x1216 are 3800.
        batches: images at once.
        images: folder of images; by default photos/ in the folder of data sets, and without it generated scenes.
        repeats: timed pairs per row, each on other images; at least 2.
        threads: CPU threads; torch's choice where it is not given.
        device: "auto" takes CUDA where there is one.
        precision: "float32", or "bfloat16": random models have weights of it, trained ones run under autocast, as in
            `sievit eval`.
        out: folder for the rows as JSON and their picture, both named after the bench; by default neither is written.
            The JSON is written anew after each row.
        resume: keep the rows that are in the JSON already, and measure only what is missing; without it the file is
            started anew.
    """

    name: ClassVar[str]

    sizes: tuple[tuple[Count, Count], ...] = ((512, 512), (800, 1216))
    batches: tuple[Count, ...] = (1, 4)
    images: Path | None = None
    repeats: Count = 9
    threads: Count | None = None
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    out: Path | None = None
    resume: bool = False

    @abstractmethod
    def networks(self) -> dict[str, Any]:
        """What is timed, by the name that its rows have.

        Raises:
            ConfigError: an unknown model, or one that cannot be loaded.
        """

    @abstractmethod
    def rows(
        self, network: Any, size: Size | None, batch: int, place: Workplace, modes: Sequence[str]
    ) -> Iterable[dict[str, Any]]:
        """The figures of one of `networks`, a row for each mode."""

    @abstractmethod
    def table(self, rows: list[dict[str, Any]]) -> Table:
        """Rows for people."""

    def all_modes(self) -> Sequence[str]:
        """The modes that are timed."""
        return ("dynamic",)

    def all_sizes(self) -> Sequence[Size | None]:
        """The sizes of the images; None: their own."""
        return self.sizes


@dataclass(frozen=True, kw_only=True)
class ModesBench(Bench):
    """A bench that times several modes.

    Attributes:
        modes: each in turns with the dense model, uncompiled: dense, dynamic, bucketed and static, also with _compiled
            (torch.compile) and _graphs (with CUDA graphs) behind them, and dynamic_batched; docs/speed.md says what
            they are. dense shows how much the clock wanders.
        multiple: static counts are rounded up to a multiple of it.
        autotune: graphs are compiled with `max-autotune` instead of `reduce-overhead`, which takes much longer.
    """

    modes: tuple[str, ...] = ("dense", "dynamic", "static")
    multiple: Count = 8
    autotune: bool = False

    def all_modes(self) -> Sequence[str]:
        return self.modes


def run(bench: Bench, console: Console | None = None) -> dict[str, Any]:
    """Every combination of model, size, batch and mode: print a table, and return a dict with `rows`.

    Raises:
        ConfigError: fewer than two repeats, an unknown model, precision or mode, a model that cannot be loaded, a
            folder without images, or rows to be kept that were measured with other settings.
    """
    console = console or terminal.console(stderr=False)
    if bench.repeats < 2:
        raise ConfigError(f"repeats is at least 2, not {bench.repeats}")
    if bench.precision not in ("float32", "bfloat16"):
        raise ConfigError(f"unknown precision {bench.precision!r}{nearest(bench.precision, ('float32', 'bfloat16'))}")
    modes = [RunMode.of(mode).name for mode in bench.all_modes()]
    networks = bench.networks()
    if bench.threads:
        torch.set_num_threads(bench.threads)
    photos = default_data_root() / "photos"
    folder = photos if bench.images is None and photos.is_dir() else bench.images
    if folder is not None:
        list_images(folder)
    place = Workplace(pick_device(bench.device), getattr(torch, bench.precision), folder, bench.repeats)
    file = RowsFile(bench.name, _settings(bench, folder), bench.out, resume=bench.resume)
    if file.rows:
        console.print(f"rows kept from {file.path}: {len(file.rows)}", style="dim")
    jobs = [(model, size, batch) for model in networks for size in bench.all_sizes() for batch in bench.batches]
    for model, size, batch in terminal.track(jobs, "timing", console=console):
        shown = "own" if size is None else list(size)
        row = {"model": model, "size": shown, "batch": batch, "device": device_name(place.device)}
        row["precision"] = bench.precision
        missing = [mode for mode in modes if not file.holds({**row, "mode": mode})]
        for figures in bench.rows(networks[model], size, batch, place, missing) if missing else ():
            file.add({**row, **figures})
            console.print(_line({**row, **figures}), style="dim")
    console.print(bench.table([row for row in file.rows if "skipped" not in row]))
    file.draw()
    return file.content()


def _line(row: dict[str, Any]) -> str:
    """A row in short."""
    what = f"{row['model']} {row['size']}, batch {row['batch']}, {row['mode']}"
    if "skipped" in row:
        return f"{what}: {row['skipped']}"
    times = f"{row['dense_ms']:.0f} to {row['sparse_ms']:.0f} ms"
    return f"{what}: {times}, speed-up {row['speedup']:.2f}, predicted {row['predicted']:.2f}"


def _settings(bench: Bench, folder: Path | None) -> dict[str, Any]:
    """The settings that all rows of a file share; the others are in each row."""
    options = to_json(bench)
    for chosen in ("models", "sizes", "batches", "modes", "device", "precision", "threads", "out", "resume"):
        options.pop(chosen, None)
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "pictures": "scenes" if folder is None else folder.name,
        "options": options,
    }


def known(names: Sequence[str], models: dict[str, N]) -> dict[str, N]:
    """The models of these names.

    Raises:
        ConfigError: an unknown name; the nearest one is given.
    """
    for name in names:
        if name not in models:
            raise ConfigError(f"unknown model {name!r}{nearest(name, models)}")
    return {name: models[name] for name in names}


def normalised(images: Sequence[Tensor]) -> Tensor:
    """(b, 3, h, w) of images (3, h, w) in 0..1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return torch.stack([(image - mean) / std for image in images])


def load_images(folder: Path | None, size: Size | None, count: int) -> list[Tensor]:
    """`count` images (3, h, w) in 0..1 of a folder, in turn; of their own sizes, or fitted to one.

    Without a folder they are generated scenes.
    """
    if folder is None:
        scenes = [torch.from_numpy(draw(seed=1, index=i, size=size or SCENE)[0]) for i in range(min(count, 4))]
        images = [scene.permute(2, 0, 1).float() / 255 for scene in scenes]
    else:
        images = [to_tensor(read_image(path)).float() / 255 for path in list_images(folder)[:count]]
        images = images if size is None else [fitted(image, size) for image in images]
    return (images * math.ceil(count / len(images)))[:count]


def fitted(image: Tensor, size: Size) -> Tensor:
    """(3, h, w) in 0..1: resized to cover `size`, then cropped around the middle."""
    scale = max(size[0] / image.shape[1], size[1] / image.shape[2])
    shape = [max(side, round(own * scale)) for side, own in zip(size, image.shape[1:], strict=True)]
    resized = F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0]
    top, left = (resized.shape[1] - size[0]) // 2, (resized.shape[2] - size[1]) // 2
    return resized[:, top : top + size[0], left : left + size[1]].clamp(0, 1)


def table_of(title: str, rows: list[dict[str, Any]], extra: dict[str, list[str]] | None = None) -> Table:
    """Times and ratios of all rows; `extra` columns by name, one text per row: by default the shares of tokens kept.

    The memory is that of the blocks in which tokens are left out, dense and sparse, or else of the whole pass.
    """
    extra = {"keep": [_kept(row["keep"]) for row in rows]} if extra is None else extra
    table = Table(title=title, box=SIMPLE, collapse_padding=True, pad_edge=False)
    headers = ("model", "tokens", "mode", "dense\nms", "sparse\nms", *extra)
    headers += ("speed-\nup", "pre-\ndicted", "real-\nised", "MB", "syncs")
    for column in headers:
        table.add_column(column, justify="left" if column in ("model", "mode") else "right", no_wrap=True)
    for i, row in enumerate(rows):
        times = [f"{row[side]:.0f}" if row[side] >= 1000 else f"{row[side]:.1f}" for side in ("dense_ms", "sparse_ms")]
        held = " > ".join("?" if mb is None else f"{mb:.0f}" for mb in row.get("block_memory_mb", row["memory_mb"]))
        table.add_row(
            row["model"],
            f"{row['batch']} x {row['tokens']}",
            row["mode"],
            *times,
            *(column[i] for column in extra.values()),
            f"{row['speedup']:.2f}",
            f"{row['predicted']:.2f}",
            f"{row['realised']:.0%}",
            held,
            str(row["syncs"]),
        )
    return table


def _kept(shares: Iterable[float]) -> str:
    """The mean share of tokens in the blocks in which some were left out."""
    pruned = [share for share in shares if share < 1]
    return f"{statistics.fmean(pruned) if pruned else 1:.0%}"
