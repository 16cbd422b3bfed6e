"""COCO annotation files: read, checked once, and every complaint names the file, the entry and the way out."""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sievit.config import ConfigError
from sievit.data.masks import decode_counts

_EXPECTED = "a COCO file is an object with 'images', 'annotations' and 'categories'"

ROUNDING = 2.0
"""Pixels by which a box may stick out of its image; it is then clipped, as annotation tools round."""


@dataclass(frozen=True)
class Annotations:
    """A checked annotation file.

    `images` are the file's image records in its order; `objects[i]` are the annotations of image i, crowds included.
    Labels are 1-based: label l is `classes[l - 1]` and has the category id `category_ids[l - 1]`; the ids rise, with
    holes or without.
    """

    source: str
    images: tuple[dict[str, Any], ...]
    objects: tuple[tuple[dict[str, Any], ...], ...]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]

    @property
    def has_masks(self) -> bool:
        """Whether every object has one."""
        return all(annotation.get("segmentation") for objects in self.objects for annotation in objects)

    @property
    def as_coco(self) -> dict[str, Any]:
        """The checked content in COCO's format, with `area` and `iscrowd` filled in, as the evaluation wants it."""
        pairs = zip(self.category_ids, self.classes, strict=True)
        return {
            "info": {},
            "images": list(self.images),
            "annotations": [annotation for objects in self.objects for annotation in objects],
            "categories": [{"id": number, "name": name} for number, name in pairs],
        }


class _Invalid(Exception):
    """What is wrong with one annotation."""


def load_annotations(source: Path | dict[str, Any], *, invalid: Literal["error", "skip"] = "error") -> Annotations:
    """Read and check a COCO instances file, or its content.

    Args:
        source: the JSON file, or what it holds.
        invalid: "skip" leaves annotations out that cannot be used (unknown image or category, box of zero area or
            outside the image, damaged segmentation) and warns how many they were; "error" stops at the first.

    Raises:
        ConfigError: the file is missing or malformed, or an annotation is invalid and `invalid` is "error".
    """
    name = "annotations" if isinstance(source, dict) else str(source)
    content = source if isinstance(source, dict) else read_content(source)
    images = records(content, "images", name, {"file_name": is_text, "width": _is_size, "height": _is_size})
    classes, category_ids = _sorted_categories(content, name)
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    by_id = {image["id"]: image for image in images}
    seen: set[int] = set()
    skipped: list[str] = []
    annotations = entries(content, "annotations", name)
    runs = _measure_runs(annotations)
    for place, annotation in enumerate(annotations):
        try:
            checked = _check(annotation, by_id, set(category_ids), seen, runs)
        except _Invalid as error:
            number = annotation.get("id") if isinstance(annotation, dict) else None
            what = f"number {place} (counted from 0)" if number is None else repr(number)
            if invalid == "error":
                raise ConfigError(
                    f'{name}: annotation {what} {error}; correct the file, or pass invalid="skip" to leave such '
                    "annotations out"
                ) from None
            skipped.append(f"{what} {error}")
        else:
            objects[checked["image_id"]].append(checked)
    if skipped:
        warnings.warn(f"{name}: {len(skipped)} invalid annotations left out, first: {skipped[0]}", stacklevel=2)
    return Annotations(name, tuple(images), tuple(map(tuple, objects.values())), classes, category_ids)


def load_categories(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The classes of a COCO instances file and their ids, as `load_annotations` orders them; the rest is not looked at.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    return _sorted_categories(read_content(path), str(path))


def _sorted_categories(content: dict[str, Any], name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    rising = sorted(categories(content, name), key=lambda category: category["id"])
    return tuple(c["name"] for c in rising), tuple(c["id"] for c in rising)


def read_content(path: Path) -> dict[str, Any]:
    """The JSON object of a COCO file.

    Raises:
        ConfigError: the file cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: the annotation file cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:  # not JSON, or not text
        raise ConfigError(f"{path}: is not a JSON file ({error}); {_EXPECTED}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a JSON {type(content).__name__}; {_EXPECTED}; is this a results file?")
    return content


def entries(content: dict[str, Any], key: str, name: str) -> list[Any]:
    """The list under a key of the file called `name`.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(content.get(key), list):
        problem = f"has no '{key}'" if key not in content else f"'{key}' is not a list"
        raise ConfigError(f"{name}: {problem}; {_EXPECTED}")
    return content[key]


def records(content: dict[str, Any], key: str, name: str, fields: dict[str, Callable[[Any], bool]]) -> list[dict]:
    """The images or the categories, each with a unique whole `id` and the given fields.

    Raises:
        ConfigError: one is not so.
    """
    seen: set[int] = set()
    for place, record in enumerate(entries(content, key, name)):
        if not isinstance(record, dict) or not _is_whole(record.get("id")):
            raise ConfigError(f"{name}: entry {place} (counted from 0) of '{key}' has no whole number 'id'; add it")
        number = record["id"]
        for field, fits in fields.items():
            if not fits(record.get(field)):
                problem = f"has no '{field}'" if field not in record else f"has {record[field]!r} as '{field}'"
                raise ConfigError(f"{name}: entry with id {number} of '{key}' {problem}; correct the file")
        if number in seen:
            raise ConfigError(f"{name}: id {number} occurs more than once in '{key}'; give every entry its own id")
        seen.add(number)
    return content[key]


def categories(content: dict[str, Any], name: str) -> list[dict]:
    """The categories in the order of the file.

    Raises:
        ConfigError: there is none, or one has no id and name.
    """
    found = records(content, "categories", name, {"name": is_text})
    if not found:
        raise ConfigError(f"{name}: 'categories' is empty; list the classes with their ids and names")
    return found


Runs = dict[str, tuple[int, int]]
"""Compressed RLE strings, with the sum and the smallest of their run lengths."""


def _measure_runs(annotations: list[Any]) -> Runs:
    """Of all compressed masks in one pass; nothing if one of them is damaged, `_check` then finds it."""
    segmentations = (a.get("segmentation") for a in annotations if isinstance(a, dict))
    counts = [s["counts"] for s in segmentations if isinstance(s, dict) and isinstance(s.get("counts"), str)]
    try:
        runs, offsets = decode_counts(counts)
    except ValueError:
        return {}
    if not counts:
        return {}
    sums, least = (f.reduceat(runs, offsets[:-1]).tolist() for f in (np.add, np.minimum))
    return dict(zip(counts, zip(sums, least, strict=True), strict=True))


def _check(
    annotation: Any, images: dict[int, dict], categories: set[int], seen: set[int], runs: Runs
) -> dict[str, Any]:
    """The annotation with what COCO's evaluation needs, or `_Invalid`."""
    if not isinstance(annotation, dict):
        raise _Invalid("is not an object")
    for key in ("id", "image_id", "category_id"):
        if not _is_whole(annotation.get(key)):
            raise _Invalid(f"has no whole number '{key}'")
    if annotation["id"] in seen:
        raise _Invalid("has an id that was used before")
    seen.add(annotation["id"])
    image = images.get(annotation["image_id"])
    if image is None:
        raise _Invalid(f"names the image {annotation['image_id']}, which the file does not list")
    if annotation["category_id"] not in categories:
        raise _Invalid(f"names the category {annotation['category_id']}, which the file does not list")
    if annotation.get("iscrowd", 0) not in (0, 1):
        raise _Invalid(f"has {annotation['iscrowd']!r} as 'iscrowd', 0 or 1 is meant")
    box = _check_box(annotation, image["width"], image["height"])
    if annotation.get("segmentation"):
        _check_segmentation(annotation["segmentation"], (image["height"], image["width"]), runs)
    area = annotation.get("area", box[2] * box[3])
    if not _is_finite(area):
        raise _Invalid(f"has {area!r} as 'area'")
    return {**annotation, "iscrowd": int(annotation.get("iscrowd", 0)), "area": area}


def _check_box(annotation: dict[str, Any], width: int, height: int) -> list[float]:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
        raise _Invalid(f"has {box!r} as 'bbox', [x, y, width, height] in pixels is meant")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise _Invalid(f"has a box of zero area, {box}")
    out = max(-x, -y, x + w - width, y + h - height)
    inside = min(x + w, width) - max(x, 0) > 0 and min(y + h, height) - max(y, 0) > 0
    if not inside or out > ROUNDING:
        how = f"reaches {out:g} pixels outside" if inside else "lies outside"
        raise _Invalid(f"has a box {box} that {how} its {width}x{height} image {annotation['image_id']}")
    return box


def _check_segmentation(segmentation: Any, size: tuple[int, int], known: Runs) -> None:
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if (
                not isinstance(polygon, list)
                or len(polygon) < 6
                or len(polygon) % 2
                or not all(map(_is_finite, polygon))
            ):
                raise _Invalid("has a polygon that is not a list of at least three x, y pairs")
        return
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise _Invalid("has a segmentation that is neither polygons nor RLE with 'size' and 'counts'")
    if segmentation["size"] != list(size):
        raise _Invalid(f"has a mask of size {segmentation['size']} in an image of height and width {list(size)}")
    counts = segmentation["counts"]
    try:
        if isinstance(counts, str):
            total, least = known[counts] if counts in known else _measure(counts)
        elif isinstance(counts, list) and counts and all(_is_whole(count) for count in counts):
            total, least = sum(counts), min(counts)
        else:
            raise _Invalid("has RLE 'counts' that are neither a string nor a list of whole numbers")
    except ValueError as error:
        raise _Invalid(f"has a damaged mask ({error})") from error
    if least < 0 or total != size[0] * size[1]:
        raise _Invalid(f"has a damaged mask (its runs cover {total} of {size[0] * size[1]} pixels)")


def _measure(counts: str) -> tuple[int, int]:
    runs = decode_counts([counts])[0]
    return int(runs.sum()), int(runs.min())


def is_text(value: Any) -> bool:
    """Whether a field is a string that is not empty."""
    return isinstance(value, str) and bool(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
