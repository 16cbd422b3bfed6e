"""What a person gets to see of a model: detections of his own images, and the demonstration."""

import json
import statistics
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sievit import viz
from sievit.config import ConfigError, kind_of, nearest
from sievit.data.coco import CocoDetection
from sievit.data.images import list_images, read_image, to_tensor
from sievit.data.scenes import generate
from sievit.detector import Detector, Output
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import compare, timed
from sievit.engine.evaluate import evaluate as run_evaluation
from sievit.engine.recipe import default_data_root
from sievit.files import write_atomically
from sievit.flops import detector_gflops
from sievit.metrics import coco_results
from sievit.model import load

WEIGHTS = Path(__file__).parent / "weights"
DEMO_SIZE = (512, 512)
"""Height and width in pixels of the demonstration's scenes."""
MIN_SCORE = 0.5
"""Objects under it are left out of the demonstration's pictures."""


def shipped(name: str) -> Path:
    """The file of a model that comes with the package.

    Raises:
        ConfigError: this copy of the package has none of that name.
    """
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        there = [path.stem for path in WEIGHTS.glob("*.safetensors")]
        raise ConfigError(f"no model called {name!r} comes with this copy of sievit{nearest(name, there)}")
    return path


def find_model(name: Path) -> Path:
    """The path as it is, or the model of that name that comes with the package."""
    inside = WEIGHTS / f"{name}.safetensors"
    return inside if not name.exists() and inside.is_file() else name


def progress(console: Console) -> Progress:
    """The bar of every loop over images."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def save_picture(picture: Image.Image, path: Path) -> None:
    """As PNG, whole or not at all."""
    buffer = BytesIO()
    picture.save(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def predict(
    model_path: Path,
    images: Path,
    out: Path,
    *,
    policy: str | None = None,
    score_threshold: float = 0.5,
    ids: Path | None = None,
    device: str = "auto",
) -> int:
    """Detect objects in an image or a folder of images.

    Writes to `out`: results.json (COCO results), images.json (the images and categories that it speaks of, itself a
    COCO file), and a picture per image. Image ids are those of `ids`, a COCO file, or else 1, 2, ... by name.

    Returns:
        The exit status: 1 when an image could not be read (the others are done all the same), else 0.
    """
    model = load(find_model(model_path), policy=policy, device=pick_device(device))
    root = images if images.is_dir() else images.parent
    paths = (
        [p for p in list_images(images) if not p.resolve().is_relative_to(out.resolve())]
        if images.is_dir()
        else [images]
    )
    names = [path.relative_to(root).as_posix() for path in paths]
    image_ids = _ids(names, ids)
    pictures = _picture_names(names)
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
            figure = viz.figure(
                image,
                [_view("predictions", model, output, milliseconds, score_threshold)],
                model.config.classes,
                output.trace,
                0,
                size=output.sizes[0],
                image_size=output.image_size,
                title=name,
                min_score=score_threshold,
            )
            save_picture(figure, out / pictures[name])
    if described:
        categories = [
            {"id": i, "name": name} for i, name in zip(model.config.category_ids, model.config.classes, strict=True)
        ]
        listing = {"images": described, "categories": categories, "annotations": []}
        write_atomically(out / "images.json", json.dumps(listing).encode())
        write_atomically(out / "results.json", json.dumps(results).encode())
        console.print(f"{len(described)} images, {len(results)} detections: {out / 'results.json'}", soft_wrap=True)
    for failure in failures:
        console.print(f"error: {failure}", soft_wrap=True, markup=False, highlight=False)
    if failures:
        console.print(f"{len(failures)} of {len(paths)} images could not be read")
    return 1 if failures else 0


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


def _picture_names(names: Sequence[str]) -> dict[str, str]:
    """Where each image's picture goes: its name as PNG, or with .png behind it where two would be called the same."""
    plain = [str(Path(name).with_suffix(".png")) for name in names]
    return {name: short if plain.count(short) == 1 else f"{name}.png" for name, short in zip(names, plain, strict=True)}


