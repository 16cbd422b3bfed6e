"""COCO annotation files: read, checked once, and every complaint names the file, the entry and the way out."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sievit.config import ConfigError, shown
from sievit.data.coco_json import CocoFile
from sievit.data.masks import ROUNDING, check_polygons, decode_counts, reach
from sievit.text import is_number, is_text, is_whole

LARGEST = 2**31 - 1
"""Pixels of an image; masks are counted in 32 bits."""

LARGEST_AREA = 1e10
"""COCO's evaluation leaves larger objects out."""

ADVICE: Mapping[str, str] = {"invalid": 'pass invalid="skip"', "with_masks": "pass with_masks=False"}
"""What a caller of the library does about an annotation file; a command has other words for it, or no such option."""


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


def load_annotations(
    source: Path | dict[str, Any],
    *,
    invalid: Literal["error", "skip"] = "error",
    advice: Mapping[str, str] = ADVICE,
) -> Annotations:
    """Read and check a COCO instances file, or its content.

    Args:
        source: the JSON file, or what it holds.
        invalid: "skip" leaves annotations out that cannot be used (unknown image or category, box of zero area or
            outside the image, damaged segmentation) and warns how many they were; "error" stops at the first.
        advice: how the caller's user does that, for messages; empty where there is no such option.

    Raises:
        ConfigError: the file is missing or malformed, or an annotation is invalid and `invalid` is "error".
    """
    file = CocoFile(source)
    images = file.records("images", {"file_name": is_text, "width": _is_size, "height": _is_size})
    for image in images:
        if image["width"] * image["height"] > LARGEST:
            raise ConfigError(
                f"{file.name}: image {image['id']} has {image['width']}x{image['height']} pixels, where at most "
                f"{LARGEST} are understood; correct 'width' and 'height'"
            )
    classes, category_ids = load_categories(file)
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    by_id = {image["id"]: image for image in images}
    known, seen = set(category_ids), set[int]()
    skipped: list[str] = []
    for place, annotation in enumerate(file.entries("annotations")):
        try:
            checked = _check(annotation, by_id, known, seen)
        except _Invalid as error:
            number = annotation.get("id") if isinstance(annotation, dict) else None
            what = f"number {place} (counted from 0)" if number is None else shown(number)
            if invalid == "error":
                skip = f", or {advice['invalid']} to leave such annotations out" if "invalid" in advice else ""
                raise ConfigError(f"{file.name}: annotation {what} {error}; correct the file{skip}") from None
            skipped.append(f"{what} {error}")
        else:
            objects[checked["image_id"]].append(checked)
    if skipped:
        warnings.warn(f"{file.name}: {len(skipped)} invalid annotations left out, first: {skipped[0]}", stacklevel=2)
    return Annotations(file.name, tuple(images), tuple(map(tuple, objects.values())), classes, category_ids)


def load_categories(source: Path | CocoFile) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The classes of a COCO instances file and their ids, as `load_annotations` orders them; the rest is not looked at.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    file = source if isinstance(source, CocoFile) else CocoFile(source)
    rising = sorted(file.categories(), key=lambda category: category["id"])
    return tuple(c["name"] for c in rising), tuple(c["id"] for c in rising)


def _check(annotation: Any, images: dict[int, dict], categories: set[int], seen: set[int]) -> dict[str, Any]:
    """The annotation with what COCO's evaluation needs, or `_Invalid`."""
    if not isinstance(annotation, dict):
        raise _Invalid("is not an object")
    for key in ("id", "image_id", "category_id"):
        if not is_whole(annotation.get(key)):
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
        raise _Invalid(f"has {shown(annotation['iscrowd'])} as 'iscrowd', 0 or 1 is meant")
    box = _check_box(annotation, image)
    if annotation.get("segmentation"):
        _check_segmentation(annotation["segmentation"], image)
    area = annotation.get("area", box[2] * box[3])
    if not is_number(area) or not 0 <= area <= LARGEST_AREA:
        raise _Invalid(f"has {shown(area)} as 'area', pixels are meant, at most {LARGEST_AREA:g}")
    return {**annotation, "iscrowd": int(annotation.get("iscrowd", 0)), "area": area}


def _check_box(annotation: dict[str, Any], image: dict[str, Any]) -> list[float]:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise _Invalid(f"has {shown(box)} as 'bbox', [x, y, width, height] in pixels is meant")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise _Invalid(f"has a box of zero area, {box}")
    out = reach((x, y, x + w, y + h), (image["height"], image["width"]))
    if out > ROUNDING:
        how = "lies outside" if out == math.inf else f"reaches {out:g} pixels outside"
        raise _Invalid(f"has a box {box} that {how} its {image['width']}x{image['height']} image {image['id']}")
    return box


def _check_segmentation(segmentation: Any, image: dict[str, Any]) -> None:
    size = (image["height"], image["width"])
    if isinstance(segmentation, list):
        try:
            check_polygons(segmentation, size)
        except ValueError as error:
            raise _Invalid(f"has {error} (image {image['id']})") from error
        return
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise _Invalid("has a segmentation that is neither polygons nor RLE with 'size' and 'counts'")
    if segmentation["size"] != list(size) or not all(map(is_whole, segmentation["size"])):
        raise _Invalid(f"has a mask of size {shown(segmentation['size'])} in an image of height and width {list(size)}")
    counts = segmentation["counts"]
    try:
        if isinstance(counts, str):
            counts = decode_counts(counts).tolist()
        elif not (isinstance(counts, list) and counts and all(is_whole(count) for count in counts)):
            raise _Invalid("has RLE 'counts' that are neither a string nor a list of whole numbers")
    except ValueError as error:
        raise _Invalid(f"has a damaged mask ({error})") from error
    if min(counts) < 0 or sum(counts) != size[0] * size[1]:
        raise _Invalid(f"has a damaged mask (its runs cover {sum(counts)} of {size[0] * size[1]} pixels)")


def _is_size(value: Any) -> bool:
    return is_whole(value) and 0 < value <= LARGEST
