"""Reports on a model: its results for images of your own, its figures, and the demonstration."""

from pathlib import Path
from typing import Any

from sievit import terminal
from sievit.config import ConfigError, Count, Share, kind_of, to_json
from sievit.data.images import read_image, to_tensor
from sievit.data.truth import Truth
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import evaluate as run_evaluation
from sievit.engine.evaluate import timed
from sievit.engine.signals import Interrupted, stopping
from sievit.files import digest, held, write_png
from sievit.models.base import Model
from sievit.models.build import load, model_file
from sievit.policies import PolicyOptions
from sievit.report.demonstration import demo
from sievit.report.figures import answer_figure, answer_note
from sievit.report.results import JOURNAL, Journal, inputs, is_done, picture_file, require_no_collision, seen
from sievit.tasks import Writer, task_of

__all__ = ["demo", "evaluate", "predict"]


def predict(
    model: Path,
    images: Path,
    /,
    *,
    out: Path,
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
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

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: an image, or a folder of images.
        out: folder for the results.
        policy: another policy.
        score_threshold: pictures show objects of at least this score, by default 0.5; results.json holds all.
        ids: COCO annotation file whose image ids results.json shall use; by default 1, 2, ... by file name.
        force: write over what the folder holds.
        device: cpu, cuda, cuda:1, or auto.

    Returns:
        The exit status: 1 when an image could not be read (the others are done all the same), else 0.
    """
    root, names, skipped = inputs(images)
    loaded = load(model, policy=policy, device=pick_device(device))
    task, console = task_of(loaded.config), terminal.console()
    if score_threshold is not None and not task.has_scores:
        raise ConfigError("--score-threshold: the results of this model have no scores; leave it out")
    score = 0.5 if score_threshold is None else score_threshold
    writer = task.writer(out, names, ids=ids)
    settings = {
        "model": digest(model_file(model)),
        "policy": to_json(loaded.config.policy),
        "score_threshold": score,
    }
    if skipped:
        console.print(f"{skipped} images below {images} are left out: earlier runs wrote them", soft_wrap=True)
    with held(out), stopping("the same command") as stop:
        journal = Journal(out, force=force)
        outputs = [out / file for name in names for file in (picture_file(name), *writer.files(name))]
        read = [*(root / name for name in names), model_file(model), *([] if ids is None else [ids])]
        ours = force or journal.settings is not None
        require_no_collision([*outputs, *(out / file for file in (JOURNAL, *writer.shared))], read, ours=ours)
        journal.start(settings, force=force)
        todo = [name for name in names if not is_done(journal.lines.get(name), root / name, out)]
        if len(todo) < len(names):
            console.print(f"{len(names) - len(todo)} of {len(names)} images were done before", soft_wrap=True)
        failures = []
        try:
            for name in terminal.track(todo, "predicting", console=console):
                try:
                    journal.add(_predicted(loaded, root, name, out, writer, min_score=score))
                except ConfigError as error:
                    failures.append(str(error))
                if stop.received:
                    raise Interrupted(f"stopped after {name}; {stop.advice}")
        finally:
            done = {name: journal.lines[name] for name in names if name in journal.lines}
            written = writer.finish(done) if done else ""
    if written:
        console.print(written, soft_wrap=True)
    for failure in failures:
        console.print(f"error: {failure}", soft_wrap=True)
    if failures:
        console.print(f"{len(failures)} of {len(names)} images could not be used")
    return 1 if failures else 0


def _predicted(model: Model, root: Path, name: str, out: Path, writer: Writer, *, min_score: float) -> dict[str, Any]:
    """The line of an image, whose files are written.

    Raises:
        ConfigError: it cannot be used.
    """
    before, image, task = seen(root / name), read_image(root / name), task_of(model.config)
    answer, _ = timed(model, [to_tensor(image)])
    result = answer.results[0]
    kept = writer.add(name, (image.height, image.width), result)
    note = answer_note(task, model, answer, min_score=min_score)
    figure = answer_figure(task, image, {"prediction": (note, result)}, answer, title=name, min_score=min_score)
    write_png(out / picture_file(name), figure)
    return {"image": name, "seen": before, "files": [picture_file(name), *writer.files(name)], **kept}


def evaluate(
    model: Path,
    /,
    images: Path,
    *,
    truth: Truth = Truth(),  # noqa: B008
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    batch_size: Count = 1,
    limit: Count | None = None,
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
        console=terminal.console(),
    )
    return {**figures, "policy": kind_of(loaded.config.policy), "device": device_name(loaded.device)}
