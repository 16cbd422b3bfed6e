"""Reports on a model: its results for images of your own, its figures, and the demonstration."""

from pathlib import Path
from typing import Any

from sievit import terminal
from sievit.config import ConfigError, Count, Share, kind_of, to_json
from sievit.data.truth import Truth
from sievit.devices import device_name, pick_device
from sievit.distributed import by_first, joined, rank
from sievit.engine.evaluate import compare
from sievit.engine.evaluate import evaluate as run_evaluation
from sievit.files import digest
from sievit.models.build import load, model_file
from sievit.policies import PolicyOptions
from sievit.report.demonstration import comparison, demo
from sievit.report.job import run_job
from sievit.report.results import Journal
from sievit.report.sources import find_images
from sievit.tasks import task_of
from sievit.video import VideoOptions, is_video, predict_video

__all__ = ["demo", "evaluate", "predict"]


def predict(
    model: Path,
    source: Path,
    /,
    *,
    out: Path,
    images: Path | None = None,
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    video: VideoOptions = VideoOptions(),  # noqa: B008
    score_threshold: Share | None = None,
    batch_size: Count = 1,
    pictures: bool = True,
    ids: Path | None = None,
    force: bool = False,
    device: str = "auto",
) -> int:
    """Find objects in, or label every pixel of, images.

    A detector writes results.json (COCO results) and images.json (which image has which id), a segmenter label images
    in labels/ and classes.json (what their values mean); both write a picture of each image in pictures/. The files of
    `a.jpg` are called `a.jpg.png`. results.jsonl has a line for each image as soon as it is done: stopped, the same
    command goes on, and images that were done already are not computed again. failures.jsonl lists the images that
    could not be used. The processes of torchrun share the images.

    Of a video file, a folder of frames with --video, or camera:0 the results are video.mp4, with the tokens beside what
    was found, and frames.jsonl, a line for each frame.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        source: an image, a folder of images, a COCO file (.json), a list of paths (.txt), a quoted pattern such as
            "photos/**/*.jpg", a video file, or camera:0.
        out: folder for the results.
        images: the folder that the paths in a COCO file or a list begin at; of a list by default the working directory.
        policy: another policy.
        video: of frames.
        score_threshold: pictures show objects of at least this score, by default 0.5; results.json holds all.
        batch_size: images of similar size, or frames, that go through the network together.
        pictures: False to write none.
        ids: COCO annotation file whose image ids results.json shall use; by default those of a COCO file that is the
            source, else 1, 2, ... by file name.
        force: write over what the folder holds.
        device: cpu, cuda, cuda:1, or auto.

    Returns:
        The exit status: 1 when an image could not be read (the others are done all the same), else 0.
    """
    if is_video(source) or video.video:
        if ids is not None or images is not None:
            raise ConfigError("--ids, --images: frames of a video are numbered from 0; leave them out")
        loaded = load(model, policy=policy, device=pick_device(device))
        options: dict[str, Any] = {"batch_size": batch_size, "score_threshold": score_threshold, "force": force}
        return predict_video(loaded, source, out, video, **options)
    if video != VideoOptions():
        raise ConfigError(f"{source}: options of a video go with a video file, camera:0, or a folder and --video")
    with joined():
        found = by_first(lambda: find_images(source, images))
        loaded, file = load(model, policy=policy, device=pick_device(device)), model_file(model)
        task = task_of(loaded.config)
        if score_threshold is not None and not task.has_scores:
            raise ConfigError("--score-threshold: the results of this model have no scores; leave it out")
        score = 0.5 if score_threshold is None else score_threshold
        writer = task.writer(out, found.names, ids=ids or found.ids)
        settings = {"model": digest(file), "policy": to_json(loaded.config.policy), "score_threshold": score}
        settings |= {"batch_size": batch_size, "pictures": pictures}
        journal = Journal(out, writer, settings, pictures=pictures, rank=rank())
        read = [path for path in (file, ids, found.file) if path is not None]
        return run_job(loaded, journal, found, batch_size=batch_size, min_score=score, read=read, force=force)


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
