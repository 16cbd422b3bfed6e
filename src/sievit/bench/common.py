"""What all benches share: options, pictures, the walk over all combinations, and the table."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sievit.bench.modes import USUAL, Way
from sievit.bench.rows import RowsFile
from sievit.config import ConfigError, nearest, to_json
from sievit.data.images import list_images, read_image, to_tensor
from sievit.data.scenes import draw
from sievit.devices import device_name, pick_device
from sievit.engine.recipe import default_data_root
from sievit.models.inputs import Size
from sievit.vit import ViTConfig

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
        precision: "float32", or "bfloat16": random models have weights of it, trained ones run under autocast, as in
            `sievit eval`.
        out: folder for the rows as JSON and their picture, both named after the bench; by default neither is written.
            The JSON is written anew after each row.
        resume: keep the rows that are in the JSON already, and measure only what is missing; without it the file is
            started anew.
    """

    sizes: tuple[tuple[int, int], ...] = ((512, 512), (800, 1216))
    batches: tuple[int, ...] = (1, 4)
    images: Path | None = None
    repeats: int = 9
    threads: int | None = None
    device: str = "auto"
    precision: str = "float32"
    out: Path | None = None
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class ModesBench(Bench):
    """A bench that times several modes.

    Attributes:
        modes: each in turns with the dense model as it stands: dense, dynamic, bucketed and static, the first and the
            last two also with _compiled (torch.compile) and _graphs (with CUDA graphs) behind them; docs/speed.md says
            what they are. dense shows how much the clock wanders.
        multiple: static counts are rounded up to a multiple of it.
        autotune: graphs are compiled with `max-autotune` instead of `reduce-overhead`, which takes much longer.
    """

    modes: tuple[str, ...] = USUAL
    multiple: int = 8
    autotune: bool = False


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
        """`count` batches of images (3, h, w) in 0..1, in the device's memory: of their own sizes, or fitted to one."""
        images = [image.to(self.device) for image in load_images(self.folder, size, self.count * batch)]
        return [images[start : start + batch] for start in range(0, len(images), batch)]


def _line(row: dict[str, Any]) -> str:
    """A row in short."""
    what = f"{row['model']} {row['size']}, batch {row['batch']}, {row['mode']}"
    if "skipped" in row:
        return f"{what}: {row['skipped']}"
    times = f"{row['dense_ms']:.0f} to {row['sparse_ms']:.0f} ms"
    return f"{what}: {times}, speed-up {row['speedup']:.2f}, predicted {row['predicted']:.2f}"


RowsOf = Callable[[str, Size | None, int, Place, tuple[str, ...]], Iterable[dict[str, Any]]]
"""(model, size, batch, place, modes) to the figures of a row for each of these modes."""


def run(
    name: str,
    config: Bench,
    models: Iterable[str],
    sizes: Sequence[Size | None],
    modes: Sequence[str],
    rows_of: RowsOf,
    table: Callable[[list[dict[str, Any]]], Table],
    console: Console | None,
) -> dict[str, Any]:
    """Every combination of model, size, batch and mode: a table for people, and a dict.

    Args:
        sizes: None among them: images of their own sizes.
        rows_of: is not asked for modes whose rows are there already.

    Raises:
        ConfigError: fewer than two repeats, an unknown precision or mode, a folder without pictures, or rows to be kept
            that were measured with other settings.
    """
    console = console or Console()
    if config.repeats < 2:
        raise ConfigError(f"repeats is at least 2, not {config.repeats}")
    if config.precision not in ("float32", "bfloat16"):
        raise ConfigError(f"unknown precision {config.precision!r}{nearest(config.precision, ('float32', 'bfloat16'))}")
    for mode in modes:
        Way.of(mode)
    if config.threads:
        torch.set_num_threads(config.threads)
    photos = default_data_root() / "photos"
    folder = photos if config.images is None and photos.is_dir() else config.images
    if folder is not None:
        list_images(folder)
    place = Place(pick_device(config.device), getattr(torch, config.precision), folder, config.repeats)
    file = RowsFile(name, _settings(config, folder), config.out, resume=config.resume)
    if file.rows:
        console.print(f"rows kept from {file.path}: {len(file.rows)}", style="dim", highlight=False)
    jobs = [(model, size, batch) for model in models for size in sizes for batch in config.batches]
    for model, size, batch in track(jobs, "timing", console=console, transient=True):
        shown = "own" if size is None else list(size)
        row = {"model": model, "size": shown, "batch": batch, "device": device_name(place.device)}
        row["precision"] = config.precision
        missing = tuple(mode for mode in modes if not file.holds({**row, "mode": mode}))
        for figures in rows_of(model, size, batch, place, missing) if missing else ():
            file.add({**row, **figures})
            console.print(_line({**row, **figures}), style="dim", highlight=False)
    console.print(table([row for row in file.rows if "skipped" not in row]))
    file.draw()
    return file.content()


def _settings(config: Bench, folder: Path | None) -> dict[str, Any]:
    """What all rows of a file were measured with, beside what each of them says itself."""
    options = to_json(config)
    for chosen in ("models", "sizes", "batches", "modes", "device", "precision", "threads", "out", "resume"):
        options.pop(chosen, None)
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "pictures": "scenes" if folder is None else folder.name,
        "options": options,
    }


def check_known(models: Sequence[str], known: Iterable[str]) -> None:
    """Raise unless all are known.

    Raises:
        ConfigError: an unknown model; the nearest name is given.
    """
    for model in models:
        if model not in known:
            raise ConfigError(f"unknown model {model!r}{nearest(model, known)}")


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
    """Times and ratios of all rows; `extra` columns by name, one text per row.

    The memory is that of the blocks in which tokens are left out, dense and sparse, or else of the whole pass.
    """
    table = Table(title=title, box=SIMPLE, collapse_padding=True, pad_edge=False)
    left = ("model", "mode")
    headers = ("model", "tokens", "mode", "dense\nms", "sparse\nms", *extra)
    headers += ("speed-\nup", "pre-\ndicted", "real-\nised", "MB", "syncs")
    for column in headers:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    for i, row in enumerate(rows):
        tokens = f"{row['batch']} x {row['tokens']}"
        figures = [
            f"{row[name]:.0f}" if row[name] >= 1000 else f"{row[name]:.1f}" for name in ("dense_ms", "sparse_ms")
        ]
        figures += [*(column[i] for column in extra.values()), f"{row['speedup']:.2f}", f"{row['predicted']:.2f}"]
        held = " > ".join("?" if mb is None else f"{mb:.0f}" for mb in row.get("block_memory_mb", row["memory_mb"]))
        figures += [f"{row['realised']:.0%}", held, str(row["syncs"])]
        table.add_row(row["model"], tokens, row["mode"], *figures)
    return table


def kept(rows: list[dict[str, Any]]) -> list[str]:
    """In a cell of a table: the mean share of tokens in the blocks in which some were left out."""
    texts = []
    for row in rows:
        pruned = [share for share in row["keep"] if share < 1]
        texts.append(f"{statistics.fmean(pruned) if pruned else 1:.0%}")
    return texts


def percent(shares: Iterable[float]) -> str:
    """Shares in a cell of a table."""
    return " ".join(f"{share:.0%}" for share in shares)
