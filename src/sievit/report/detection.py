"""Reports of detectors: what they find in a person's own images, and dense against sparse."""

import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from sievit import viz
from sievit.config import ConfigError
from sievit.data.coco import CocoDetection
from sievit.data.images import read_image, to_tensor
from sievit.engine.evaluate import compare, timed
from sievit.files import write_atomically
from sievit.models.detector import Detector, Output
from sievit.report.common import images_below, picture_names, progress, save_picture, tell_failures
from sievit.tasks.metrics import coco_results

MIN_SCORE = 0.5
"""Objects under it are left out of the demonstration's pictures."""


def predict(
    model: Detector,
    images: Path,
    out: Path,
    *,
    score_threshold: float = 0.5,
    ids: Path | None = None,
) -> int:
    """Detect objects in an image or a folder of images.

    Writes to `out`: results.json (COCO results), images.json (the images and categories that it speaks of, itself a
    COCO file), and a picture per image. Image ids are those of `ids`, a COCO file, or else 1, 2, ... by name.

    Returns:
        The exit status: 1 when an image could not be read (the others are done all the same), else 0.
    """
    paths, names = images_below(images, out)
    image_ids = _ids(names, ids)
    pictures = picture_names(names)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    results, described, failures = [], [], []
    with progress(console) as bar:
        for path, name in zip(bar.track(paths, description="predicting"), names, strict=True):
            try:
                image = read_image(path)
            except ConfigError as error:
                failures.append(str(error))
                continue
            output, milliseconds = timed(model, [to_tensor(image)])
            results += coco_results(output.detections[0], image_ids[name], model.config.category_ids)
            described.append({"id": image_ids[name], "file_name": name, "width": image.width, "height": image.height})
            panels = [_panel("predictions", model, image, output, milliseconds, score_threshold)]
            save_picture(_figure(image, panels, output, name), out / pictures[name])
    if described:
        categories = [
            {"id": i, "name": name} for i, name in zip(model.config.category_ids, model.config.classes, strict=True)
        ]
        listing = {"images": described, "categories": categories, "annotations": []}
        write_atomically(out / "images.json", json.dumps(listing).encode())
        write_atomically(out / "results.json", json.dumps(results).encode())
        console.print(f"{len(described)} images, {len(results)} detections: {out / 'results.json'}", soft_wrap=True)
    return tell_failures(failures, len(paths), console)


def _ids(names: Sequence[str], annotations: Path | None) -> dict[str, int]:
    """The image id of every file name."""
    if annotations is None:
        return {name: i for i, name in enumerate(names, start=1)}
    try:
        listed = json.loads(annotations.read_text(encoding="utf-8"))["images"]
        known = {image["file_name"]: int(image["id"]) for image in listed}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{annotations}: not a COCO file with a list of images ({error!r})") from error
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(
            f"{annotations}: has no id for {missing[0]} (nor for {len(missing) - 1} more); leave out --ids"
        )
    return known


def _panel(
    title: str, model: Detector, image: viz.Picture, output: Output, milliseconds: float, min_score: float
) -> viz.Panel:
    """A model's answer for one image."""
    found = output.detections[0]
    count = int((found["scores"] >= min_score).sum())
    note = f"{count} objects · {model.gflops(output).item():.1f} GFLOPs · {milliseconds:.0f} ms"
    draw = partial(viz.predictions, image, found, model.config.classes, min_score=min_score)
    return viz.Panel(title, note, draw)


def _figure(image: viz.Picture, panels: list[viz.Panel], output: Output, title: str) -> Image.Image:
    """The panels, how many blocks computed each token, and the tokens of every block."""
    sizes: dict[str, Any] = {"size": output.sizes[0], "image_size": output.image_size}
    heat = viz.heat_panel(image, output.trace, 0, **sizes)
    maps = partial(viz.keep_maps, image, output.trace, 0, **sizes)
    return viz.figure(image, [*panels, heat], below=[lambda width: maps(width=width)], title=title)


def demonstrate(
    dense: Detector, sparse: Detector, dataset: CocoDetection, out: Path, *, pictures: int, device: str
) -> dict[str, Any]:
    """Compare, print a table, draw; returns what the demonstration's JSON says of the data set."""
    figures = compare(dense, sparse, dataset, console=Console(stderr=True), title=out.name)
    Console().print(_table(out.name, figures, device))
    draw_pairs(dense, sparse, dataset, out, count=pictures)
    return _short(figures)


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    """What the demonstration's JSON says of a data set."""
    models = {
        model: {name: figures[model][name] for name in ("box_ap", "mask_ap", "gflops", "ms_per_image")}
        for model in ("dense", "sparse")
    }
    sparse = figures["sparse"]
    return {**models, "keep": sparse["keep"], "speedup": figures["speedup"], "images": sparse["images"]}


def _table(name: str, figures: dict[str, Any], device: str) -> Table:
    """Dense against sparse, for people."""
    dense, sparse = figures["dense"], figures["sparse"]
    table = Table(title=f"{name}: {sparse['images']} images, one at a time, {device}", title_justify="left")
    for column in ("", "dense", "sparse", "difference"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for label, key in (
        ("box AP", "box_ap"),
        ("mask AP", "mask_ap"),
        ("box AP 50", "box_ap50"),
        ("mask AP 50", "mask_ap50"),
    ):
        a, b = 100 * dense[key], 100 * sparse[key]
        table.add_row(label, f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}")
    for label, key in (("GFLOPs", "gflops"), ("ms per image", "ms_per_image")):
        a, b = dense[key], sparse[key]
        table.add_row(label, f"{a:.2f}", f"{b:.2f}", f"{b / a - 1:+.0%}")
    low, high = figures["speedup_quartiles"]
    table.add_row("speed-up", "", f"{figures['speedup']:.2f}x", f"{low:.2f} to {high:.2f}")
    table.add_row("tokens computed", "100%", f"{statistics.fmean(sparse['keep']):.0%}", "")
    for first in range(0, len(sparse["keep"]), 6):
        shares = sparse["keep"][first : first + 6]
        table.add_row(f"  blocks {first}-{first + len(shares) - 1}", "", " ".join(f"{s:4.0%}" for s in shares), "")
    return table


def draw_pairs(dense: Detector, sparse: Detector, dataset: CocoDetection, out: Path, *, count: int) -> None:
    """A picture of each of the first `count` images: what both models found, and the sparse one's tokens."""
    with progress(Console(stderr=True)) as bar:
        for index in bar.track(range(min(count, len(dataset))), description=f"drawing {out.name}"):
            image, _ = dataset[index]
            panels = []
            for title, model in (("dense", dense), ("sparse", sparse)):
                output, milliseconds = timed(model, [image])
                panels.append(_panel(title, model, image, output, milliseconds, MIN_SCORE))
            name = dataset.path(index).stem
            save_picture(_figure(image, panels, output, f"{out.name} {name}"), out / f"{name}.png")
