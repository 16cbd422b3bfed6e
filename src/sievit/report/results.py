"""What `sievit predict` writes: a line for each image as soon as its results are there, which a new start goes on from.

Every output is named after its image with .png behind, in a folder of its own, so that no two images share one and no
image is ever an output's place: `photos/a.jpg` has `pictures/a.jpg.png`. In memory are the names of the images and the
places of their lines, never what was found.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

from sievit.config import ConfigError
from sievit.files import held, remove_parts, writing
from sievit.tasks import Writer

JOURNAL = "results.jsonl"
FAILURES = "failures.jsonl"
KIND = "sievit results"
Line = dict[str, Any]


def picture_file(name: str) -> str:
    """Of the image `name`, below the folder of results."""
    return f"pictures/{name}.png"


def part_lock(rank: int) -> str:
    """The lock of a process, in the folder that it writes to with others."""
    return f".lock{rank or ''}"


class Journal:
    """The results so far, by image, in results.jsonl; its first line says what they are the results of.

    Of several processes the first has this file, each other one a part of it, results.1.jsonl and so on.

    Attributes:
        places: by image, where its line begins in the file.
    """

    def __init__(self, folder: Path, writer: Writer, settings: Line, *, pictures: bool = True, rank: int = 0) -> None:
        """
        Args:
            writer: of what there is beside pictures.
            settings: what the results are of.
            pictures: whether there are any.
        """
        self.folder, self.writer, self.settings, self.pictures = folder, writer, settings, pictures
        self.path = folder / (f"results.{rank}.jsonl" if rank else JOURNAL)
        self.places: dict[str, int] = {}
        self.size = self.number = 0

    def files(self, name: str) -> list[str]:
        """All files of an image, below the folder."""
        return [*([picture_file(name)] if self.pictures else []), *self.writer.files(name)]

    def start(self, root: Path, names: list[str], *, read: list[Path], force: bool) -> list[str]:
        """Go on with the file and its parts, or begin it.

        Args:
            root: folder of the images `names`.
            read: further files that are never written over.
            force: begin anew where it cannot be gone on.

        Returns:
            The images that are not done: those without a line, and those that were changed or have lost a file.

        Raises:
            ConfigError: it holds the results of something else, and they may not be written over; an output would lie
                on an image, or on a file of somebody else; or another process still writes a part of it.
        """
        parts = self.parts()
        for rank in parts:
            with held(self.folder, lock=part_lock(rank)):
                pass
        try:
            known = [found for path in (self.path, *parts.values()) if (found := _settings(path)) is not None]
        except ConfigError:
            if not force:
                raise
            known = [{}]
        outputs = chain([JOURNAL, FAILURES, *self.writer.shared], (file for name in names for file in self.files(name)))
        _require_no_collision(
            self.folder, outputs, lambda: chain((root / name for name in names), read), ours=force or bool(known)
        )
        others = [each for each in known if each != self.settings]
        if others and not force:
            other = " and ".join(key for key in self.settings if others[0].get(key) != self.settings[key])
            what = f"{self.folder}: holds results of another {other or 'version'}"
            raise ConfigError(f"{what}; give another --out, or --force to write over them")
        if known:
            remove_parts(self.folder)
        try:
            if known and not others:
                self._go_on(root)
        except ConfigError:
            if not force:
                raise
            others = known
        if others:
            self.places, self.size, self.number = {}, 0, 0
            for path in (self.path, *parts.values()):
                path.unlink(missing_ok=True)
        return [name for name in names if name not in self.places]

    def _go_on(self, root: Path) -> None:
        """Take up the lines of images that stand as they were, with all files of theirs."""
        for place, length, line in _lines(self.path):
            self.size, self.number = place + length, self.number + 1
            self.places[line["image"]] = place
            image, files = root / line["image"], [self.folder / file for file in line["files"]]
            if not image.exists() or line["seen"] != seen(image) or not all(file.is_file() for file in files):
                del self.places[line["image"]]
        self.join()

    def parts(self) -> dict[int, Path]:
        """The files of other processes, by number."""
        found = {path.name.split(".")[1]: path for path in self.folder.glob("results.*.jsonl")}
        return {int(number): found[number] for number in sorted(found) if number.isdecimal()}

    def join(self) -> None:
        """Take the lines of the parts over; they are removed."""
        for part in self.parts().values():
            lines = (line for _, _, line in _lines(part))
            while some := list(islice(lines, 64)):
                self.add(some)
            part.unlink()

    def line(self, name: str, before: list[int], kept: Line) -> Line:
        """The line of an image.

        Args:
            before: what `seen` returned before the image was read.
            kept: what the writer needs of it.
        """
        return {"image": name, "seen": before, "files": self.files(name), **kept}

    def add(self, lines: list[Line]) -> None:
        """Add the lines of images whose files are written.

        Raises:
            OSError: the disk is full; the file holds all lines before.
        """
        first = [] if self.size else [{"kind": KIND, **self.settings}]
        texts = [(json.dumps(each) + "\n").encode() for each in (*first, *lines)]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.truncate(self.size)
            file.seek(self.size)
            file.writelines(texts)
            file.flush()
            os.fsync(file.fileno())
        place = self.size + sum(map(len, texts[: len(first)]))
        for line, text in zip(lines, texts[len(first) :], strict=True):
            self.places[line["image"]] = place
            place += len(text)
        self.size, self.number = place, self.number + len(lines)

    def settle(self, names: list[str]) -> None:
        """Put the lines into the order of `names`, the others behind; lines that were replaced go.

        So the file is that of a run without a stop, by however many processes.
        """
        ours = set(names)
        order = [name for name in names if name in self.places]
        order += [name for name in self.places if name not in ours]
        in_order = all(self.places[a] < self.places[b] for a, b in pairwise(order))
        if not order or (in_order and self.number == len(order)):
            return
        with self.path.open("rb") as old, writing(self.path) as new:
            place = new.write(old.readline())
            for name in order:
                old.seek(self.places[name])
                self.places[name], place = place, place + new.write(old.readline())
        self.size, self.number = place, len(order)

    def done(self, names: list[str]) -> Mapping[str, Line]:
        """The lines of those of `names` that are done, read when they are asked for."""
        return _Done(self, names)


class _Done(Mapping[str, Line]):
    def __init__(self, journal: Journal, names: list[str]) -> None:
        self.journal, self.names = journal, names

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if name in self.journal.places)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Line:
        with self.journal.path.open("rb") as file:
            file.seek(self.journal.places[name])
            return json.loads(file.readline())


def _settings(path: Path) -> Line | None:
    """What a file holds the results of; None where there is no file, or a first line that was cut short."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        text = file.readline()
    if not text.endswith(b"\n"):
        return None
    try:
        line = json.loads(text)
        if line.pop("kind") != KIND:
            raise ValueError("of another kind")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: was not written by sievit predict; give another --out, or --force to start anew"
        ) from error
    return line


def _lines(path: Path) -> Iterator[tuple[int, int, Line]]:
    """Where each line of results begins, its bytes, and what it says; a last line that was cut short is left out.

    Raises:
        ConfigError: a line is none of ours.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        place = len(file.readline())
        for text in file:
            if not text.endswith(b"\n"):
                return  # the process was killed meanwhile
            try:
                line = json.loads(text)
                line |= {"image": str(line["image"]), "seen": list(line["seen"]), "files": list(line["files"])}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ConfigError(f"{path}: damaged; give another --out, or --force to start anew") from error
            yield place, len(text), line
            place += len(text)


def written_below(folder: Path) -> set[Path]:
    """The files in a folder and below that runs of `sievit predict` wrote for images, by their real paths."""
    written: set[Path] = set()
    for path in chain(folder.rglob(JOURNAL), folder.rglob("results.*.jsonl")):
        try:
            if _settings(path) is not None:
                for _, _, line in _lines(path):
                    written |= {(path.parent / str(file)).resolve() for file in line["files"]}
        except ConfigError:
            continue  # a file of somebody else that is called so
    return written


def _require_no_collision(
    folder: Path, outputs: Iterable[str], read: Callable[[], Iterable[Path]], *, ours: bool
) -> None:
    """Raise unless every output is a new file, or one of an earlier run of the same command.

    Args:
        outputs: below `folder`.
        read: files that are never written over.
        ours: an earlier run of the same command may have written the outputs.

    Raises:
        ConfigError: one is the same file as one of `read`, by whatever path; or is there, and is not ours.
    """
    protected = {_identity(path) for path in read() if path.exists()}
    for path in (folder / output for output in outputs):
        if not (path.exists() or path.is_symlink()):
            continue
        if path.exists() and _identity(path) in protected:
            image = next(other for other in read() if other.exists() and other.samefile(path))
            raise ConfigError(f"{path}: is {image}, which would be written over; give another --out")
        if not ours:
            raise ConfigError(f"{path}: is there already; give another --out, or --force to write over it")


def seen(image: Path) -> list[int]:
    """What tells that an image was changed: its bytes, and when it was written."""
    stat = image.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino
