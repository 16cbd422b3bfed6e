"""The images of `sievit predict`, batch by batch: which ones go together, and what is done with each."""

import json
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image
from rich.console import Console
from torch import Tensor

from sievit import terminal
from sievit.config import ConfigError
from sievit.data.images import image_size, read_image, to_tensor
from sievit.distributed import by_first, gathered, rank, world_size
from sievit.engine.evaluate import timed
from sievit.engine.signals import Interrupted, Stop, stopping
from sievit.files import held, write_atomically, write_png
from sievit.models.base import Answer, Model
from sievit.models.inputs import InputConfig, Size
from sievit.report.figures import answer_figure, answer_note
from sievit.report.results import FAILURES, Journal, Line, part_lock, picture_file, seen
from sievit.report.sources import Source
from sievit.tasks import task_of

K = TypeVar("K")
AHEAD = 16
"""Batches' worth of images among which those of similar size are found."""
PADDING = 1.25
"""Pixels of a batch at most, as a multiple of those of its images."""
SHOWN = 20
"""Failures that are printed at most; all are in the file."""


class _Read(NamedTuple):
    name: str
    before: list[int]
    """What `seen` returned."""
    image: Image.Image


def batches(
    root: Path, names: list[str], todo: Container[str], batch_size: int, config: InputConfig
) -> Iterator[list[str]]:
    """The images in batches, those without one of `todo` left out.

    Which images are together depends on `names` and the heads of their files alone: a batch that was done in part when
    a run was stopped is computed whole again, since its images would have other rounding errors in another one.
    """
    ahead = 1 if batch_size == 1 else AHEAD * batch_size
    for start in range(0, len(names), ahead):
        window = names[start : start + ahead]
        if any(name in todo for name in window):
            sizes = {name: None if ahead == 1 else image_size(root / name) for name in window}
            yield from (batch for batch in similar(sizes, batch_size, config) if any(name in todo for name in batch))


def similar(sizes: Mapping[K, Size | None], batch_size: int, config: InputConfig) -> Iterator[list[K]]:
    """Batches of images whose sizes for the network are similar; each of unknown size is alone."""
    known = {name: config.test_size(size) for name, size in sizes.items() if size is not None}
    batch: list[K] = []
    for name in sorted(known, key=lambda name: known[name]):
        grown = [known[each] for each in (*batch, name)]
        padded = max(h for h, _ in grown) * max(w for _, w in grown) * len(grown)
        if batch and (len(grown) > batch_size or padded > PADDING * sum(h * w for h, w in grown)):
            yield batch
            batch = []
        batch.append(name)
    if batch:
        yield batch
    yield from ([name] for name in sizes if name not in known)


def answers(model: Model, images: list[Tensor]) -> list[tuple[Answer, int] | ConfigError]:
    """For each image the answer of a pass, and its place there; or what is wrong with it, which costs no other one."""
    try:
        answer, _ = timed(model, images)
        return [(answer, index) for index in range(len(images))]
    except ConfigError as error:
        return [error] if len(images) == 1 else [each for image in images for each in answers(model, [image])]


def run_job(
    model: Model,
    journal: Journal,
    source: Source,
    *,
    batch_size: int,
    min_score: float,
    read: list[Path],
    force: bool,
) -> int:
    """The results for all images of a source that are not in the journal, by all processes together.

    Args:
        min_score: of what pictures show.
        read: files that are never written over.
        force: write over what the folder holds.

    Returns:
        The exit status: 1 where an image could not be used.

    Raises:
        ConfigError: the folder holds something else, or another process writes there.
        Interrupted: SIGINT or SIGTERM came; what is done is in the journal.
        OSError: the disk is full; what was done before is in the journal.
    """
    console, names = terminal.console(), source.names
    with ExitStack() as stack:

        def begun() -> list[str]:
            if source.skipped:
                console.print(f"{source.skipped} images are left out: earlier runs wrote them", soft_wrap=True)
            stack.enter_context(held(journal.folder))
            todo = journal.start(source.root, names, read=read, force=force)
            if len(todo) < len(names):
                console.print(f"{len(names) - len(todo)} of {len(names)} images were done before", soft_wrap=True)
            return todo

        stop = stack.enter_context(stopping("the same command"))
        todo = set(by_first(begun))
        if rank():
            stack.enter_context(held(journal.folder, lock=part_lock(rank())))
        job = Job(model, journal, source.root, todo, min_score=min_score)
        share = -(-len(todo) // world_size())
        try:
            with terminal.Work("predicting", total=share, console=None if rank() else console) as work:
                job.run(names, batch_size, work, stop)
        except BaseException:
            if world_size() == 1:
                _assemble(job, names, console)
            raise
        for failures in gathered(job.failures):
            job.failures |= failures
        by_first(lambda: _finish(job, names, console))
    return 1 if job.failures else 0


def _finish(job: "Job", names: list[str], console: Console) -> None:
    """All processes are done."""
    job.journal.join()
    job.journal.settle(names)
    _assemble(job, names, console)
    failed = [job.failures[name] for name in names if name in job.failures]
    for failure in failed[:SHOWN]:
        console.print(f"error: {failure}", soft_wrap=True)
    if failed:
        more = f", {len(failed) - SHOWN} more than are shown" if len(failed) > SHOWN else ""
        where = job.journal.folder / FAILURES
        console.print(f"{len(failed)} of {len(names)} images could not be used{more}: {where}", soft_wrap=True)


def _assemble(job: "Job", names: list[str], console: Console) -> None:
    """Write what belongs to all images that are done, and the list of those that failed."""
    journal, path = job.journal, job.journal.folder / FAILURES
    done = journal.done(names)
    if done:
        console.print(journal.writer.finish(done), soft_wrap=True)
    lines = [{"image": name, "reason": job.failures[name]} for name in names if name in job.failures]
    if not lines:
        path.unlink(missing_ok=True)
        return
    if not journal.size:
        journal.add([])  # so that the folder is ours
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


class Job:
    """The results for images, put into a journal and into files.

    Attributes:
        failures: what is wrong with the images that cannot be used, by name.
    """

    def __init__(self, model: Model, journal: Journal, root: Path, todo: set[str], *, min_score: float) -> None:
        """
        Args:
            root: folder of the images.
            todo: the images that are not done.
            min_score: of what pictures show.
        """
        self.model, self.journal, self.root, self.todo, self.min_score = model, journal, root, todo, min_score
        self.task, self.failures = task_of(model.config), dict[str, str]()

    def run(self, names: list[str], batch_size: int, work: terminal.Work, stop: Stop) -> None:
        """This process's share of the batches of `names`.

        Raises:
            Interrupted: SIGINT or SIGTERM came; what is done is in the journal.
        """
        plan, done = batches(self.root, names, self.todo, batch_size, self.model.config.input), 0
        for batch in islice(plan, rank(), None, world_size()):
            work.show(done)
            read = [each for name in batch if (each := self._read(name))]
            if lines := self._answered(read):
                self.journal.add(lines)
            done += sum(name in self.todo for name in batch)
            if stop.received:
                raise Interrupted(f"stopped after {batch[-1]}; {stop.advice}")

    def _read(self, name: str) -> _Read | None:
        path = self.root / name
        try:
            return _Read(name, seen(path), read_image(path))
        except ConfigError as error:
            self.failures[name] = str(error)
        except FileNotFoundError:
            self.failures[name] = f"{path}: no such image"
        except OSError as error:
            self.failures[name] = f"{path}: {error.strerror or error}"
        return None

    def _answered(self, read: list[_Read]) -> list[Line]:
        """The lines of images that go through the network together."""
        lines = []
        found = answers(self.model, [to_tensor(each.image) for each in read]) if read else []
        for (name, before, image), each in zip(read, found, strict=True):
            if isinstance(each, ConfigError):
                self.failures[name] = str(each)
            elif name in self.todo:
                kept = self.journal.writer.add(name, (image.height, image.width), each[0].results[each[1]])
                if self.journal.pictures:
                    self._draw(name, image, *each)
                lines.append(self.journal.line(name, before, kept))
        return lines

    def _draw(self, name: str, image: Image.Image, answer: Answer, index: int) -> None:
        options: dict[str, Any] = {"index": index, "min_score": self.min_score}
        shown = {"prediction": (answer_note(self.task, self.model, answer, **options), answer.results[index])}
        figure = answer_figure(self.task, image, shown, answer, title=name, **options)
        write_png(self.journal.folder / picture_file(name), figure)
