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

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        """
        Args:
            force: begin anew where the file cannot be read.

        Raises:
            ConfigError: the file is there and is not such a journal.
        """
        self.path = folder / JOURNAL
        self.settings: Line | None = None
        self.lines: dict[str, Line] = {}
        self.size = 0
        if not self.path.is_file():
            return
        for text in self.path.read_bytes().splitlines(keepends=True):
            if not text.endswith(b"\n"):
                break  # the process was killed meanwhile
            self.size += len(text)
            try:
                line = json.loads(text)
                if self.settings is None:
                    assert line.pop("kind") == KIND
                    self.settings = line
                else:
                    self.lines[line["image"]] = line
            except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
                if force:
                    self.settings, self.lines, self.size = None, {}, 0
                    return
                what = "damaged" if self.settings else "was not written by sievit predict"
                raise ConfigError(f"{self.path}: {what}; give another --out, or --force to start anew") from error

    def start(self, settings: Line, *, force: bool) -> None:
        """Go on with the file, or begin it.

        Raises:
            ConfigError: it holds the results of something else, and they may not be written over.
        """
        if self.settings not in (None, settings) and not force:
            assert self.settings is not None
            other = [name for name in settings if self.settings.get(name) != settings[name]]
            raise ConfigError(
                f"{self.path.parent}: holds results of another {' and '.join(other) or 'version'}; give another --out, "
                "or --force to write over them"
            )
        if self.settings != settings:
            self.settings, self.lines, self.size = settings, {}, 0

    def add(self, line: Line) -> None:
        """Add the results of an image.

        Raises:
            OSError: the disk is full; the file holds all lines before.
        """
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
            lines = Journal(path.parent).lines.values()
            written |= {(path.parent / file).resolve() for line in lines for file in line["files"]}
        except ConfigError:
            continue  # a file of somebody else that is called so
    found = list_images(images)
    paths = [path for path in found if path.resolve() not in written]
    if not paths:
        raise ConfigError(f"{images}: all {len(found)} images below are results that sievit predict wrote")
    return images, [path.relative_to(images).as_posix() for path in paths], len(found) - len(paths)


def require_no_collision(outputs: Iterable[Path], protected: Iterable[Path], *, ours: bool) -> None:
    """Raise unless every output is a new file, or one of an earlier run of the same command.

    Args:
        protected: what is read, and never written over.
        ours: an earlier run of the same command may have written the outputs.

    Raises:
        ConfigError: one is the same file as one of `protected`, by whatever path; or is there, and is not ours.
    """
    read = {_identity(path): path for path in protected if path.exists()}
    for path in outputs:
        if not (path.exists() or path.is_symlink()):
            continue
        if path.exists() and _identity(path) in read:
            raise ConfigError(f"{path}: is {read[_identity(path)]}, which would be written over; give another --out")
        if not ours:
            raise ConfigError(f"{path}: is there already; give another --out, or --force to write over it")


def is_done(line: Line | None, image: Path, folder: Path) -> bool:
    """Whether the line is of the image as it is now, and its files are there."""
    if line is None or not image.exists():
        return False
    return line["seen"] == seen(image) and all((folder / file).is_file() for file in line["files"])


def seen(image: Path) -> list[int]:
    """What tells that an image was changed: its bytes, and when it was written."""
    stat = image.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino
