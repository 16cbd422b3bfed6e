"""Augmentation for detection: a view of the image, and light photometric jitter.

All geometry of one draw (resize, crop, resize again, flips, quarter turns) is one `View`: a rectangle of the source,
the size it gets, and a symmetry. The image is cropped before it is resized, and masks are rendered in the view alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area

from sievit.config import Config, ConfigError, Count, NonNegative, Positive, Share
from sievit.data.dataset import Target
from sievit.data.masks import Masks

Rect = tuple[int, int, int, int]
"""y, x, height, width in pixels."""

TRIES = 10
"""Crops that are looked at for one that shows enough; the next is taken as it is."""


@dataclass(frozen=True, kw_only=True)
class ViewConfig(Config):
    """What may happen to a training image of any task. Sizes are pixels, (height, width); probabilities are 0..1.

    The image is first scaled, by `scales` (short edge, the papers' multi-scale) or by `zoom` (a factor on the pixels,
    for microscopes whose scale means something), then cropped to `crop` at random. An image smaller than the crop stays
    smaller.
    """

    flip: Share = 0.5
    vertical_flip: Share = 0.0
    rot90: bool = False
    scales: tuple[Count, ...] = ()
    max_size: Count | None = None
    zoom: tuple[Positive, Positive] | None = None
    crop: tuple[Count, Count] | None = None
    brightness: NonNegative = 0.0
    """Added, up to this share of the range."""
    contrast: NonNegative = 0.0
    """Factor about the image's mean, in 1 - contrast .. 1 + contrast."""
    saturation: NonNegative = 0.0
    """Factor on the distance to grey, in 1 - saturation .. 1 + saturation."""
    gamma: NonNegative = 0.0
    """Exponent in exp(-gamma) .. exp(gamma)."""
    invert: Share = 0.0
    """Probability of the negative: stained tissue is dark on bright, fluorescence bright on dark."""
    noise: NonNegative = 0.0
    """Largest standard deviation of Gaussian noise, as a share of the range."""

    def __post_init__(self) -> None:
        if self.scales and self.zoom:
            raise ConfigError("augmentation: scales and zoom both set the size of the image; use one of them")
        if self.zoom and self.zoom[0] > self.zoom[1]:
            raise ConfigError(f"augmentation: zoom is (smallest, largest) factor, not {self.zoom}")

    def first_rect(self, size: tuple[int, int], chance: float, generator: torch.Generator) -> Rect:
        """What of an image of `size` is looked at, before it is scaled; `chance` is a random number of 0..1."""
        return 0, 0, *size

    def scaled(self, size: tuple[int, int], generator: torch.Generator) -> tuple[int, int]:
        """The size that a rectangle of `size` is scaled to."""
        if self.scales:
            return _scaled(size, _choice(self.scales, generator), self.max_size)
        if self.zoom:
            factor = self.zoom[0] * (self.zoom[1] / self.zoom[0]) ** float(torch.rand((), generator=generator))
            return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
        return size


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(ViewConfig):
    """What may happen to a training image and its objects.

    With probability `crop_first` the image is first cropped as in DETR: scaled to a short edge of `crop_first_scales`,
    cropped to a random size of `crop_first_range`; then all that `ViewConfig` says.

    An object of which less than `min_visible` is left by a crop is dropped (the share of its box, or of the crop if
    that is smaller), also one of which a side is left shorter than `min_side`.
    """

    crop_first: Share = 0.0
    crop_first_scales: tuple[Count, ...] = (400, 500, 600)
    crop_first_range: tuple[Count, Count] = (384, 600)
    min_visible: Share = 0.1
    min_side: NonNegative = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_first and not self.scales:
            raise ConfigError("augmentation: crop_first scales the crop by scales; give them too")

    @classmethod
    def paper(cls) -> "AugmentConfig":
        """ViT-Adapter's 3x recipe, which SViT's detectors are trained with: flip, multi-scale, DETR's crops."""
        return cls(scales=tuple(range(480, 801, 32)), max_size=1333, crop_first=0.5)

    def first_rect(self, size: tuple[int, int], chance: float, generator: torch.Generator) -> Rect:
        whole = super().first_rect(size, chance, generator)
        if chance >= self.crop_first:
            return whole
        shape = _scaled(size, _choice(self.crop_first_scales, generator), None)
        low, high = self.crop_first_range
        crop = tuple(_between(min(edge, low), min(edge, high), generator) for edge in shape)
        return random_rect(whole, shape, (crop[0], crop[1]), generator)


