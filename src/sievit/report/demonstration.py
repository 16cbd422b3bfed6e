"""The demonstration: every token against those that a model picks, on photographs and on images of nuclei."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sievit import terminal
from sievit.config import ConfigError, Count, Natural
from sievit.data.dataset import ImageDataset
from sievit.data.truth import Truth
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import compare, timed
from sievit.engine.recipe import default_data_root
from sievit.files import write_atomically, write_png
from sievit.hub.fetch import REPOSITORY
from sievit.models.base import Model
from sievit.models.build import load
from sievit.policies import KeepAllConfig
from sievit.report.figures import answer_figure, answer_note
from sievit.tasks import Task, task_of
from sievit.text import read_json

EXAMPLES = Path("examples")
"""The images of the demonstration, in the repository, laid out like the data sets."""


@dataclass(frozen=True)
class Shown:
    """A data set of the demonstration; paths are below its folder.

    Attributes:
        images, labels, annotations: of its validation set; the annotations list the images of the labels too.
        models: the shipped sparse model of each task.
        num_images: at most so many unless another number is given.
    """

    folder: str
    images: str
    labels: str
    annotations: str
    models: Mapping[str, str]
    num_images: int


SETS = {
    "photographs": Shown(
        folder="facade",
        images="images/val",
        labels="labels/val",
        annotations="annotations/instances_val.json",
        models={"detection": "facade_svit", "segmentation": "facade_setr_dtop"},
        num_images=28,
    ),
    "nuclei": Shown(
        folder="nuclei",
        images="images",
        labels="labels",
        annotations="annotations/instances_val.json",
        models={"detection": "nuclei_svit"},
        num_images=8,
    ),
}


def demo(
    *,
    out: Path = Path("out/demo"),
    num_images: Count | None = None,
    pictures: Natural = 4,
    data_root: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """The shipped models with every token and with those that they pick, on photographs of facades and on nuclei.

    The images are those of the data sets, or the few in examples/. Writes pictures to a folder for each data set and
    task in the output folder, and prints tables. "Dense" is the same model when no token is left out.

    Args:
        out: folder for the pictures.
        num_images: at most so many of each data set, evenly spread over its validation set; by default 24 photographs
            and 8 images of nuclei.
        pictures: how many images get a picture, per task.
        data_root: folder with facade/ and nuclei/; default the environment's SIEVIT_DATA, else ../shared/data.
        device: cpu, cuda, cuda:1, or auto.

    Returns:
        By data set and task the figures of the `dense` and the `sparse` model (see `engine.evaluate`), `speedup`
        (median of paired ratios) and its quartiles, `differences` with their intervals, and `images`.

    Raises:
        ConfigError: no images, or a model that is not there.
    """
    console, where = terminal.console(stderr=False), pick_device(device)
    figures: dict[str, Any] = {}
    for title, shown in SETS.items():
        root, listing = _folder(shown.folder, data_root), out / f"{title}.json"
        console.print(f"{title}: {root}", soft_wrap=True)
        _write_thinned(root / shown.annotations, listing, num_images or shown.num_images)
        truths = {
            "detection": Truth(annotations=listing),
            "segmentation": Truth(labels=root / shown.labels, names=listing),
        }
        for task, name in shown.models.items():
            sparse = load(name, device=where)
            dense = sparse.with_config(policy=KeepAllConfig())
            data = task_of(dense.config).open(root / shown.images, truths[task])
            line = f"{task}, {title}: {name}, {len(data)} images, one at a time, {device_name(where)}"
            part = demonstrate(dense, sparse, data, out / title / task, title=line, pictures=pictures)
            figures.setdefault(title, {})[task] = part
    console.print(f"pictures: {out}", soft_wrap=True)
    return {**figures, "device": device_name(where)}


def demonstrate(
    dense: Model, sparse: Model, data: ImageDataset, out: Path, *, title: str, pictures: int
) -> dict[str, Any]:
    """Compare, print a table, draw; returns the figures of `engine.compare`, and the number of images."""
    figures, task = compare(dense, sparse, data, console=terminal.console(), title=out.name), task_of(sparse.config)
    terminal.console(stderr=False).print(comparison(title, task, figures))
    _draw_pairs(task, {"dense": dense, "sparse": sparse}, data, out, count=pictures)
    return {**figures, "images": figures["sparse"]["images"]}


def comparison(
    title: str, task: Task, figures: dict[str, Any], *, names: tuple[str, str] = ("dense", "sparse")
) -> Table:
    """What `engine.evaluate.compare` returns, for people; differences with their intervals of 95 %."""
    dense, sparse = figures["dense"], figures["sparse"]
    intervals = {task.config.figures[name]: limits for name, (_, *limits) in figures["differences"].items()}
    table = Table(title=title, title_justify="left")
    for column in ("", *names, "difference (95 %)"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for (label, a), (_, b) in zip(task.accuracies(dense), task.accuracies(sparse), strict=True):
        limits = " to ".join(f"{100 * limit:+.1f}" for limit in intervals.get(label, ()))
        table.add_row(
            label, f"{100 * a:.1f}", f"{100 * b:.1f}", f"{100 * (b - a):+.1f}" + f" ({limits})" * bool(limits)
        )
    for label, key in (("GFLOPs", "gflops"), ("ms per image", "ms_per_image")):
        a, b = dense[key], sparse[key]
        table.add_row(label, f"{a:.1f}", f"{b:.1f}", f"{b / a - 1:+.0%}")
    low, high = figures["speedup_quartiles"]
    table.add_row("speed-up", "", f"{figures['speedup']:.2f}x", f"{low:.2f} to {high:.2f}")
    table.add_row("tokens computed", "100%", f"{statistics.fmean(sparse['keep']):.0%}", "")
    for first in range(0, len(sparse["keep"]), 4):
        shares = sparse["keep"][first : first + 4]
        table.add_row(f"  blocks {first}-{first + len(shares) - 1}", "", " ".join(f"{s:4.0%}" for s in shares), "")
    return table


def _draw_pairs(task: Task, models: dict[str, Model], data: ImageDataset, out: Path, *, count: int) -> None:
    """A picture of each of the first `count` images: the truth, the results of both, and the sparse one's tokens."""
    indices = range(min(count, len(data)))
    for index in terminal.track(indices, f"drawing {out.name}", console=terminal.console()):
        image, target = data[index]
        truth = task.as_result(target)
        results = {} if truth is None else {"truth": (f"{image.shape[2]} x {image.shape[1]} pixels", truth)}
        for title, model in models.items():
            answer, _ = timed(model, [image])
            results[title] = answer_note(task, model, answer), answer.results[0]
        name = data.path(index).stem
        write_png(out / f"{name}.png", answer_figure(task, image, results, answer, title=f"{out.name} {name}"))


def _folder(name: str, data_root: Path | None) -> Path:
    """The folder of a data set, else of its examples."""
    folder = (default_data_root() if data_root is None else data_root) / name
    examples = [] if data_root is not None else [REPOSITORY / EXAMPLES / name, EXAMPLES / name]
    for root in (folder, *examples):
        if root.is_dir():
            return root
    raise ConfigError(f"{folder}: no such folder; give --data-root, or run in the repository, which has examples")


def _write_thinned(annotations: Path, path: Path, count: int) -> None:
    """Copy a COCO file with `count` of its images, evenly spread."""
    content = read_json(annotations)
    images = content["images"]
    kept = [images[i * len(images) // count] for i in range(count)] if count < len(images) else images
    ids = {image["id"] for image in kept}
    content |= {"images": kept, "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content).encode())
