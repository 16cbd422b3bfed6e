"""What `sievit predict` writes: a line for each image as soon as its results are there, which a new start goes on from.

Every output is named after its image with .png behind, in a folder of its own, so that no two images share one and no
image is ever an output's place: `photos/a.jpg` has `pictures/a.jpg.png`.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sievit.config import ConfigError
from sievit.data.images import list_images
from sievit.tasks import Writer

JOURNAL = "results.jsonl"
KIND = "sievit results"
Line = dict[str, Any]


def picture_file(name: str) -> str:
    """Of the image `name`, below the folder of results."""
    return f"pictures/{name}.png"


class Journal:
    """The results so far, by image, in results.jsonl; its first line says what they are the results of.

    Attributes:
        settings: that line; None where there is no such file.
        lines: by image.
    """

    def __init__(self, folder: Path, writer: Writer, *, force: bool = False) -> None:
        """
        Args:
            writer: of what there is beside pictures.
            force: begin anew where the file cannot be read.

        Raises:
            ConfigError: the file is there and is not such a journal.
        """
        self.folder, self.path, self.writer = folder, folder / JOURNAL, writer
        try:
            self.settings, self.lines, self.size = _read(self.path)
        except ConfigError:
            if not force:
                raise
            self.settings, self.lines, self.size = None, {}, 0

    def files(self, name: str) -> list[str]:
        """All files of an image, below the folder."""
        return [picture_file(name), *self.writer.files(name)]

    def start(self, settings: Line, root: Path, names: list[str], *, read: list[Path], force: bool) -> list[str]:
        """Go on with the file, or begin it.

        Args:
            root: folder of the images `names`.
            read: further files that are never written over.

        Returns:
            The images that are not done: those without a line, and those that were changed or have lost a file.

        Raises:
            ConfigError: it holds the results of something else, and they may not be written over; or an output would
                lie on an image, or on a file of somebody else.
        """
        folder, before = self.folder, self.settings or {}
        outputs = [JOURNAL, *self.writer.shared, *(file for name in names for file in self.files(name))]
        ours = force or self.settings is not None
        _require_no_collision(folder, outputs, [*(root / name for name in names), *read], ours=ours)
        if self.settings is not None and before != settings and not force:
            other = " and ".join(key for key in settings if before.get(key) != settings[key])
            what = f"{folder}: holds results of another {other or 'version'}"
            raise ConfigError(f"{what}; give another --out, or --force to write over them")
        if before != settings:
            self.settings, self.lines, self.size = settings, {}, 0
        for name, line in list(self.lines.items()):
            image, files = root / name, [folder / file for file in line["files"]]
            if not image.exists() or line["seen"] != seen(image) or not all(file.is_file() for file in files):
                del self.lines[name]
        return [name for name in names if name not in self.lines]

    def add(self, name: str, before: list[int], kept: Line) -> None:
        """Add the results of an image, whose files are written.

        Args:
            before: what `seen` returned before the image was read.
            kept: what the writer needs of it.

        Raises:
            OSError: the disk is full; the file holds all lines before.
        """
        line = {"image": name, "seen": before, "files": self.files(name), **kept}
        first = [] if self.size else [{"kind": KIND, **(self.settings or {})}]
        data = "".join(json.dumps(each) + "\n" for each in (*first, line)).encode()
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.truncate(self.size)
            file.seek(self.size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.size += len(data)
        self.lines[line["image"]] = line


def _read(path: Path) -> tuple[Line | None, dict[str, Line], int]:
    """The settings, the lines by image, and the bytes of them all; a last line that was cut short is left out."""
    settings, lines, size = None, dict[str, Line](), 0
    for text in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        if not text.endswith(b"\n"):
            break  # the process was killed meanwhile
        size += len(text)
        try:
            line = json.loads(text)
            if settings is None and line.pop("kind") == KIND:
                settings = line
            else:
                lines[line["image"]] = {"seen": list(line["seen"]), "files": list(line["files"])} | line
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = "damaged" if settings else "was not written by sievit predict"
            raise ConfigError(f"{path}: {what}; give another --out, or --force to start anew") from error
    return settings, lines, size


def inputs(images: Path) -> tuple[Path, list[str], int]:
    """The images to look at.

    Args:
        images: an image, or a folder of images.

    Returns:
        Their folder; their names, relative to it; and how many more there are, which are results of earlier runs.

    Raises:
        ConfigError: there is none.
    """
    if not images.is_dir():
        if not images.exists():
            raise ConfigError(f"{images}: no such file or folder")
        return images.parent, [images.name], 0
    written: set[Path] = set()
    for path in images.rglob(JOURNAL):
        try:
            lines = _read(path)[1].values()
            written |= {(path.parent / str(file)).resolve() for line in lines for file in line["files"]}
        except ConfigError:
            continue  # a file of somebody else that is called so
    found = list_images(images)
    paths = [path for path in found if path.resolve() not in written]
    if not paths:
        raise ConfigError(f"{images}: all {len(found)} images below are results that sievit predict wrote")
    return images, [path.relative_to(images).as_posix() for path in paths], len(found) - len(paths)


def _require_no_collision(folder: Path, outputs: Iterable[str], read: Iterable[Path], *, ours: bool) -> None:
    """Raise unless every output is a new file, or one of an earlier run of the same command.

    Args:
        outputs: below `folder`.
        read: files that are never written over.
        ours: an earlier run of the same command may have written the outputs.

    Raises:
        ConfigError: one is the same file as one of `read`, by whatever path; or is there, and is not ours.
    """
    protected = {_identity(path): path for path in read if path.exists()}
    for path in (folder / output for output in outputs):
        if not (path.exists() or path.is_symlink()):
            continue
        if path.exists() and _identity(path) in protected:
            raise ConfigError(
                f"{path}: is {protected[_identity(path)]}, which would be written over; give another --out"
            )
        if not ours:
            raise ConfigError(f"{path}: is there already; give another --out, or --force to write over it")


def seen(image: Path) -> list[int]:
    """What tells that an image was changed: its bytes, and when it was written."""
    stat = image.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino
