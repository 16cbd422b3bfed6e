"""What all benches share: options, images, the walk over all combinations, and the table."""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.functional import center_crop, normalize, resize

from sievit import terminal
from sievit.bench.rows import RowsFile
from sievit.bench.timing import Timed, time_modes
from sievit.config import ConfigError, Count, nearest, to_json
from sievit.data.images import list_images, read_image, to_tensor
from sievit.data.scenes import draw
from sievit.devices import device_name, pick_device
from sievit.engine.recipe import default_data_root
from sievit.files import held
from sievit.measure.modes import RunMode
from sievit.models.inputs import InputConfig, Size
from sievit.policies import PolicyOptions

SCENE = (480, 640)
"""Height and width of the scenes that stand in where there are no images and no size is asked for."""


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
    title: ClassVar[str]
    """Of the table; the braces are the policy."""

    sizes: tuple[tuple[Count, Count], ...] = ((512, 512), (800, 1216))
    batches: tuple[Count, ...] = (1, 4)
    images: Path | None = None
    repeats: Annotated[int, Interval(ge=2, le=10**6)] = 9
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
    def timed(self, network: Any, size: Size | None, batch: int) -> Timed:
        """One of `networks` on images; `size` is one of `all_sizes`."""

    def table(self, rows: list[dict[str, Any]]) -> Table:
        """Rows for people."""
        return table_of(self.title.format(self.policy or "svit"), rows)

    def folder(self) -> Path | None:
        """Of the images; None: they are generated scenes."""
        photos = default_data_root() / "photos"
        return photos if self.images is None and photos.is_dir() else self.images

    def normalised(self, size: Size, batch: int) -> Tensor:
        """(repeats * batch, 3, h, w): a batch for each timed pair, normalised, cropped and resized to `size`."""
        images = load_images(self.folder(), size, self.repeats * batch)
        return normalised(images).to(pick_device(self.device), getattr(torch, self.precision))

    def unchanged(self, size: Size | None, batch: int) -> list[list[Tensor]]:
        """For each timed pair images (3, h, w) in 0..1, on the device: of their own sizes, or fitted to one."""
        device = pick_device(self.device)
        images = [image.to(device) for image in load_images(self.folder(), size, self.repeats * batch)]
        return [images[start : start + batch] for start in range(0, len(images), batch)]

    def all_modes(self) -> tuple[Sequence[str], int]:
        """The modes that are timed, and what static counts are rounded up to a multiple of."""
        return ("dynamic",), 1

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

    def all_modes(self) -> tuple[Sequence[str], int]:
        return self.modes, self.multiple


@torch.inference_mode()
def run(bench: Bench, console: Console | None = None) -> dict[str, Any]:
    """Every combination of model, size, batch and mode: print a table, and return a dict with `rows`.

    Raises:
        ConfigError: an unknown model, precision or mode, a model that cannot be loaded, a folder without images, or
            rows to be kept that were measured with other settings.
    """
    console = console or terminal.console(stderr=False)
    names, multiple = bench.all_modes()
    modes = [RunMode.of(mode).name for mode in names]
    networks = bench.networks()
    if bench.threads:
        torch.set_num_threads(bench.threads)
    folder, device = bench.folder(), device_name(pick_device(bench.device))
    if folder is not None:
        list_images(folder)
    with nullcontext() if bench.out is None else held(bench.out):
        file = RowsFile(bench.name, _settings(bench, folder), bench.out, resume=bench.resume)
        if file.rows:
            console.print(f"rows kept from {file.path}: {len(file.rows)}", style="dim")
        jobs = [(model, size, batch) for model in networks for size in bench.all_sizes() for batch in bench.batches]
        for model, size, batch in terminal.track(jobs, "timing", console=console):
            shown = "own" if size is None else list(size)
            row = {"model": model, "size": shown, "batch": batch, "device": device, "precision": bench.precision}
            missing = [mode for mode in modes if not file.holds({**row, "mode": mode})]
            if not missing:
                continue
            for figures in time_modes(bench.timed(networks[model], size, batch), missing, multiple=multiple):
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


def known(names: Sequence[str], models: Iterable[str]) -> dict[str, str]:
    """The names, each by itself.

    Raises:
        ConfigError: one that is not among `models`; the nearest one is given.
    """
    for name in names:
        if name not in models:
            raise ConfigError(f"unknown model {name!r}{nearest(name, models)}")
    return {name: name for name in names}


def normalised(images: Sequence[Tensor]) -> Tensor:
    """(b, 3, h, w) of images (3, h, w) in 0..1."""
    return normalize(torch.stack(list(images)), list(InputConfig().mean), list(InputConfig().std))


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
    return center_crop(resize(image, shape), list(size)).clamp(0, 1)


def table_of(title: str, rows: list[dict[str, Any]], extra: dict[str, list[str]] | None = None) -> Table:
    """Times and ratios of all rows; `extra` columns by name, one text per row: by default the shares of tokens kept.

    The memory is that of the blocks in which tokens are left out, dense and sparse, or else of the whole pass.
    """
    if extra is None:
        pruned = [[share for share in row["keep"] if share < 1] or [1.0] for row in rows]
        extra = {"keep": [f"{statistics.fmean(shares):.0%}" for shares in pruned]}
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
