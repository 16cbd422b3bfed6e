"""COCO's panoptic format read as semantic labels: PNGs whose colours are segment ids, and JSON with their classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

import numpy as np

from sievit.config import ConfigError
from sievit.data.coco_json import CocoFile, Fields
from sievit.data.label_files import Colour, Pair, Palette, packed_colours, read_values, some, translated
from sievit.text import is_text, is_whole

_EMPTY = 0  # id of pixels that belong to no segment

_SEGMENT: Fields = {
    "id": lambda value: 0 < value < 2**24,  # a colour
    "category_id": is_whole,
    "iscrowd": lambda value: value in (None, 0, 1),
}


@dataclass(frozen=True, eq=False)
class PanopticReader:
    """Reads panoptic PNGs: `segments` has the label of each segment id, by file."""

    source: str
    classes: tuple[str, ...]
    palette: Palette
    segments: dict[Path, dict[int, int]]

    def __call__(self, path: Path) -> np.ndarray:
        """The class of each pixel (h, w), or the ignored value.

        Raises:
            ConfigError: the file cannot be read, or has segments that the JSON does not list.
        """
        values = read_values(path)
        if values.ndim != 3:
            raise ConfigError(f"{path}: has one channel; a panoptic PNG holds segment ids as RGB colours")
        advice = (
            f"is not among the segments_info that {self.source} lists for it; use the PNGs that belong to this file"
        )
        ids = packed_colours(values)
        return translated(ids, self.segments[path], lambda found: f"{path}: segment {found} {advice}")


def load_panoptic(
    images: Path, panoptic_json: Path, folder: Path, ignore_index: int
) -> tuple[tuple[Pair, ...], PanopticReader]:
    """Read a panoptic file; see `LabelDataset`."""
    file = CocoFile(panoptic_json)
    name, classes = file.name, file.categories()
    labels = {category["id"]: label for label, category in enumerate(classes)}
    files = {image["id"]: image["file_name"] for image in file.records("images", {"file_name": is_text})}
    fields: Fields = {"file_name": is_text, "segments_info": lambda value: isinstance(value, list)}
    pairs: list[Pair] = []
    segments: dict[Path, dict[int, int]] = {}
    for annotation in file.records("annotations", fields, identity="image_id"):
        number, label = annotation["image_id"], folder / annotation["file_name"]
        if number not in files:
            raise ConfigError(f"{name}: an annotation names the image {number}, which the file does not list")
        segments[label] = {_EMPTY: ignore_index}
        what = f"the 'segments_info' of image {number}"
        for segment in file.checked(annotation["segments_info"], what, _SEGMENT):
            category = segment["category_id"]
            if category not in labels:
                raise ConfigError(
                    f"{name}: a segment of image {number} has the category {category}, which the file does not list"
                )
            segments[label][segment["id"]] = ignore_index if segment.get("iscrowd") else labels[category]
        file_name = files.pop(number)
        pairs.append(Pair(file_name.removesuffix(Path(file_name).suffix), images / file_name, label))
    if files:
        raise ConfigError(f"{name}: {len(files)} images have no annotation: {some(list(files.values()))}; remove them")
    _require_files(images, "images", [pair.image for pair in pairs], name)
    _require_files(folder, "panoptic PNGs", [pair.label for pair in pairs], name)
    if not pairs:
        raise ConfigError(f"{name}: lists no images; name the panoptic file of the images")
    try:
        palette = Palette(_colours([category.get("color") for category in classes]))
    except ConfigError as error:
        raise ConfigError(f"{name}: 'categories': {error}") from error
    return tuple(pairs), PanopticReader(name, tuple(c["name"] for c in classes), palette, segments)


def _require_files(folder: Path, what: str, paths: Sequence[Path], name: str) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of {what}")
    if missing := [path.name for path in paths if not isfile(path)]:  # noqa: PTH113, of any name
        raise ConfigError(
            f"{folder}: {len(missing)} of the {len(paths)} {what} that {name} lists are missing: {some(missing)}"
        )


def _colours(found: list[Any]) -> tuple[Colour, ...]:
    """Of the categories, if each has one; COCO's list of categories has them, its annotation files do not."""
    return tuple((r, g, b) for r, g, b in found) if all(isinstance(c, list) and len(c) == 3 for c in found) else ()
