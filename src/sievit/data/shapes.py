"""The things in generated scenes, drawn as functions of coordinates: a silhouette and a pattern for each.

Coordinates are those of the thing: (u, v) arrays of one shape, u pointing forward, the body within about one unit of
the origin. A silhouette is a distance in those units, negative inside. A pattern is a pair: how much of the second
colour (0..1) and a factor on the brightness. Two of the classes share their silhouette and differ in their pattern
alone, and clutter borrows silhouettes without the pattern.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Silhouette = Callable[[Array, Array, "Traits"], Array]
Pattern = Callable[[Array, Array, "Traits"], tuple[Array, Array]]

CLASSES = ("ladybird", "beetle", "leaf", "flower", "snail")


@dataclass(frozen=True)
class Traits:
    """What makes one thing differ from others of its kind."""

    slender: float
    count: int
    phase: float
    bend: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Traits":
        return cls(
            slender=float(rng.uniform(0.0, 1.0)),
            count=int(rng.integers(0, 4)),
            phase=float(rng.uniform(0.0, 1.0)),
            bend=float(rng.uniform(-1.0, 1.0)),
        )


def _bug(u: Array, v: Array, t: Traits) -> Array:
    width = 0.78 - 0.16 * t.slender
    body = (np.hypot((u + 0.12) / 0.88, v / width) - 1) * width
    head = np.hypot((u - 0.78) / 0.24, v / (0.5 * width)) * 0.22 - 0.22
    side = np.abs(v)
    leg = np.abs((u + 0.1 - 0.25 * (side - 0.6) * np.sign(u + 0.1) + 0.275) % 0.55 - 0.275) - 0.045
    leg = np.maximum(np.maximum(leg, side - width - 0.2), np.abs(u + 0.1) - 0.68)
    return np.minimum(np.minimum(body, head), leg)


def _bug_parts(u: Array, v: Array, t: Traits) -> tuple[Array, Array]:
    """Where the dark head and legs are, and the gloss of the back."""
    width = 0.78 - 0.16 * t.slender
    back = np.hypot((u + 0.12) / 0.88, v / width)
    dark = ((u > 0.52) | (back > 0.98)).astype(np.float32)
    light = 1.15 - 0.5 * back * back
    light *= 1 - 0.45 * np.exp(-((v / 0.035) ** 2))  # the seam between the wings
    return dark, light


def _ladybird_pattern(u: Array, v: Array, t: Traits) -> tuple[Array, Array]:
    dark, light = _bug_parts(u, v, t)
    pitch = 0.52 - 0.05 * t.count
    column = np.floor(u / pitch + t.phase)
    du = (u / pitch + t.phase) % 1 - 0.5
    dv = (np.abs(v) / pitch + 0.5 * (column % 2)) % 1 - 0.5
    spots = np.clip((0.3 - np.hypot(du, dv)) * 12, 0, 1)
    return np.maximum(spots, dark), light


def _beetle_pattern(u: Array, v: Array, t: Traits) -> tuple[Array, Array]:
    dark, light = _bug_parts(u, v, t)
    stripes = np.sin((u + 0.25 * t.bend * np.abs(v)) * (8 + 2 * t.count) + 6.3 * t.phase)
    return np.maximum(np.clip(stripes * 4 + 0.5, 0, 1), dark), light


def _leaf(u: Array, v: Array, t: Traits) -> Array:
    v = v - 0.22 * t.bend * (u * u - 0.4)
    height = 0.32 + 0.2 * t.slender
    radius = (1 + height * height) / (2 * height)
    blade = np.hypot(u, np.abs(v) + radius - height) - radius
    blade = blade + 0.025 * np.sin(u * (14 + 4 * t.count)) * (t.count > 0)
    stem = np.maximum(np.abs(v) - 0.035, np.abs(u + 1.05) - 0.2)
    return np.minimum(blade, stem)


def _leaf_pattern(u: Array, v: Array, t: Traits) -> tuple[Array, Array]:
    v = v - 0.22 * t.bend * (u * u - 0.4)
    side = np.abs(v)
    rib = np.clip((0.035 - side) * 40, 0, 1)
    veins = np.clip((0.16 - np.abs((u - 0.7 * side) * (4 + t.count) % 1 - 0.5)) * 9, 0, 1) * 0.75
    return np.maximum(rib, veins), 0.92 + 0.35 * v * np.sign(t.bend)


def _flower(u: Array, v: Array, t: Traits) -> Array:
    petals = 5 + t.count
    rho, theta = np.hypot(u, v), np.arctan2(v, u)
    wave = np.abs(np.cos(theta * petals / 2)) ** (0.5 + 0.5 * t.slender)
    return (rho - (0.5 + 0.5 * wave)) * 0.75


def _flower_pattern(u: Array, v: Array, t: Traits) -> tuple[Array, Array]:
    petals = 5 + t.count
    rho, theta = np.hypot(u, v), np.arctan2(v, u)
    centre = np.clip((0.3 - rho) * 15, 0, 1)
    gaps = 1 - 0.45 * np.exp(-((np.cos(theta * petals / 2) / 0.22) ** 2)) * (rho > 0.3)
    dots = 1 - 0.3 * centre * (np.sin(u * 30) * np.sin(v * 30) > 0)
    return centre, (0.72 + 0.38 * rho) * gaps * dots


def _snail(u: Array, v: Array, t: Traits) -> Array:
    shell = np.hypot(u + 0.1, v - 0.1) - 0.72
    foot = np.hypot(u - np.clip(u, -0.8, 0.8), v + 0.55 - 0.12 * u) - 0.17
    horn = np.maximum(np.abs(u - 0.86 - 0.25 * (v + 0.3)) - 0.045, np.abs(v + 0.28) - 0.27)
    return np.minimum(np.minimum(shell, foot), horn)


def _snail_pattern(u: Array, v: Array, t: Traits) -> tuple[Array, Array]:
    rho = np.hypot(u + 0.1, v - 0.1)
    theta = np.arctan2(v - 0.1, u + 0.1)
    sense = 1 if t.bend > 0 else -1
    spiral = np.cos(sense * theta + 6.3 * (1.5 + 0.4 * t.count) * np.sqrt(rho + 0.02) + 6.3 * t.phase)
    shell = rho < 0.72
    return np.where(shell, np.clip(spiral * 3 + 0.3, 0, 1), 0.35), np.where(shell, 1.12 - 0.45 * rho * rho, 0.8)


def _pebble(u: Array, v: Array, t: Traits) -> Array:
    theta = np.arctan2(v, u)
    width = 0.6 + 0.35 * t.slender
    wobble = 1 + 0.07 * np.sin(2 * theta + 6.3 * t.phase) + 0.05 * np.sin(3 * theta + 4 * t.bend)
    return (np.hypot(u, v / width) / wobble - 1) * width


def _pebble_pattern(u: Array, v: Array, t: Traits) -> tuple[Array, Array]:
    return np.zeros_like(u), 1.1 - 0.4 * (u * u + v * v)


def _petal(u: Array, v: Array, t: Traits) -> Array:
    return _leaf(u, v, Traits(t.slender, 0, t.phase, t.bend))


def _plain(u: Array, v: Array, t: Traits) -> tuple[Array, Array]:
    return np.zeros_like(u), 0.85 + 0.2 * u


def _twig(u: Array, v: Array, t: Traits) -> Array:
    v = v - 0.18 * t.bend * np.sin(2.4 * u + 6.3 * t.phase)
    main = np.maximum(np.abs(v) - 0.05, np.abs(u) - 1.0)
    at = 0.6 * t.slender - 0.3
    side = np.maximum(np.abs(v - (u - at) * 0.8) - 0.04, np.abs(u - at - 0.2) - 0.2)
    return np.minimum(main, side) if t.count else main


def _bark(u: Array, v: Array, t: Traits) -> tuple[Array, Array]:
    return np.zeros_like(u), 0.85 + 0.15 * np.sin(u * 37 + v * 60)


def _berry(u: Array, v: Array, t: Traits) -> Array:
    return np.hypot(u, v) - 0.8


SHAPES: dict[str, tuple[Silhouette, Pattern]] = {
    "ladybird": (_bug, _ladybird_pattern),
    "beetle": (_bug, _beetle_pattern),
    "leaf": (_leaf, _leaf_pattern),
    "flower": (_flower, _flower_pattern),
    "snail": (_snail, _snail_pattern),
}
CLUTTER: dict[str, tuple[Silhouette, Pattern]] = {
    "pebble": (_pebble, _pebble_pattern),
    "petal": (_petal, _plain),
    "twig": (_twig, _bark),
    "berry": (_berry, _pebble_pattern),
}
