"""Augmentation for semantic segmentation: a view of image and labels, chosen by what it shows, and colours."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor
from torchvision.transforms.functional import adjust_hue

from sievit.config import ConfigError, Count, Positive, Share
from sievit.data.dataset import Target
from sievit.data.transforms import Rect, View, ViewConfig, draw_view, jitter

_LOOKED_AT = 128  # pixels along each side of a crop are enough to judge its classes

BRIGHTNESS = 32 / 255
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE = 36.0
"""Degrees. The papers' code turns by up to 18 of the 180 steps that 8-bit images have for the whole circle."""


@dataclass(frozen=True, kw_only=True)
class SemanticAugmentConfig(ViewConfig):
    """What may happen to a training image and its labels.

    It may be scaled in a third way too, that of the papers: to fit into `base` times a factor of `ratio_range`.
    """

    base: tuple[Count, Count] | None = None
    """(short, long): the largest edges that an image has when it is scaled by 1, its ratio kept."""
    ratio_range: tuple[Positive, Positive] = (0.5, 2.0)
    cat_max_ratio: Annotated[float, Interval(gt=0, le=1)] = 0.75
    """A crop of whose labelled pixels one class fills a larger share is drawn again, up to ten times; 1 takes any."""
    class_crops: Share = 0.0
    """Probability that a crop has to hold a pixel of one class, drawn from those of the image with equal chances; so
    rare classes are seen more often (as nnU-Net does, arXiv 1809.10486, section 2.3)."""
    photometric: bool = False
    """The usual distortion: brightness, contrast, saturation and hue, each with probability 0.5."""
    hue: Annotated[float, Interval(ge=0, le=180)] = HUE
    """Degrees by which the distortion turns colours, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base is not None and (self.scales or self.zoom):
            raise ConfigError("augmentation: base, scales and zoom all set the size of the image; use one of them")
        if self.base is not None and self.base[0] > self.base[1]:
            raise ConfigError(f"augmentation: base is the (short, long) edge in pixels, not {self.base}")
        if self.class_crops and self.crop is None:
            raise ConfigError("augmentation: class_crops places the crop; give its size, crop, too")
        if self.ratio_range[0] > self.ratio_range[1]:
            raise ConfigError(f"augmentation: ratio_range is (smallest, largest) factor, not {self.ratio_range}")

    @classmethod
    def paper(cls, crop: int, *, base: tuple[int, int] | None = None) -> "SemanticAugmentConfig":
        """The recipe of SETR, SegViT and DToP: random scale, crop, flip, photometric distortion.

        Args:
            crop: height and width of the crop.
            base: (short, long); None takes the crop's edge as the short one and four times as much as the long one.
        """
        return cls(base=base or (crop, 4 * crop), crop=(crop, crop), photometric=True)

    def scaled(self, size: tuple[int, int], generator: torch.Generator) -> tuple[int, int]:
        if self.base is None:
            return super().scaled(size, generator)
        ratio = _in(self.ratio_range, float(torch.rand((), generator=generator)))
        factor = min(self.base[0] * ratio / min(size), self.base[1] * ratio / max(size))
        return max(1, math.floor(size[0] * factor + 0.5)), max(1, math.floor(size[1] * factor + 0.5))


class SemanticAugment:
    """Draws a view and colours; deterministic given the generator."""

    def __init__(self, config: SemanticAugmentConfig, ignore_index: int = 255) -> None:
        self.config, self.ignore_index = config, ignore_index

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """From a uint8 image (3, h, w) and a target with labels (h, w) of any integer type to a float image in 0..1 and
        the target with its labels int64, both of the view."""
        labels = target["labels"]
        view = self.draw_view(labels, generator)
        out = jitter(self.config, view.image(image), generator)
        if self.config.photometric:
            out = distort(out, generator, hue=self.config.hue)
        return out, {**target, "labels": view.labels(labels).to(torch.int64, copy=True)}

    def draw_view(self, labels: Tensor, generator: torch.Generator) -> View:
        """A random view of an image with these labels (h, w)."""
        accept = partial(self._shows_enough, labels) if self.config.cat_max_ratio < 1 else None
        pixel = None
        if self.config.class_crops and float(torch.rand((), generator=generator)) < self.config.class_crops:
            pixel = self._pixel(labels, generator)
        return draw_view(self.config, (labels.shape[0], labels.shape[1]), generator, accept=accept, pixel=pixel)

    def _pixel(self, labels: Tensor, generator: torch.Generator) -> tuple[int, int] | None:
        """Any pixel (y, x) of any class but the ignored one; None: there is none."""
        classes = labels.unique()
        classes = classes[classes != self.ignore_index]
        if not len(classes):
            return None
        chosen = classes[torch.randint(len(classes), (), generator=generator)]
        pixels = (labels == chosen).nonzero()
        y, x = pixels[torch.randint(len(pixels), (), generator=generator)].tolist()
        return y, x

    def _shows_enough(self, labels: Tensor, rect: Rect) -> bool:
        """Whether no class fills more than `cat_max_ratio` of the labelled pixels."""
        y, x, h, w = rect
        part = labels[y : y + h : -(-h // _LOOKED_AT), x : x + w : -(-w // _LOOKED_AT)]
        known = part[part != self.ignore_index]
        return len(known) > 0 and int(torch.bincount(known).max()) <= self.config.cat_max_ratio * len(known)


def distort(image: Tensor, generator: torch.Generator, *, hue: float = HUE) -> Tensor:
    """The photometric distortion that SSD introduced and segmentation took over: a float image (3, h, w) in 0..1 with
    brightness, contrast, saturation and hue changed, each with probability 0.5, contrast before or after colours.

    Args:
        image: float (3, h, w) in 0..1.
        generator: of the random numbers.
        hue: largest turn in degrees.
    """
    draw = torch.rand(9, generator=generator).tolist()
    brightness, contrast, saturation, turned, late = (value < 0.5 for value in draw[:5])
    factor = _in(CONTRAST, draw[6])
    if brightness:
        image = (image + _in((-BRIGHTNESS, BRIGHTNESS), draw[5])).clamp_(0, 1)
    if contrast and not late:
        image = (image * factor).clamp_(0, 1)
    if saturation or turned:
        image = shift_colours(
            image,
            saturation=_in(SATURATION, draw[7]) if saturation else 1.0,
            degrees=_in((-hue, hue), draw[8]) if turned else 0.0,
        )
    if contrast and late:
        image = (image * factor).clamp_(0, 1)
    return image


def shift_colours(image: Tensor, *, saturation: float, degrees: float) -> Tensor:
    """A float image (3, h, w) in 0..1 with its saturation, as HSV has it, multiplied (up to 1) and its hue turned; the
    value, the largest channel, stays."""
    value = image.amax(0)
    gap = value - image  # 0 for the largest channel
    chroma = gap.amax(0)
    image = value - gap * (torch.minimum(chroma * saturation, value) / chroma.clamp(min=1e-8))
    return adjust_hue(image, degrees / 360).contiguous() if degrees else image


def _in(limits: tuple[float, float], share: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * share
