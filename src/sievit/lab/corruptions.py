"""Pictures that went wrong: the fifteen corruptions of ImageNet-C (arXiv 1903.12261) at two of their severities.

After the paper's description, with its constants; frost, for which the paper pastes photographs of ice, is drawn.
A corruption takes (h, w, 3) float64 in 0..1 and a random generator, and returns the same. Constants that are lengths in
pixels are for images of 224 pixels, and grow with the short edge.
"""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sievit.data.dataset import Target, Transform, plain

Picture = np.ndarray
Corruption = Callable[[Picture, np.random.Generator], Picture]
SEVERITIES = (3, 5)


def _scale(x: Picture) -> float:
    return min(x.shape[:2]) / 224


def _gaussian_noise(x: Picture, rng: np.random.Generator, deviation: float) -> Picture:
    return x + rng.normal(0, deviation, x.shape)


def _shot_noise(x: Picture, rng: np.random.Generator, photons: float) -> Picture:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Picture, rng: np.random.Generator, share: float) -> Picture:
    drawn = rng.random(x.shape)
    return np.where(drawn < share / 2, 0.0, np.where(drawn < share, 1.0, x))


def _disk(radius: float, blur: float) -> Picture:
    reach = int(np.ceil(radius)) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = _blurred((y**2 + x**2 <= radius**2).astype(float)[..., None], blur)[..., 0]
    return disk / disk.sum()


def _blurred(x: Picture, deviation: float) -> Picture:
    """By a Gaussian."""
    along = np.arange(-int(np.ceil(3 * deviation)), int(np.ceil(3 * deviation)) + 1)
    kernel = np.exp(-(along**2) / (2 * deviation**2))
    return _filtered(x, np.outer(kernel, kernel) / kernel.sum() ** 2)


def _filtered(x: Picture, kernel: Picture) -> Picture:
    """Convolved by Fourier transform, with the edge of the picture repeated."""
    reach = max(kernel.shape) // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect" if reach < min(x.shape[:2]) else "edge")
    shape = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, shape)[..., None]
    whole = np.fft.irfft2(spectrum, shape, axes=(0, 1))
    top, left = (reach + edge // 2 for edge in kernel.shape)
    return whole[top : top + x.shape[0], left : left + x.shape[1]]


def _defocus_blur(x: Picture, rng: np.random.Generator, radius: float, blur: float) -> Picture:
    return _filtered(x, _disk(radius * _scale(x), blur * _scale(x)))


def _glass_blur(x: Picture, rng: np.random.Generator, blur: float, reach: int, rounds: int) -> Picture:
    factor = _scale(x)
    x, far = _blurred(x, blur * factor), max(1, round(reach * factor))
    index = np.indices(x.shape[:2])
    for _ in range(rounds):
        moved = index + rng.integers(-far, far + 1, index.shape)
        y, z = (np.clip(each, 0, edge - 1) for each, edge in zip(moved, x.shape, strict=False))
        x = x[y, z]
    return _blurred(x, blur * factor)


def _motion_blur(x: Picture, rng: np.random.Generator, radius: float, deviation: float) -> Picture:
    return _filtered(x, _line(radius * _scale(x), deviation * _scale(x), rng.uniform(-45, 45)))


def _line(radius: float, deviation: float, angle: float) -> Picture:
    """A streak that starts in the middle and fades."""
    reach = int(np.ceil(radius))
    kernel, along = np.zeros((2 * reach + 1, 2 * reach + 1)), np.arange(0, reach + 0.25, 0.25)
    y = np.rint(reach + along * np.sin(np.radians(angle))).astype(int)
    z = np.rint(reach + along * np.cos(np.radians(angle))).astype(int)
    np.maximum.at(kernel, (y, z), np.exp(-(along**2) / (2 * deviation**2)))
    return kernel / kernel.sum()


def _zoom_blur(x: Picture, rng: np.random.Generator, most: float, step: float) -> Picture:
    height, width = x.shape[:2]
    picture, total = Image.fromarray(_bytes(x)), np.zeros_like(x)
    factors = np.arange(1, most, step)
    for factor in factors:
        dy, dz = (edge * (1 - 1 / factor) / 2 for edge in (height, width))
        box = (dz, dy, width - dz, height - dy)
        total += np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box)) / 255
    return (x + total) / (len(factors) + 1)


def _clouds(shape: tuple[int, int], rng: np.random.Generator, decay: float) -> Picture:
    """Fractal noise in 0..1: finer and finer noise, each `decay` times weaker than the one before."""
    total, size, weight = np.zeros(shape), 2, 1.0
    while size < max(shape):
        grid = Image.fromarray(rng.random((size, size)).astype(np.float32))
        total += weight * np.asarray(grid.resize(shape[::-1], Image.Resampling.BICUBIC))
        size, weight = size * 2, weight / decay
    return (total - total.min()) / np.ptp(total)


def _fog(x: Picture, rng: np.random.Generator, strength: float, decay: float) -> Picture:
    thick = strength * _clouds(x.shape[:2], rng, decay)[..., None]
    return (x + thick) * x.max() / (x.max() + strength)


