"""Reports on a model: its results for images of your own, its figures, and the demonstration."""

from pathlib import Path
from typing import Any

from rich.console import Console

from sievit.config import ConfigError, kind_of
from sievit.data.images import read_image, to_tensor
from sievit.data.truth import Truth
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import evaluate as run_evaluation
from sievit.engine.evaluate import timed
from sievit.files import png_names, write_png
from sievit.models.build import load
from sievit.policies import PolicyOptions
from sievit.report.demonstration import demo
from sievit.report.figures import answer_figure, answer_note, images_below, progress
from sievit.tasks import task_of

__all__ = ["demo", "evaluate", "predict"]


def predict(
    model: Path,
    images: Path,
    /,
    *,
    out: Path,
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    score_threshold: float = 0.5,
    ids: Path | None = None,
    device: str = "auto",
) -> int:
    """Find objects in, or label every pixel of, an image or a folder of images.

    A detector writes results.json (COCO results) and images.json (which image has which id), a segmenter label images
    in labels/ and classes.json (what their values mean); both write one picture per image.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: an image, or a folder of images.
        out: folder for the results.
        policy: another policy.
        score_threshold: pictures show objects of at least this score; results.json holds all.
        ids: COCO annotation file whose image ids results.json shall use; by default 1, 2, ... by file name.
        device: cpu, cuda, cuda:1, or auto.

    Returns:
        The exit status: 1 when an image could not be read (the others are done all the same), else 0.
    """
    loaded = load(model, policy=policy, device=pick_device(device))
    task, console = task_of(loaded.config), Console(stderr=True)
    paths, names = images_below(images, out)
    writer, pictures = task.writer(out, names, ids=ids), png_names(names)
    out.mkdir(parents=True, exist_ok=True)
    failures = []
    with progress(console) as bar:
        for path, name in zip(bar.track(paths, description="predicting"), names, strict=True):
            try:
                image = read_image(path)
            except ConfigError as error:
                failures.append(str(error))
                continue
            answer, milliseconds = timed(loaded, [to_tensor(image)])
            result = answer.results[0]
            writer.add(name, (image.height, image.width), result)
            note = answer_note(task, loaded, answer, milliseconds, min_score=score_threshold)
            figure = answer_figure(
                task, image, {"prediction": (note, result)}, answer, title=name, min_score=score_threshold
            )
            write_png(out / pictures[name], figure)
    if len(failures) < len(paths):
        console.print(writer.finish(), soft_wrap=True)
    for failure in failures:
        console.print(f"error: {failure}", soft_wrap=True, markup=False, highlight=False)
    if failures:
        console.print(f"{len(failures)} of {len(paths)} images could not be used")
    return 1 if failures else 0


def evaluate(
    model: Path,
    /,
    images: Path,
    *,
    truth: Truth = Truth(),  # noqa: B008
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    batch_size: int = 1,
    limit: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate a model; the last line of the output is one JSON object with every figure.

    Images that cannot be used are left out and listed in `failures`; the exit status is 1 then.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: folder that holds the images.
        truth: the annotations of the images.
        policy: another policy.
        batch_size: images that go through the network together.
        limit: only the first so many images.
        device: cpu, cuda, cuda:1, or auto.
    """
    loaded = load(model, policy=policy, device=pick_device(device))
    figures = run_evaluation(
        loaded,
        task_of(loaded.config).open(images, truth),
        batch_size=batch_size,
        limit=limit,
        skip_failures=True,
        console=Console(stderr=True),
    )
    return {**figures, "policy": kind_of(loaded.config.policy), "device": device_name(loaded.device)}
