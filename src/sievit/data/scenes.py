"""Generated scenes for tests and benches: objects of five shapes on textured ground, in COCO's format.

A scene is a function of (seed, index, size). Colour says nothing about the class of an object, and no object covers
another.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval
from PIL import Image

from sievit.config import ConfigError, Count, Seed, check_range
from sievit.data.masks import Patch, encode, tight_patch
from sievit.files import write_atomically, write_png

Edge = Annotated[int, Interval(ge=16, le=2**31 - 1)]
"""Height or width of a scene in pixels."""

VERSION = 2
"""Of the drawing: scenes of different versions differ."""

Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From coordinates (u, v), in radii from the centre of the object, to whether they are inside of it."""

SHAPES: dict[str, Shape] = {
    "disc": lambda u, v: np.hypot(u, v) < 0.9,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) < 0.25,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.7,
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.3) & (np.maximum(np.abs(u), np.abs(v)) < 0.95),
    "star": lambda u, v: np.hypot(u, v) < 0.65 + 0.35 * np.cos(5 * np.arctan2(v, u)),
}
CLASSES = tuple(SHAPES)


@dataclass(frozen=True)
class Instance:
    """One object of a scene: its label (1-based, of `CLASSES`) and its pixels."""

    label: int
    patch: Patch


def draw(*, seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, list[Instance], np.ndarray]:
    """Scene number `index` of `seed`.

    Args:
        seed: of the whole series, at least 0.
        index: of the scene, at least 0.
        size: (height, width) in pixels, at least 16 each.

    Returns:
        The image, uint8 RGB (h, w, 3); the instances; and the semantic labels, uint8 (h, w): 0 is the ground, the
        classes follow from 1.
    """
    check_range(Seed, seed, "seed")
    check_range(tuple[Edge, Edge], size, "size")
    rng = np.random.default_rng([VERSION, seed, index])
    pixels = rng.uniform(0.2, 0.8, 3) * _texture(rng, size)
    labels = np.zeros(size, dtype=np.uint8)
    instances = []
    for _ in range(rng.choice((0, 4, 12, 40), p=(0.1, 0.3, 0.4, 0.2))):
        label, radius = int(rng.integers(1, len(CLASSES) + 1)), rng.uniform(5, max(6, min(size) / 5))
        window, inside = _placed(rng, size, radius, SHAPES[CLASSES[label - 1]])
        if np.count_nonzero(inside) < radius**2 or labels[window][inside].any():
            continue
        pixels[window][inside] = rng.uniform(0, 1, 3) * _texture(rng, inside.shape)[inside]
        labels[window][inside] = label
        instances.append(Instance(label, tight_patch(inside, y=window[0].start, x=window[1].start)))
    noise = rng.normal(0, 0.02, pixels.shape)
    return ((pixels + noise).clip(0, 1) * 255 + 0.5).astype(np.uint8), instances, labels


def generate(out: Path, *, num_images: int, size: tuple[int, int] = (256, 256), seed: int = 0) -> None:
    """Write scenes as a COCO data set: images/*.png, labels/*.png (semantic), annotations.json.

    Files come under their names only when they are complete, annotations.json last.

    Args:
        out: a folder without annotations.json, made if need be.
        num_images: how many, from index 0.
        size: (height, width) in pixels.
        seed: of the series.

    Raises:
        ConfigError: the folder holds a data set already, or a number makes no sense.
    """
    check_range(Count, num_images, "num_images")
    annotations = Path(out) / "annotations.json"
    if annotations.exists():
        raise ConfigError(f"{annotations}: the folder holds a data set; choose another one, or remove this one")
    images, objects = [], []
    for index in range(num_images):
        image, instances, labels = draw(seed=seed, index=index, size=size)
        name = f"{index:06d}.png"
        write_png(Path(out) / "images" / name, Image.fromarray(image))
        write_png(Path(out) / "labels" / name, Image.fromarray(labels))
        images.append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
        objects += [(instance, index + 1) for instance in instances]
    content = {
        "info": {"description": f"sievit scenes {VERSION}, seed {seed}"},
        "images": images,
        "annotations": [_annotation(instance, i, image, size) for i, (instance, image) in enumerate(objects, start=1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    write_atomically(annotations, json.dumps(content).encode())


def _placed(
    rng: np.random.Generator, size: tuple[int, int], radius: float, shape: Shape
) -> tuple[tuple[slice, slice], np.ndarray]:
    """A window of the scene, and which of its pixels are inside of the shape somewhere there, turned at random."""
    window, offsets = [], []
    for edge in size:
        centre = rng.uniform(0, edge)
        window.append(slice(max(0, int(centre - radius)), min(edge, int(centre + radius) + 1)))
        offsets.append((np.arange(edge)[window[-1]] + 0.5 - centre) / radius)
    y, x = offsets[0][:, None], offsets[1][None]
    angle = rng.uniform(0, 2 * math.pi)
    return (window[0], window[1]), shape(
        math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    )


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Brightness (h, w, 1) about 1, coarse and fine structures together."""
    total = np.ones(size, dtype=np.float32)
    for cells in (3, 9, 27):
        grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        total += 0.4 * (np.asarray(grid.resize(size[::-1], Image.Resampling.BICUBIC)) - 0.5)
    return total[..., None]


def _annotation(instance: Instance, number: int, image_id: int, size: tuple[int, int]) -> dict[str, Any]:
    x0, y0, x1, y1 = instance.patch.box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": instance.label,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(np.count_nonzero(instance.patch.bits)),
        "iscrowd": 0,
        "segmentation": encode(instance.patch, size),
    }