def _snow(x: Picture, rng: np.random.Generator, mean: float, deviation: float, zoom: float, threshold: float,
          radius: float, blur: float, kept: float) -> Picture:  # fmt: skip
    height, width = x.shape[:2]
    small = (int(np.ceil(height / zoom)), int(np.ceil(width / zoom)))
    flakes = Image.fromarray(rng.normal(mean, deviation, small).astype(np.float32))
    layer = np.asarray(flakes.resize((width, height), Image.Resampling.BILINEAR)).astype(float)
    layer = np.clip(np.where(layer < threshold, 0, layer), 0, 1)[..., None]
    layer = _filtered(layer, _line(radius * _scale(x), blur * _scale(x), rng.uniform(-135, -45)))
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    x = kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5)
    return x + layer + np.rot90(layer, 2)


def _frost(x: Picture, rng: np.random.Generator, kept: float, ice: float) -> Picture:
    """Ice is thick in ridges of fractal noise, bluish white."""
    ridges = 1 - np.abs(2 * _clouds(x.shape[:2], rng, 1.6) - 1)
    thick = np.clip((ridges - 0.55) / 0.35, 0, 1)[..., None] * np.array([0.86, 0.93, 1.0])
    return kept * x + ice * thick


def _brightness(x: Picture, rng: np.random.Generator, added: float) -> Picture:
    """Of the value in HSV: the largest channel grows, hue and saturation stay."""
    value = x.max(2, keepdims=True)
    return np.where(value > 0, x * np.clip(value + added, 0, 1) / np.maximum(value, 1e-9), added)


def _contrast(x: Picture, rng: np.random.Generator, factor: float) -> Picture:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * factor + mean


def _elastic_transform(x: Picture, rng: np.random.Generator, far: float, smooth: float, affine: float) -> Picture:
    """Constants are shares of the short edge."""
    height, width = x.shape[:2]
    edge = min(height, width)
    matrix = np.eye(2) + rng.uniform(-affine, affine, (2, 2))
    index = np.indices((height, width)).astype(float)
    middle = np.array([height, width])[:, None, None] / 2
    places = np.einsum("ij,jhw->ihw", matrix, index - middle) + middle
    for axis in range(2):
        shift = _blurred(rng.uniform(-1, 1, (height, width, 1)), smooth * edge)[..., 0]
        places[axis] += shift * far * edge
    grid = np.stack([2 * places[1] / (width - 1) - 1, 2 * places[0] / (height - 1) - 1], axis=2)
    picture = torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None]
    moved = F.grid_sample(picture, torch.from_numpy(grid)[None], padding_mode="reflection", align_corners=True)
    return moved[0].permute(1, 2, 0).numpy()


def _pixelate(x: Picture, rng: np.random.Generator, share: float) -> Picture:
    height, width = x.shape[:2]
    picture = Image.fromarray(_bytes(x))
    small = picture.resize((max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def _jpeg(x: Picture, rng: np.random.Generator, quality: int) -> Picture:
    buffer = BytesIO()
    Image.fromarray(_bytes(x)).save(buffer, format="jpeg", quality=quality)
    return np.asarray(Image.open(buffer)) / 255


def _bytes(x: Picture) -> Picture:
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


CORRUPTIONS: dict[str, tuple[Callable[..., Picture], tuple[tuple, tuple]]] = {
    "gaussian_noise": (_gaussian_noise, ((0.18,), (0.38,))),
    "shot_noise": (_shot_noise, ((12,), (3,))),
    "impulse_noise": (_impulse_noise, ((0.09,), (0.27,))),
    "defocus_blur": (_defocus_blur, ((6, 0.5), (10, 0.5))),
    "glass_blur": (_glass_blur, ((1.0, 2, 3), (1.5, 4, 2))),
    "motion_blur": (_motion_blur, ((15, 8), (20, 15))),
    "zoom_blur": (_zoom_blur, ((1.21, 0.02), (1.33, 0.03))),
    "snow": (_snow, ((0.55, 0.3, 4, 0.9, 12, 8, 0.7), (0.55, 0.3, 4.5, 0.85, 12, 12, 0.55))),
    "frost": (_frost, ((0.7, 0.7), (0.6, 0.75))),
    "fog": (_fog, ((2.5, 1.7), (3.0, 1.4))),
    "brightness": (_brightness, ((0.3,), (0.5,))),
    "contrast": (_contrast, ((0.2,), (0.05,))),
    "elastic_transform": (_elastic_transform, ((0.05, 0.01, 0.02), (0.12, 0.01, 0.02))),
    "pixelate": (_pixelate, ((0.4,), (0.25,))),
    "jpeg_compression": (_jpeg, ((15,), (7,))),
}
"""The call and its constants at each of `SEVERITIES`."""


def corrupting(name: str, severity: int) -> Transform:
    """A transform for a data set: corrupted images with their targets as they are."""
    call = corruption(name, severity)

    def transform(image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        changed = call(image.permute(1, 2, 0).numpy() / 255.0, rng)
        return torch.from_numpy(changed).permute(2, 0, 1).float(), plain(target)

    return transform


def corruption(name: str, severity: int) -> Corruption:
    """The corruption of this name and severity, whose results are in 0..1."""
    call, constants = CORRUPTIONS[name]
    values = constants[SEVERITIES.index(severity)]
    return lambda x, rng: np.clip(call(x, rng, *values), 0, 1)
