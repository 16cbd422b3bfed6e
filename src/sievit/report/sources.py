"""Which images a command looks at: one, a folder, those of a COCO file, of a list, of a pattern."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sievit.config import ConfigError
from sievit.data.coco_json import CocoFile
from sievit.data.images import SUFFIXES, list_images
from sievit.report.results import written_below
from sievit.text import is_text, read_text

WILD = "*?["


@dataclass(frozen=True)
class Source:
    """Images, in their order.

    Attributes:
        root: their folder.
        names: their paths below it; every image once.
        ids: of a COCO file, the id of each image.
        file: that lists them.
        skipped: how many more there are that are results of earlier runs.
    """

    root: Path
    names: list[str]
    ids: dict[str, int] | None = None
    file: Path | None = None
    skipped: int = 0


def find_images(source: Path, images: Path | None = None) -> Source:
    """
    Args:
        source: an image, a folder, a COCO file (.json), a list of paths (.txt), or a pattern with wildcards.
        images: the folder that a COCO file or a list is about; of a list by default the working directory.

    Raises:
        ConfigError: there is no image, or `images` goes with none of this.
    """
    listed = source.is_file() and source.suffix.lower() in (".json", ".txt")
    if images is not None and not listed:
        raise ConfigError(f"--images {images}: is the folder of the images of a .json or .txt file; leave it out")
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images}: no such folder")
    if source.is_dir():
        return _without_results(source, list_images(source), source)
    if source.exists():
        return _listed(source, images) if listed else Source(source.parent, [source.name])
    if any(letter in str(source) for letter in WILD):
        return _matching(source)
    raise ConfigError(f"{source}: no such file or folder")


def _listed(source: Path, images: Path | None) -> Source:
    if source.suffix.lower() == ".txt":
        paths = [line for line in read_text(source, "a list of images").splitlines() if line.strip()]
        root, names, numbers = *_below(images or Path(), paths), None
    elif images is None:
        raise ConfigError(f"{source}: give the folder of its images too, --images FOLDER")
    else:
        records = CocoFile(source).records("images", {"file_name": is_text})
        root, names = _below(images, (record["file_name"] for record in records))
        numbers = dict(zip(reversed(names), (record["id"] for record in reversed(records)), strict=True))
    if not names:
        raise ConfigError(f"{source}: lists no image")
    return Source(root, list(dict.fromkeys(names)), ids=numbers, file=source)


def _below(folder: Path, paths: Iterable[str]) -> tuple[Path, list[str]]:
    """Paths that are relative to `folder`, or absolute, as names below one folder: this one, or what all have above."""
    names = [os.path.normpath(path) for path in paths]
    if any(Path(name).is_absolute() or Path(name).parts[:1] == ("..",) for name in names):
        whole = [os.path.normpath(Path(folder, name).absolute()) for name in names]
        folder = Path(os.path.commonpath([Path(path).parent for path in whole]))
        names = [os.path.relpath(path, folder) for path in whole]
    return folder, names


def _matching(pattern: Path) -> Source:
    place = next(i for i, part in enumerate(pattern.parts) if any(letter in part for letter in WILD))
    root = Path(*pattern.parts[:place])
    found = root.glob(str(Path(*pattern.parts[place:])))
    paths = sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file())
    if not paths:
        raise ConfigError(f"{pattern}: matches no image (looked for {', '.join(SUFFIXES)})")
    return _without_results(root, paths, pattern)


def _without_results(root: Path, found: list[Path], source: Path) -> Source:
    written = written_below(root)
    paths = [path for path in found if path.resolve() not in written] if written else found
    if not paths:
        raise ConfigError(f"{source}: all {len(found)} images below are results that sievit predict wrote")
    return Source(root, [path.relative_to(root).as_posix() for path in paths], skipped=len(found) - len(paths))
