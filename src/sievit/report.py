"""What a person gets to see of a model: detections of his own images, and the demonstration."""

import json
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sievit import viz
from sievit.config import ConfigError
from sievit.data.images import list_images, read_image, to_tensor
from sievit.files import write_atomically
from sievit.flops import detector_gflops
from sievit.metrics import coco_results
from sievit.model import Detector, Output, load


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {name!r} is not to be had here ({reason}); use cpu, cuda or auto") from error
    return device


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


@torch.inference_mode()
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
    model = load(model_path, policy=policy, device=pick_device(device))
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
            output, milliseconds = _timed(model, to_tensor(image))
            results += coco_results(output.detections[0], image_ids[name], model.config.category_ids)
            described.append({"id": image_ids[name], "file_name": name, "width": image.width, "height": image.height})
            figure = _overlay(image, name, model, output, milliseconds, score_threshold)
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


def _timed(model: Detector, image: Tensor) -> tuple[Output, float]:
    """What the model says of one image, and the milliseconds that it took."""
    start = time.perf_counter()
    output = model([image])
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return output, 1000 * (time.perf_counter() - start)


def _overlay(
    image: Image.Image, name: str, model: Detector, output: Output, milliseconds: float, min_score: float
) -> Image.Image:
    """The picture of one image's detections, and of the tokens that took part."""
    found = output.detections[0]
    count = int((found["scores"] >= min_score).sum())
    note = f"{count} objects · {detector_gflops(model, output).item():.1f} GFLOPs · {milliseconds:.0f} ms"
    view = viz.View("predictions", note, found)
    return viz.figure(
        image,
        [view],
        model.config.classes,
        output.trace,
        0,
        size=output.sizes[0],
        image_size=output.image_size,
        title=name,
        min_score=min_score,
    )
