"""Generated scenes: small creatures and plants on varied ground, in COCO's format, as many as wanted.

A scene is a function of (seed, index, size). Any class comes in any colour, so that shape and pattern have to be looked
at; scenes range from one flower on plain sand to a crowd under bad light with look-alikes in between.
"""

import colorsys
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from sievit.config import ConfigError
from sievit.data.masks import Patch, encode, tight_patch
from sievit.data.shapes import CLASSES, CLUTTER, SHAPES, Pattern, Silhouette, Traits
from sievit.files import write_atomically

VERSION = 1
"""Of the drawing: scenes of different versions differ."""

LEAST_VISIBLE = 0.45
"""No object is covered so far that a smaller share of it can be seen."""


@dataclass(frozen=True)
class Instance:
    """One object of a scene: its label (1-based, of `CLASSES`) and the pixels of it that can be seen."""

    label: int
    patch: Patch


@dataclass(frozen=True)
class Conditions:
    """How hard a scene is made; every share is 0..1."""

    coverage: float
    most_objects: int
    radius: float
    spread: float
    clutter: int
    camouflage: float
    roughness: float
    overlap: bool
    gradient: float
    brightness: float
    noise: float
    blur: float

    @classmethod
    def draw(cls, rng: np.random.Generator, size: tuple[int, int]) -> "Conditions":
        scale = math.sqrt(size[0] * size[1]) / 256
        density = rng.choice(4, p=(0.05, 0.35, 0.4, 0.2))  # empty, few, some, crowded
        coverage = (0.0, rng.uniform(0.02, 0.08), rng.uniform(0.06, 0.22), rng.uniform(0.25, 0.55))[density]
        hard = rng.beta(1.1, 1.3)
        return cls(
            coverage=float(coverage),
            most_objects=int((0, 5, 18, 60)[density] * max(1.0, scale)),
            radius=float(math.exp(rng.uniform(math.log(9), math.log(30))) * math.sqrt(scale)),
            spread=float(rng.uniform(0.1, 0.6)),
            clutter=int(rng.poisson(10 * hard) * max(1.0, scale)),
            camouflage=float(hard * rng.uniform(0, 0.75)),
            roughness=float(rng.uniform(0.02, 0.1) + 0.16 * hard * rng.random()),
            overlap=bool(rng.random() < 0.25 + 0.65 * (density == 3)),
            gradient=float(rng.uniform(0, 0.7) * rng.random()),
            brightness=float(rng.uniform(0.65, 1.15)),
            noise=float(max(0.0, rng.normal(0.012, 0.025))),
            blur=float(max(0.0, rng.normal(-0.4, 0.8))),
        )


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
    _check(size, seed)
    rng = np.random.default_rng([VERSION, seed, index])
    conditions = Conditions.draw(rng, size)
    canvas = _Canvas(rng, size, conditions)
    _scatter(canvas, rng, conditions)
    return canvas.finish(rng, conditions)


def generate(
    out: Path,
    *,
    num_images: int,
    size: tuple[int, int] = (256, 256),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write scenes as a COCO data set: images/*.png, labels/*.png (semantic), annotations.json.

    Files come under their names only when they are complete, annotations.json last. A folder that holds these very
    scenes already is left as it is.

    Args:
        out: the folder, made if need be.
        num_images: how many, from index 0.
        size: (height, width) in pixels.
        seed: of the series.
        progress: is called with (done, all) after every image.

    Raises:
        ConfigError: the folder holds another data set, or a number makes no sense.
    """
    _check(size, seed)
    if num_images < 1:
        raise ConfigError(f"num_images is at least 1, not {num_images}")
    out, annotations = Path(out), Path(out) / "annotations.json"
    info = {"description": "sievit scenes", "version": VERSION, "seed": seed, "size": list(size), "images": num_images}
    if annotations.exists():
        if _info(annotations) == info:
            return
        raise ConfigError(f"{annotations}: holds another data set; choose another folder, or remove this one")
    for folder in ("images", "labels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "info": info,
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    for index in range(num_images):
        image, instances, labels = draw(seed=seed, index=index, size=size)
        name = f"{index:06d}.png"
        write_atomically(out / "images" / name, _png(image))
        write_atomically(out / "labels" / name, _png(labels))
        content["images"].append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
        for instance in instances:
            content["annotations"].append(_annotation(instance, len(content["annotations"]) + 1, index + 1, size))
        if progress is not None:
            progress(index + 1, num_images)
    write_atomically(annotations, json.dumps(content).encode())


class _Canvas:
    """A picture in the making: colours, and which object each pixel shows."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], conditions: Conditions) -> None:
        self.size = size
        self.grain = _noise(rng, size, octaves=4)
        self.ground = _colour(rng, saturation=(0.1, 0.55), value=(0.35, 0.8))
        self.pixels = _ground(rng, size, self.ground, self.grain, conditions.roughness)
        self.ids = np.zeros(size, dtype=np.int32)
        self.labels = [0]
        self.full = [0]  # pixels of each object before others cover it
        angle = rng.uniform(0, 2 * math.pi)
        self.light = np.array([math.sin(angle), math.cos(angle)], dtype=np.float32)

    def place(self, thing: "_Thing", *, label: int, overlap: bool) -> int:
        """Put a thing on top; label 0 is clutter. Returns the pixels it covers, 0 if there is no room for it."""
        window, u, v, dy, dx = thing.grid(self.size)
        if u.size == 0:
            return 0
        distance = thing.silhouette(u, v, thing.traits) * thing.radius
        alpha = np.clip(0.5 - distance, 0, 1)
        solid = alpha > 0.5
        covered = int(np.count_nonzero(solid))
        if covered < 0.3 * thing.radius**2 * (label > 0) or not self._room(window, solid, overlap):
            return 0
        self._shadow(window, distance, thing.radius)
        second, light = thing.pattern(u, v, thing.traits)
        colours = thing.colour + second[..., None] * (thing.second - thing.colour)
        light = light * (1 + 0.22 * (dy * self.light[0] + dx * self.light[1]))
        colours = colours * (light * (0.9 + 0.2 * self.grain[window]))[..., None]
        view = self.pixels[window]
        view += alpha[..., None] * (colours - view)
        if label:
            self.labels.append(label)
            self.full.append(covered)
            self.ids[window][solid] = len(self.labels) - 1
        else:
            self.ids[window][solid] = 0
        return covered

    def finish(self, rng: np.random.Generator, conditions: Conditions) -> tuple[np.ndarray, list[Instance], np.ndarray]:
        image = _expose(rng, self.pixels, conditions)
        instances = []
        for number, label in enumerate(self.labels):
            if label:
                instances.append(Instance(label, tight_patch(self.ids == number)))
        return image, instances, np.array(self.labels, dtype=np.uint8)[self.ids]

    def _room(self, window: tuple[slice, slice], solid: np.ndarray, overlap: bool) -> bool:
        """Whether all objects stay visible enough."""
        below = self.ids[window][solid]
        if not below.any():
            return True
        if not overlap:
            return False
        hidden = np.bincount(below)
        for number in np.flatnonzero(hidden):
            if number and self._visible(number) - hidden[number] < LEAST_VISIBLE * self.full[number]:
                return False
        return True

    def _visible(self, number: int) -> int:
        return int(np.count_nonzero(self.ids == number))

    def _shadow(self, window: tuple[slice, slice], distance: np.ndarray, radius: float) -> None:
        """Darken the ground on the far side of the light."""
        soft = 1.5 + 0.18 * radius
        shade = np.clip(0.5 - distance / (2 * soft), 0, 1) * 0.5
        shift = -np.round(self.light * (0.5 + 0.16 * radius)).astype(int)
        rows, cols = (
            slice(max(0, s.start + d), max(0, min(n, s.stop + d)))
            for s, d, n in zip(window, shift, self.size, strict=True)
        )
        inner = tuple(
            slice(s.start - d - w.start, s.stop - d - w.start)
            for s, d, w in zip((rows, cols), shift, window, strict=True)
        )
        self.pixels[rows, cols] *= (1 - shade[inner])[..., None]


@dataclass(frozen=True)
class _Thing:
    """Something to be placed: its centre (y, x), radius in pixels, heading, colours and kind."""

    y: float
    x: float
    radius: float
    heading: float
    colour: np.ndarray
    second: np.ndarray
    silhouette: Silhouette
    pattern: Pattern
    traits: Traits

    def grid(self, size: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The window that it may touch, its own coordinates (u, v) there, and the offsets (dy, dx) in radii."""
        reach = 1.45 * self.radius + 2
        window = tuple(
            slice(max(0, min(n, int(c - reach))), max(0, min(n, int(c + reach) + 1)))
            for c, n in zip((self.y, self.x), size, strict=True)
        )
        dy = ((np.arange(window[0].start, window[0].stop, dtype=np.float32) + 0.5 - self.y) / self.radius)[:, None]
        dx = ((np.arange(window[1].start, window[1].stop, dtype=np.float32) + 0.5 - self.x) / self.radius)[None, :]
        cos, sin = np.float32(math.cos(self.heading)), np.float32(math.sin(self.heading))
        return (window[0], window[1]), cos * dx + sin * dy, cos * dy - sin * dx, dy, dx


def _scatter(canvas: _Canvas, rng: np.random.Generator, conditions: Conditions) -> None:
    """Objects and clutter, one over the other, until the wanted share is covered."""
    height, width = canvas.size
    clutter = conditions.clutter
    covered, objects, tries = 0, 0, 0
    while covered < conditions.coverage * height * width and objects < conditions.most_objects:
        tries += 1
        if tries > 4 * conditions.most_objects + 8:
            break
        if clutter and rng.random() < 0.5:
            clutter -= 1
            canvas.place(_clutter(canvas, rng, conditions), label=0, overlap=True)
        label = int(rng.integers(1, len(CLASSES) + 1))
        pixels = canvas.place(_object(canvas, rng, conditions, label), label=label, overlap=conditions.overlap)
        covered, objects = covered + pixels, objects + (pixels > 0)
    for _ in range(clutter):
        canvas.place(_clutter(canvas, rng, conditions), label=0, overlap=conditions.overlap)


def _object(canvas: _Canvas, rng: np.random.Generator, conditions: Conditions, label: int) -> _Thing:
    silhouette, pattern = SHAPES[CLASSES[label - 1]]
    return _thing(canvas, rng, conditions, silhouette, pattern)


def _clutter(canvas: _Canvas, rng: np.random.Generator, conditions: Conditions) -> _Thing:
    silhouette, pattern = list(CLUTTER.values())[rng.integers(len(CLUTTER))]
    thing = _thing(canvas, rng, conditions, silhouette, pattern)
    return replace(thing, radius=thing.radius * float(rng.uniform(0.4, 1.3)))


def _thing(
    canvas: _Canvas, rng: np.random.Generator, conditions: Conditions, silhouette: Silhouette, pattern: Pattern
) -> _Thing:
    height, width = canvas.size
    colour = _colour(rng, saturation=(0.25, 0.9), value=(0.45, 1.0))
    colour = colour + conditions.camouflage * (canvas.ground - colour)
    return _Thing(
        y=float(rng.uniform(0, height)),
        x=float(rng.uniform(0, width)),
        radius=float(
            np.clip(conditions.radius * math.exp(rng.normal(0, conditions.spread)), 6, 0.3 * min(height, width))
        ),
        heading=float(rng.uniform(0, 2 * math.pi)),
        colour=colour,
        second=_second(rng, colour),
        silhouette=silhouette,
        pattern=pattern,
        traits=Traits.draw(rng),
    )


def _colour(rng: np.random.Generator, *, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return np.array(rgb, dtype=np.float32)


def _second(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """The colour of a pattern: clearly darker, or clearly lighter than a dark one."""
    if colour.mean() > 0.35 and rng.random() < 0.75:
        return colour * np.float32(rng.uniform(0.12, 0.4))
    return colour + np.float32(rng.uniform(0.45, 0.75)) * (1 - colour)


def _noise(rng: np.random.Generator, size: tuple[int, int], *, octaves: int) -> np.ndarray:
    """Smooth noise (h, w), float32, mostly 0..1 about 0.5."""
    total = np.zeros(size, dtype=np.float32)
    for octave in range(octaves):
        cell = max(2, min(size) // (3 * 4**octave))
        grid = rng.random((size[0] // cell + 3, size[1] // cell + 3), dtype=np.float32)
        shape = (grid.shape[1] * cell, grid.shape[0] * cell)
        layer = np.asarray(Image.fromarray(grid).resize(shape, Image.Resampling.BICUBIC))
        total += (layer[cell : cell + size[0], cell : cell + size[1]] - 0.5) * 0.75**octave
    return total * 0.8 + 0.5


def _ground(
    rng: np.random.Generator, size: tuple[int, int], colour: np.ndarray, grain: np.ndarray, roughness: float
) -> np.ndarray:
    """Sand, soil, grass or planks: (h, w, 3) float32."""
    kind = rng.choice(4, p=(0.35, 0.3, 0.2, 0.15))
    height = np.zeros(size, dtype=np.float32)
    if kind == 1:  # soil: lumps with hard edges
        height += np.clip((_noise(rng, size, octaves=3) - 0.5) * 5, -1, 1) * 0.6
    if kind in (2, 3):
        angle = rng.uniform(0, math.pi)
        y = np.arange(size[0], dtype=np.float32)[:, None]
        x = np.arange(size[1], dtype=np.float32)[None, :]
        along = math.cos(angle) * x + math.sin(angle) * y
        if kind == 2:  # grass: wavy blades
            height += np.sin(along * rng.uniform(0.5, 1.1) + 9 * grain) * 0.7
        else:  # planks: gaps at a regular distance, fibres between
            pitch = rng.uniform(24, 70)
            gap = np.abs((along / pitch) % 1 - 0.5)
            height += 0.5 * np.sin(along * 0.8 + 6 * grain) - 4 * np.clip(gap - 0.47, 0, 0.03) / 0.03
    height += 2 * (grain - 0.5) + rng.normal(0, 0.35, size).astype(np.float32)
    tint = _colour(rng, saturation=(0.1, 0.6), value=(0.3, 0.9))
    mixed = colour + np.float32(0.35) * np.clip(grain - 0.45, 0, 1)[..., None] * (tint - colour)
    return mixed * (1 + np.float32(roughness * 1.6) * height)[..., None]


def _expose(rng: np.random.Generator, pixels: np.ndarray, conditions: Conditions) -> np.ndarray:
    """Light, lens and sensor: uint8 (h, w, 3)."""
    height, width = pixels.shape[:2]
    angle = rng.uniform(0, 2 * math.pi)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    light = 1 + conditions.gradient * (math.cos(angle) * x + math.sin(angle) * y) * 0.7
    light = light - 0.35 * conditions.gradient * (x * x + y * y) * 0.5
    out = pixels * (light * conditions.brightness)[..., None]
    if conditions.blur > 0.3:
        blurred = Image.fromarray((out.clip(0, 1) * 255).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(conditions.blur)
        )
        out = np.asarray(blurred, dtype=np.float32) / 255
    if conditions.noise:
        out = out + rng.standard_normal(out.shape, dtype=np.float32) * np.float32(conditions.noise)
    return (out.clip(0, 1) * 255 + 0.5).astype(np.uint8)


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


def _check(size: tuple[int, int], seed: int) -> None:
    if min(size) < 16:
        raise ConfigError(f"scenes are at least 16 pixels high and wide, not {size[0]}x{size[1]}")
    if seed < 0:
        raise ConfigError(f"the seed of scenes is at least 0, not {seed}")


def _info(annotations: Path) -> Any:
    try:
        return json.loads(annotations.read_text(encoding="utf-8")).get("info")
    except (ValueError, AttributeError):
        return None


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()
