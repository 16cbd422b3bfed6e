"""The demonstration: dense against sparse on images of nuclei, for every task."""

import json
import statistics
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
from sievit.report.figures import answer_figure, answer_note
from sievit.tasks import Task, task_of
from sievit.text import read_json

EXAMPLES = Path("examples/nuclei")
"""The images of the demonstration, in the repository."""
PAIRS = {"detection": ("nuclei_vit", "nuclei_svit"), "segmentation": ("nuclei_segvit", "nuclei_segvit_dtop")}
"""The dense and the sparse model of each task."""


def demo(
    *,
    out: Path = Path("out/demo"),
    num_images: Count = 32,
    pictures: Natural = 8,
    data_root: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Dense against sparse on images of nuclei: those of the data set, or the few in examples/.

    Writes pictures to a folder for each task in the output folder, and prints tables.

    Args:
        out: folder for the pictures.
        num_images: at most so many, evenly spread over the validation set.
        pictures: how many images get a picture, per task.
        data_root: folder with nuclei/; default the environment's SIEVIT_DATA, else ../shared/data.
        device: cpu, cuda, cuda:1, or auto.

    Returns:
        By task the figures of the `dense` and the `sparse` model (see `engine.evaluate`), `speedup` (median of paired
        ratios) and its quartiles, and `images`.

    Raises:
        ConfigError: no images, or a model that is not there.
    """
    console, where = terminal.console(stderr=False), pick_device(device)
    root, listing = _nuclei(data_root), out / "nuclei.json"
    console.print(f"images: {root}", soft_wrap=True)
    _write_thinned(root / "annotations/instances_val.json", listing, num_images)
    truths = {"detection": Truth(annotations=listing), "segmentation": Truth(labels=root / "labels", names=listing)}
    figures: dict[str, Any] = {}
    for name, models in PAIRS.items():
        dense, sparse = (load(model, device=where) for model in models)
        data = task_of(dense.config).open(root / "images", truths[name])
        title = f"{name} of nuclei: {len(data)} images, one at a time, {device_name(where)}"
        figures[name] = demonstrate(dense, sparse, data, out / name, title=title, pictures=pictures)
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
    for column in ("", *names, "difference", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for (label, a), (_, b) in zip(task.accuracies(dense), task.accuracies(sparse), strict=True):
        limits = " to ".join(f"{100 * limit:+.1f}" for limit in intervals.get(label, ()))
        table.add_row(label, f"{100 * a:.1f}", f"{100 * b:.1f}", f"{100 * (b - a):+.1f}", limits)
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


def _nuclei(data_root: Path | None) -> Path:
    """The folder of nuclei: of the data sets, else of the examples."""
    folder = (default_data_root() if data_root is None else data_root) / "nuclei"
    examples = [] if data_root is not None else [REPOSITORY / EXAMPLES, EXAMPLES]
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
