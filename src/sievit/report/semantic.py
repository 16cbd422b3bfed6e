"""Reports of segmenters: label images of a person's own images, and dense against early exits."""

import json
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sievit import viz
from sievit.config import ConfigError
from sievit.data.images import read_image, to_tensor
from sievit.data.labels import LabelDataset
from sievit.engine.evaluate import compare, timed
from sievit.files import write_atomically
from sievit.models.segmenter import Segmentation, Segmenter
from sievit.report.common import images_below, picture_names, progress, save_picture, tell_failures


def predict(model: Segmenter, images: Path, out: Path) -> int:
    """Label every pixel of an image or of a folder of images.

    Writes to `out`: labels/ (PNGs of the image's size whose values are classes, with a palette), a picture per image,
    and classes.json (name and colour of each value).

    Returns:
        The exit status: 1 when an image could not be read (the others are done all the same), else 0.
    """
    paths, names = images_below(images, out)
    pictures = picture_names(names)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    palette = colours(model)
    failures, done = [], 0
    with progress(console) as bar:
        for path, name in zip(bar.track(paths, description="predicting"), names, strict=True):
            try:
                image = read_image(path)
            except ConfigError as error:
                failures.append(str(error))
                continue
            answer, milliseconds = timed(model, [to_tensor(image)])
            save_labels(answer.labels[0], palette, out / "labels" / pictures[name])
            labels = {"prediction": (_note(model, answer, milliseconds), answer.labels[0])}
            save_picture(_figure(image, labels, model, answer, name), out / pictures[name])
            done += 1
    if done:
        classes = [
            {"value": i, "name": name, "colour": list(colour)}
            for i, (name, colour) in enumerate(zip(model.config.classes, palette, strict=True))
        ]
        write_atomically(out / "classes.json", (json.dumps(classes, indent=2) + "\n").encode())
        console.print(f"{done} label images: {out / 'labels'}", soft_wrap=True)
    return tell_failures(failures, len(paths), console)


def colours(model: Segmenter) -> tuple[viz.Colour, ...]:
    """The colour of each class."""
    return model.config.palette or viz.palette(len(model.config.classes))


def save_labels(labels: Tensor, palette: Sequence[viz.Colour], path: Path) -> None:
    """Labels (h, w) as PNG: 8 bits with a palette, or 16 bits grey where there are more than 256 classes."""
    values = labels.cpu().numpy()
    if len(palette) <= 256:
        picture = Image.fromarray(values.astype(np.uint8))
        picture.putpalette([part for colour in palette for part in colour])
    else:
        picture = Image.fromarray(values.astype(np.uint16))
    buffer = BytesIO()
    picture.save(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def demonstrate(
    dense: Segmenter, sparse: Segmenter, dataset: LabelDataset, out: Path, *, pictures: int, device: str
) -> dict[str, Any]:
    """Compare, print a table, draw; returns what the demonstration's JSON says of the data set."""
    figures = compare(dense, sparse, dataset, console=Console(stderr=True), title=f"{out.name}, labels")
    Console().print(_table(out.name, sparse, figures, device))
    _draw_pairs(dense, sparse, dataset, out, count=pictures)
    names = ("miou", "gflops", "ms_per_image")
    return {
        "dense": {name: figures["dense"][name] for name in names},
        "dtop": {name: figures["sparse"][name] for name in (*names, "left_at")},
        "left_at": figures["sparse"]["left_at"],
        "speedup": figures["speedup"],
        "images": figures["sparse"]["images"],
    }


def _table(name: str, sparse: Segmenter, figures: dict[str, Any], device: str) -> Table:
    """Dense against DToP, for people."""
    dense, dtop = figures["dense"], figures["sparse"]
    title = f"{name}, a class for every pixel: {dtop['images']} images, one at a time, {device}"
    table = Table(title=title, title_justify="left")
    for column in ("", "dense", "DToP", "difference"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    shares = [("mIoU", "miou"), ("pixel accuracy", "pixel_accuracy")]
    rows = [(label, dense[key], dtop[key]) for label, key in shares]
    if len(sparse.config.classes) <= 8:
        of_class = zip(sparse.config.classes, dense["iou"], dtop["iou"], strict=True)
        rows += [(f"  IoU {name}", a, b) for name, a, b in of_class]
    for label, a, b in rows:
        table.add_row(label, f"{100 * a:.1f}", f"{100 * b:.1f}", f"{100 * (b - a):+.1f}")
    for label, key in (("GFLOPs", "gflops"), ("ms per image", "ms_per_image")):
        a, b = dense[key], dtop[key]
        table.add_row(label, f"{a:.2f}", f"{b:.2f}", f"{b / a - 1:+.0%}")
    low, high = figures["speedup_quartiles"]
    table.add_row("speed-up", "", f"{figures['speedup']:.2f}x", f"{low:.2f} to {high:.2f}")
    for block, share in zip(sparse.config.out_indices[:-1], dtop["left_at"], strict=False):
        table.add_row(f"left after block {block}", "", f"{share:.0%}", "")
    return table


def _draw_pairs(dense: Segmenter, sparse: Segmenter, dataset: LabelDataset, out: Path, *, count: int) -> None:
    """A picture of each of the first `count` images: the truth, what both models say, and where tokens left."""
    with progress(Console(stderr=True)) as bar:
        for index in bar.track(range(min(count, len(dataset))), description=f"drawing {out.name}"):
            image, target = dataset[index]
            labels = {"truth": (f"{image.shape[2]} x {image.shape[1]} pixels", target["labels"])}
            for title, model in (("dense", dense), ("DToP", sparse)):
                answer, milliseconds = timed(model, [image])
                labels[title] = _note(model, answer, milliseconds), answer.labels[0]
            name = Path(dataset.names[index]).name
            save_picture(_figure(image, labels, sparse, answer, f"{out.name} {name}"), out / f"{name}.png")


def _note(model: Segmenter, answer: Segmentation, milliseconds: float) -> str:
    return f"{model.gflops(answer).item():.1f} GFLOPs · {milliseconds:.0f} ms"


def _figure(
    image: viz.Picture, labels: dict[str, tuple[str, Tensor]], model: Segmenter, answer: Segmentation, title: str
) -> Image.Image:
    """Labels by title, each with a note, where tokens left, and what the colours mean."""
    palette, classes = colours(model), model.config.classes
    panels = [viz.Panel(t, note, partial(viz.label_map, image, map_, palette)) for t, (note, map_) in labels.items()]
    pixels = torch.stack([_pixels(map_, len(classes)) for _, map_ in labels.values()]).sum(0)
    legends = [[(classes[i], palette[i]) for i in pixels.argsort(descending=True)[:20].tolist() if pixels[i]]]
    exits = _exits(model, answer)
    if exits is not None:
        panels.append(viz.exits_panel(image, exits))
        legends.append(viz.exits_legend(exits))
    below = [partial(viz.legend, legend) for legend in legends]
    return viz.figure(image, panels, below=below, title=title, columns=3)


def _pixels(labels: Tensor, classes: int) -> Tensor:
    """How many pixels each class has."""
    values = labels.cpu().flatten()
    return torch.bincount(values[(values >= 0) & (values < classes)], minlength=classes)


def _exits(model: Segmenter, answer: Segmentation) -> viz.Exits | None:
    """Where the tokens of the one image left; None where they cannot."""
    if not answer.trace.exited:
        return None
    left = answer.exit_stages(0)
    places = [f"after block {block}" for block in model.config.out_indices[:-1]]
    return viz.Exits(left.clamp(max=len(places)), (*places, "never"))
