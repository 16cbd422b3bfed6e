"""Reports on a model: its results for images of your own, its figures, and the demonstration."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sievit import terminal
from sievit.config import ConfigError, Count, Share, kind_of, to_json
from sievit.data.images import read_image, to_tensor
from sievit.data.truth import Truth
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import compare, timed
from sievit.engine.evaluate import evaluate as run_evaluation
from sievit.engine.signals import Interrupted, Stop, stopping
from sievit.files import digest, held, write_png
from sievit.models.base import Model
from sievit.models.build import load, model_file
from sievit.policies import PolicyOptions
from sievit.report.demonstration import comparison, demo
from sievit.report.figures import answer_figure, answer_note
from sievit.report.results import Journal, inputs, picture_file, seen
from sievit.tasks import task_of
from sievit.video import VideoOptions, is_video, predict_video

__all__ = ["demo", "evaluate", "predict"]


def predict(
    model: Path,
    images: Path,
    /,
    *,
    out: Path,
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    video: VideoOptions = VideoOptions(),  # noqa: B008
    score_threshold: Share | None = None,
    ids: Path | None = None,
    force: bool = False,
    device: str = "auto",
) -> int:
    """Find objects in, or label every pixel of, an image or a folder of images.

    A detector writes results.json (COCO results) and images.json (which image has which id), a segmenter label images
    in labels/ and classes.json (what their values mean); both write a picture of each image in pictures/. The files of
    `a.jpg` are called `a.jpg.png`. results.jsonl has a line for each image as soon as it is done: stopped, the same
    command goes on, and images that were done already are not computed again.

    Of a video file, a folder of frames with --video, or camera:0 the results are video.mp4, with the tokens beside what
    was found, and frames.jsonl, a line for each frame.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: an image, a folder of images, a video file, or camera:0.
        out: folder for the results.
        policy: another policy.
        video: of frames.
        score_threshold: pictures show objects of at least this score, by default 0.5; results.json holds all.
        ids: COCO annotation file whose image ids results.json shall use; by default 1, 2, ... by file name.
        force: write over what the folder holds.
        device: cpu, cuda, cuda:1, or auto.

    Returns:
        The exit status: 1 when an image could not be read (the others are done all the same), else 0.
    """
    if is_video(images) or video.video:
        if ids is not None:
            raise ConfigError("--ids: frames of a video are numbered from 0; leave it out")
        loaded = load(model, policy=policy, device=pick_device(device))
        return predict_video(loaded, images, out, video, score_threshold=score_threshold, force=force)
    if video != VideoOptions():
        raise ConfigError(f"{images}: options of a video go with a video file, camera:0, or a folder and --video")
    root, names, skipped = inputs(images)
    loaded = load(model, policy=policy, device=pick_device(device))
    task, console = task_of(loaded.config), terminal.console()
    if score_threshold is not None and not task.has_scores:
        raise ConfigError("--score-threshold: the results of this model have no scores; leave it out")
    score = 0.5 if score_threshold is None else score_threshold
    writer = task.writer(out, names, ids=ids)
    file = model_file(model)
    settings = {"model": digest(file), "policy": to_json(loaded.config.policy), "score_threshold": score}
    if skipped:
        console.print(f"{skipped} images below {images} are left out: earlier runs wrote them", soft_wrap=True)
    with held(out), stopping("the same command") as stop:
        journal = Journal(out, writer, force=force)
        read = [file, *([] if ids is None else [ids])]
        todo = journal.start(settings, root, names, read=read, force=force)
        if len(todo) < len(names):
            console.print(f"{len(names) - len(todo)} of {len(names)} images were done before", soft_wrap=True)
        try:
            failures = _predict(loaded, journal, root, terminal.track(todo, "predicting", console=console), score, stop)
        finally:
            if done := {name: journal.lines[name] for name in names if name in journal.lines}:
                console.print(writer.finish(done), soft_wrap=True)
    for failure in failures:
        console.print(f"error: {failure}", soft_wrap=True)
    if failures:
        console.print(f"{len(failures)} of {len(names)} images could not be used")
    return 1 if failures else 0


def _predict(
    model: Model, journal: Journal, root: Path, names: Iterable[str], min_score: float, stop: Stop
) -> list[str]:
    """Put the results for images into the journal; what is wrong with those that cannot be used."""
    task, failures = task_of(model.config), []
    for name in names:
        try:
            before, image = seen(root / name), read_image(root / name)
            answer, _ = timed(model, [to_tensor(image)])
            result = answer.results[0]
            kept = journal.writer.add(name, (image.height, image.width), result)
            shown = {"prediction": (answer_note(task, model, answer, min_score=min_score), result)}
            figure = answer_figure(task, image, shown, answer, title=name, min_score=min_score)
            write_png(journal.folder / picture_file(name), figure)
            journal.add(name, before, kept)
        except ConfigError as error:
            failures.append(str(error))
        except FileNotFoundError:
            failures.append(f"{root / name}: was removed meanwhile")
        if stop.received:
            raise Interrupted(f"stopped after {name}; {stop.advice}")
    return failures


def evaluate(
    model: Path,
    /,
    images: Path,
    *,
    truth: Truth = Truth(),  # noqa: B008
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    against: Path | None = None,
    batch_size: Count = 1,
    limit: Count | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate a model; the last line of the output is one JSON object with every figure.

    Images that cannot be used are left out and listed in `failures`; the exit status is 1 then. With --against both
    models run on each image in turns; the figures of the other one are in `against`, how much faster the model is in
    `speedup` (median over images, and quartiles), and `differences` has by figure [model minus other, low, high], the
    limits those of 95 % by a paired bootstrap over images. An image that cannot be used is an error then.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: folder that holds the images.
        truth: the annotations of the images.
        policy: another policy; of the model, not of the other one.
        against: another model, as MODEL is named, to compare with.
        batch_size: images that go through the network together.
        limit: only the first so many images.
        device: cpu, cuda, cuda:1, or auto.
    """
    loaded, console = load(model, policy=policy, device=pick_device(device)), terminal.console()
    data = task_of(loaded.config).open(images, truth)
    if against is None:
        options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "console": console}
        figures = run_evaluation(loaded, data, skip_failures=True, **options)
    elif batch_size > 1:
        raise ConfigError("--batch-size: the models are compared image by image; leave it out with --against")
    else:
        other = load(against, device=loaded.device)
        compared = compare(other, loaded, data, limit=limit, console=console)
        terminal.console(stderr=False).print(
            comparison(f"{model}, against {against}", task_of(loaded.config), compared, names=("other", "model"))
        )
        figures = {**compared.pop("sparse"), "against": compared.pop("dense"), **compared}
    return {**figures, "policy": kind_of(loaded.config.policy), "device": device_name(loaded.device)}