def _view(title: str, model: Detector, output: Output, milliseconds: float, min_score: float) -> viz.View:
    """What a picture says of a model's answer for one image."""
    found = output.detections[0]
    count = int((found["scores"] >= min_score).sum())
    note = f"{count} objects · {detector_gflops(model, output).item():.1f} GFLOPs · {milliseconds:.0f} ms"
    return viz.View(title, note, found)


def evaluate(
    model_path: Path,
    images: Path,
    annotations: Path,
    *,
    policy: str | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    max_detections: int = 100,
    device: str = "auto",
) -> dict[str, Any]:
    """Every figure of a model on data in COCO format, see `engine.evaluate`; progress goes to standard error."""
    model = load(find_model(model_path), policy=policy, device=pick_device(device))
    dataset = CocoDetection(images, annotations, with_masks=False)
    if dataset.category_ids != model.config.category_ids:
        raise ConfigError(
            f"{annotations}: its category ids {_listed(dataset.category_ids)} are not those that the model was "
            f"trained for, {_listed(model.config.category_ids)}"
        )
    figures = run_evaluation(
        model,
        dataset,
        batch_size=batch_size,
        limit=limit,
        max_detections=max_detections,
        console=Console(stderr=True),
    )
    return {**figures, "policy": kind_of(model.config.policy), "device": device_name(model.device)}


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")


def demo(
    out: Path,
    *,
    num_images: int,
    pictures: int,
    seed: int,
    data_root: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """The shipped dense and sparse models on fresh scenes, and on nuclei where the data is there.

    Writes the scenes to `out`/data, pictures to `out`/scenes and `out`/nuclei, and prints a table per data set.

    Returns:
        `dense` and `sparse` (box_ap, mask_ap, gflops, ms_per_image), `keep` per block, `speedup` and `images` of the
        scenes, and the same of each data set in `datasets`.
    """
    console = Console()
    where = pick_device(device)
    drawn = out / "data" / f"scenes-{seed}-{num_images}"
    generate(drawn, num_images=num_images, size=DEMO_SIZE, seed=seed)
    datasets = {"scenes": CocoDetection(drawn / "images", drawn / "annotations.json", with_masks=False)}
    nuclei = (default_data_root() if data_root is None else data_root) / "nuclei"
    if nuclei.is_dir():
        listing = _thinned(nuclei / "annotations/instances_val.json", num_images)
        datasets["nuclei"] = CocoDetection(nuclei / "images", listing, with_masks=False)
    else:
        console.print(f"{nuclei} is not there: scenes only", style="dim")
    report = {}
    for name, dataset in datasets.items():
        dense, sparse = (load(shipped(f"{name}_{kind}"), device=where) for kind in ("vit", "svit"))
        figures = compare(dense, sparse, dataset, console=Console(stderr=True), title=name)
        console.print(_table(name, figures, device_name(where)))
        draw_pairs(dense, sparse, dataset, out / name, count=pictures)
        report[name] = _short(figures)
    console.print(f"pictures: {out}", soft_wrap=True)
    return {**report["scenes"], "datasets": report, "device": device_name(where)}


def _thinned(annotations: Path, count: int) -> dict[str, Any]:
    """The content of a COCO file with `count` of its images, evenly spread."""
    content = json.loads(annotations.read_text(encoding="utf-8"))
    images = content["images"]
    kept = [images[i * len(images) // count] for i in range(count)] if count < len(images) else images
    ids = {image["id"] for image in kept}
    return {**content, "images": kept, "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}


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
            views = []
            for title, model in (("dense", dense), ("sparse", sparse)):
                output, milliseconds = timed(model, [image])
                views.append(_view(title, model, output, milliseconds, MIN_SCORE))
            name = dataset.path(index).stem
            picture = viz.figure(
                image,
                views,
                sparse.config.classes,
                output.trace,
                0,
                size=output.sizes[0],
                image_size=output.image_size,
                title=f"{out.name} {name}",
                min_score=MIN_SCORE,
            )
            save_picture(picture, out / f"{name}.png")
