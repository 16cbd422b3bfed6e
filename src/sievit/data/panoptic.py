"""COCO's panoptic format read as semantic labels: PNGs whose colours are segment ids, and JSON with their classes."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sievit.config import ConfigError
from sievit.data.label_files import Colour, Pair, look_up, packed_colours, read_text, read_values, some

_EMPTY = 0  # id of pixels that belong to no segment


@dataclass(frozen=True, eq=False)
class Panoptic:
    """A panoptic file: what belongs together, the classes, and of each label file the label of its segments."""

    source: str
    pairs: tuple[Pair, ...]
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    segments: dict[Path, dict[int, int]]

    def read_labels(self, pair: Pair) -> np.ndarray:
        """The class of each pixel (h, w), or the ignored value.

        Raises:
            ConfigError: the file cannot be read, or has segments that the JSON does not list.
        """
        values = read_values(pair.label)
        if values.ndim != 3:
            raise ConfigError(f"{pair.label}: has one channel; a panoptic PNG holds segment ids as RGB colours")
        ids = packed_colours(values)
        labels, wrong = look_up(ids, self.segments[pair.label])
        if wrong.any():
            number, count = Counter(ids[wrong].tolist()).most_common(1)[0]
            raise ConfigError(
                f"{pair.label}: segment {number} ({count} pixels) is not among the segments_info that {self.source} "
                "lists for it; use the PNGs that belong to this file"
            )
        return labels


def load_panoptic(images: Path, panoptic_json: Path, folder: Path, ignore_index: int) -> Panoptic:
    """Read a panoptic file; see `LabelDataset.from_panoptic`."""
    name = str(panoptic_json)
    content = _parse(panoptic_json)
    categories = content["categories"]
    labels = {_get(c, "id", int, name, "category"): label for label, c in enumerate(categories)}
    if len(labels) != len(categories):
        raise ConfigError(f"{name}: two categories have the same id; give every category its own")
    files = {_get(i, "id", int, name, "image"): _get(i, "file_name", str, name, "image") for i in content["images"]}
    pairs: list[Pair] = []
    segments: dict[Path, dict[int, int]] = {}
    for annotation in content["annotations"]:
        number = _get(annotation, "image_id", int, name, "annotation")
        if number not in files:
            raise ConfigError(f"{name}: an annotation names the image {number}, which the file does not list (again)")
        file_name = files.pop(number)
        label = folder / _get(annotation, "file_name", str, name, "annotation")
        entries = {_EMPTY: ignore_index}
        for segment in _get(annotation, "segments_info", list, name, "annotation"):
            category = _get(segment, "category_id", int, name, "segment")
            if category not in labels:
                raise ConfigError(
                    f"{name}: a segment of image {number} has the category {category}, which the file does not list"
                )
            crowd = bool(segment.get("iscrowd", 0))
            entries[_get(segment, "id", int, name, "segment")] = ignore_index if crowd else labels[category]
        segments[label] = entries
        pairs.append(Pair(Path(file_name).with_suffix("").as_posix(), images / file_name, label))
    if files:
        raise ConfigError(f"{name}: {len(files)} images have no annotation: {some(list(files.values()))}; remove them")
    for kind, where, paths in (
        ("images", images, [pair.image for pair in pairs]),
        ("panoptic PNGs", folder, [pair.label for pair in pairs]),
    ):
        if not where.is_dir():
            raise ConfigError(f"{where}: no such folder of {kind}")
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ConfigError(
                f"{where}: {len(missing)} of the {len(paths)} {kind} that {name} lists are missing: {some(missing)}"
            )
    names = tuple(_get(c, "name", str, name, "category") for c in categories)
    return Panoptic(name, tuple(pairs), names, _colours(categories), segments)


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path, "the panoptic file"))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: is not a JSON file ({error}); a COCO panoptic file is expected") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list) or not content[key]:
            raise ConfigError(
                f"{path}: has no {key!r}; a COCO panoptic file lists 'images', 'annotations' and 'categories'"
            )
    return content


def _colours(categories: list[dict[str, Any]]) -> tuple[Colour, ...]:
    """Of the categories, if each has one; COCO's list of categories has them, its annotation files do not."""
    colours: list[Colour] = []
    for category in categories:
        match category.get("color"):
            case [int(red), int(green), int(blue)]:
                colours.append((red, green, blue))
            case _:
                return ()
    return tuple(colours)


def _get(record: Any, key: str, kind: type, name: str, what: str) -> Any:
    """A field of an entry, of the type that it has to have."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{name}: {what} {record!r:.80} has no {key!r} that is a {kind.__name__}; correct the file")
    return value