@dataclass(frozen=True)
class View:
    """The rectangle of the source, scaled to `size`, mirrored, then transposed if `transpose`."""

    rect: Rect
    size: tuple[int, int]
    flip: bool = False
    vertical_flip: bool = False
    transpose: bool = False

    def image(self, image: Tensor) -> Tensor:
        """From a uint8 source (3, H, W), uint8."""
        y, x, h, w = self.rect
        out = image[:, y : y + h, x : x + w]
        if self.size != (h, w):
            out = _resized(out, self.size)
        mirrored = [axis for axis, on in ((1, self.vertical_flip), (2, self.flip)) if on]
        out = out.flip(mirrored) if mirrored else out
        return out.transpose(1, 2) if self.transpose else out

    def boxes(self, boxes: Tensor) -> Tensor:
        """xyxy pixels of the source to those of the view, clipped to it."""
        y, x, h, w = self.rect
        height, width = self.size
        boxes = boxes - boxes.new_tensor([x, y, x, y])
        boxes[:, 0::2].clamp_(0, w)
        boxes[:, 1::2].clamp_(0, h)
        x0, x1 = (boxes[:, 0::2] * (width / w)).clamp_(max=width).unbind(1)  # rounding may exceed the edge
        y0, y1 = (boxes[:, 1::2] * (height / h)).clamp_(max=height).unbind(1)
        if self.flip:
            x0, x1 = width - x1, width - x0
        if self.vertical_flip:
            y0, y1 = height - y1, height - y0
        return torch.stack([y0, x0, y1, x1] if self.transpose else [x0, y0, x1, y1], dim=1)

    def masks(self, masks: Masks) -> Tensor:
        """Dense (k, height, width) uint8; scaled by nearest neighbour."""
        out = masks.render(*self._indices())
        return out.transpose(1, 2).contiguous() if self.transpose else out

    def labels(self, labels: Tensor) -> Tensor:
        """From a label of every pixel of the source (H, W), those of the view; scaled by nearest neighbour."""
        rows, cols = (torch.from_numpy(index.copy()) for index in self._indices())
        out = labels.index_select(0, rows).index_select(1, cols)
        return out.T.contiguous() if self.transpose else out

    def _indices(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the columns of the source under the pixels of the view, before it is transposed."""
        y, x, h, w = self.rect
        rows, cols = y + _centres(h, self.size[0]), x + _centres(w, self.size[1])
        return rows[::-1] if self.vertical_flip else rows, cols[::-1] if self.flip else cols


class Augment:
    """Draws a view and a jitter; deterministic given the generator."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """From a uint8 image (3, h, w) and its target (masks as `Masks` or dense) to a float image in 0..1 and a target
        with dense masks, without the objects that the view lost."""
        size = (image.shape[1], image.shape[2])
        view = draw_view(self.config, size, generator)
        target = apply_view(view, target, size, min_visible=self.config.min_visible, min_side=self.config.min_side)
        return jitter(self.config, view.image(image), generator), target


def draw_view(
    config: ViewConfig,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    accept: Callable[[Rect], bool] | None = None,
    pixel: tuple[int, int] | None = None,
) -> View:
    """A random view of an image of `size` (height, width).

    Args:
        pixel: (y, x) of the image, which a crop has to show.
        accept: whether a crop of the image is good enough; after `TRIES` that are not, the next is taken as it is.
    """
    chance = torch.rand(5, generator=generator).tolist()
    rect = config.first_rect(size, chance[0], generator)
    shape = config.scaled(rect[2:], generator)
    turn = int(chance[1] * 4) if config.rot90 else 0  # quarter turns
    transpose = turn in (1, 3)
    if config.crop:
        height, width = config.crop[::-1] if transpose else config.crop  # of the crop before it is turned
        crop, whole = (min(height, shape[0]), min(width, shape[1])), rect
        rect = random_rect(whole, shape, crop, generator, pixel=pixel)
        tries = TRIES if accept is not None and crop != shape else 0
        while tries and accept is not None and not accept(rect):
            rect, tries = random_rect(whole, shape, crop, generator, pixel=pixel), tries - 1
        shape = crop
    return View(
        rect=rect,
        size=shape,
        flip=(chance[2] < config.flip) != (turn in (1, 2)),
        vertical_flip=(chance[3] < config.vertical_flip) != (turn in (2, 3)),
        transpose=transpose,
    )


def apply_view(view: View, target: Target, size: tuple[int, int], *, min_visible: float, min_side: float) -> Target:
    """The target in the view. Objects that it cuts have the extents of what is left of their masks as boxes.

    Args:
        view: of a source of `size` (height, width).
        target: of the source; masks as `Masks` or dense (k, h, w).
        min_visible: objects of which a smaller share is left are dropped, see `AugmentConfig`.
        min_side: as are those of which a side is shorter, in pixels of the view.
    """
    boxes, rect = target["boxes"], view.rect
    shown = boxes.clone()
    shown[:, 0::2].clamp_(rect[1], rect[1] + rect[3])
    shown[:, 1::2].clamp_(rect[0], rect[0] + rect[2])
    full, left = box_area(boxes), box_area(shown)
    cut = (shown != boxes).any(1)
    boxes = view.boxes(boxes)
    keep = (left >= min_visible * full.clamp(max=rect[2] * rect[3])) & _big_enough(boxes, min_side)
    kept = keep.nonzero()[:, 0]
    scale = (view.size[0] * view.size[1]) / (rect[2] * rect[3])
    boxes, cut, area = boxes[kept], cut[kept], target["area"][kept] * (scale * left / full)[kept]
    out = {**target, "labels": target["labels"][kept], "iscrowd": target["iscrowd"][kept]}
    if "masks" in target:
        masks = target["masks"] if isinstance(target["masks"], Masks) else Masks.from_dense(target["masks"])
        assert masks.size == size, (masks.size, size)
        dense = view.masks(masks.select(kept.tolist()))
        area = torch.tensor([np.count_nonzero(mask) for mask in dense.numpy()], dtype=torch.float32)
        boxes[cut] = Masks.from_dense(dense[cut]).boxes
        ok = (area > 0) & _big_enough(boxes, min_side)
        if not bool(ok.all()):
            dense, boxes, area = dense[ok], boxes[ok], area[ok]
            out.update(labels=out["labels"][ok], iscrowd=out["iscrowd"][ok])
        out["masks"] = dense
    return {**out, "boxes": boxes, "area": area}


def jitter(config: ViewConfig, image: Tensor, generator: torch.Generator) -> Tensor:
    """A uint8 image (3, h, w) as float32 in 0..1, its light and colours varied."""
    draw = (torch.rand(5, generator=generator) * 2 - 1).tolist()
    if not (config.gamma or config.invert or config.brightness or config.contrast):
        out = image.float().div_(255)
    else:
        out = _levels(config, image, draw)[image.contiguous().int()]
    if config.saturation:
        grey = out.mean(0)
        out = torch.lerp(grey.expand_as(out), out, 1 + draw[4] * config.saturation)
    if config.noise:
        sigma = config.noise * float(torch.rand((), generator=generator))
        out += sigma * torch.randn(out.shape, generator=generator)
    return out.contiguous().clamp_(0, 1)


def _levels(config: ViewConfig, image: Tensor, draw: list[float]) -> Tensor:
    """What becomes of the 256 values of a uint8 image."""
    levels = torch.arange(256, dtype=torch.float32) / 255
    if config.gamma:
        levels = levels ** math.exp(draw[0] * config.gamma)
    if draw[1] * 0.5 + 0.5 < config.invert:
        levels = 1 - levels
    if config.brightness:
        levels = levels + draw[2] * config.brightness
    if config.contrast:
        mean = levels[image[:, ::4, ::4].int()].mean()
        levels = mean + (levels - mean) * (1 + draw[3] * config.contrast)
    return levels


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image (3, h, w) of another size."""
    pixel = size == (1, 1)  # of which torch's code for uint8 fails or reads the wrong bytes
    source = image[None].float() if pixel else image[None]
    out = F.interpolate(source, size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    return out.round().to(torch.uint8) if pixel else out


def _centres(source: int, target: int) -> np.ndarray:
    """For `target` pixels over `source` ones, the source pixel under the centre of each."""
    return ((2 * np.arange(target) + 1) * source) // (2 * target)


def _scaled(size: tuple[int, int], short: int, longest: int | None) -> tuple[int, int]:
    """`size` with its short edge at `short` pixels, unless the long one would exceed `longest`."""
    factor = short / min(size)
    if longest is not None:
        factor = min(factor, longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def random_rect(
    rect: Rect,
    shape: tuple[int, int],
    crop: tuple[int, int],
    generator: torch.Generator,
    *,
    pixel: tuple[int, int] | None = None,
) -> Rect:
    """Where in the source a random crop lies, if `rect` of the source is scaled to `shape` and cropped to `crop`; with
    a `pixel` (y, x) of `rect`, any place at which the crop holds it."""
    corner, sides = [], []
    for axis, (low, edge, scaled, cut) in enumerate(zip(rect[:2], rect[2:], shape, crop, strict=True)):
        side = min(edge, max(1, round(cut * edge / scaled)))
        first, last = low, low + edge - side
        if pixel is not None:
            first, last = max(first, pixel[axis] - side + 1), min(last, pixel[axis])
        corner.append(_between(first, last, generator))
        sides.append(side)
    return corner[0], corner[1], sides[0], sides[1]


def _between(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _choice(values: tuple[int, ...], generator: torch.Generator) -> int:
    return values[_between(0, len(values) - 1, generator)]


def _big_enough(boxes: Tensor, min_side: float) -> Tensor:
    sides = boxes[:, 2:] - boxes[:, :2]
    return ((sides > 0) & (sides >= min_side)).all(1)
