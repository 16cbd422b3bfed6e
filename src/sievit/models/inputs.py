"""What goes into a model: images of any kind, and what happens to them before a network sees them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from sievit.config import Config, ConfigError, Count, Finite, Positive
from sievit.data.images import read_image, to_rgb, to_tensor, upright
from sievit.policies import PolicyConfig
from sievit.vit import ViTConfig
from sievit.vit.execution import Execution

OVERSHOOT = 0.5
"""By which values of an image may lie outside of 0..1, since resizing overshoots at edges."""
Size = tuple[int, int]
"""Height, width in pixels."""
Window = tuple[int, int, int, int]
"""y, x, height, width in pixels."""


@dataclass(frozen=True)
class InputConfig(Config):
    """What happens to an image before the network sees it.

    Attributes:
        mean, std: per channel, of RGB in 0..1.
        min_size, max_size: test images are resized, keeping their shape, so that the short edge is `min_size` unless
            the long one would exceed `max_size`. `min_size=None` leaves them as they are.
        size_divisor: a batch is padded to a multiple of it.
        antialias: filter before making images smaller (the SViT release does not).
    """

    mean: tuple[Finite, Finite, Finite] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    min_size: Count | None = 800
    max_size: Count = 1333
    size_divisor: Count = 32
    antialias: bool = True

    def test_size(self, size: Size) -> Size:
        """(height, width) that the network sees of an image of `size`."""
        if self.min_size is None:
            return size
        scale = min(self.min_size / min(size), self.max_size / max(size))
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


@dataclass(frozen=True)
class ModelConfig(Config):
    """What every whole model has; each kind of model adds its own, and is enough to rebuild the model.

    Attributes:
        classes: names, in the order of the model's answers.
        execution: how it is run when it answers.
    """

    vit: ViTConfig
    policy: PolicyConfig
    input: InputConfig
    classes: tuple[str, ...]
    execution: Execution = field(default=Execution(), kw_only=True)

    @property
    def has_exits(self) -> bool:
        """Whether tokens can leave with the prediction of a head before the last one."""
        return False

    def with_depth(self, depth: int) -> Self:
        """The configuration without the last blocks of the ViT."""
        return replace(self, vit=replace(self.vit, depth=depth))

    figures: ClassVar[Mapping[str, str]] = {}
    """What the figures of accuracy of such models are called, by their names in `sievit eval`."""
    result: ClassVar[str] = ""
    """What the result for an image is, in a few words."""
    hub_task: ClassVar[str] = ""
    """What the Hugging Face Hub calls the task."""

    @property
    def hub_tags(self) -> tuple[str, ...]:
        """Tags of the hub that say more than the task."""
        return ()

    @property
    def default_size(self) -> Size:
        """(height, width) of a typical image: the largest test image, or the one that the ViT's positions are for."""
        if self.input.min_size is not None:
            return self.input.min_size, self.input.max_size
        return self.vit.grid[0] * self.vit.stride, self.vit.grid[1] * self.vit.stride


def batched(images: list[Tensor], sizes: list[Size], config: InputConfig, device: torch.device) -> Tensor:
    """(b, 3, H, W): resized to `sizes`, normalised, padded with zeros at the right and the bottom.

    Args:
        images: (3, h, w) RGB, float in 0..1 or uint8, of any sizes.
    """
    height, width = padded_size([max(edges) for edges in zip(*sizes, strict=True)], config.size_divisor)
    batch = torch.zeros(len(images), 3, height, width, device=device)
    for row, image, (h, w) in zip(batch, images, sizes, strict=True):
        row[:, :h, :w] = normalised(image, (h, w), config, device)
    return batch


def normalised(image: Tensor, size: Size, config: InputConfig, device: torch.device) -> Tensor:
    """(3, h, w): one image, resized to `size` and normalised."""
    mean = torch.tensor(config.mean, device=device)[:, None, None]
    std = torch.tensor(config.std, device=device)[:, None, None]
    image = image.to(device)
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    if image.shape[-2:] != size:
        image = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=config.antialias)[0]
    return (image - mean) / std


def windows_over(size: Size, crop: Size | None, stride: Size | None) -> Iterator[Window]:
    """Windows of the size `crop` over an image of `size`, `stride` apart, the last ones moved inside; None: all."""
    if crop is None or stride is None:
        yield 0, 0, *size
        return
    h, w = (min(pair) for pair in zip(size, crop, strict=True))
    for y in range(0, size[0] - h + stride[0], stride[0]):
        for x in range(0, size[1] - w + stride[1], stride[1]):
            yield min(y, size[0] - h), min(x, size[1] - w), h, w


def in_batches(images: Sequence[Any], batch_size: int) -> Iterator[list[Tensor]]:
    """Images of any kind that `as_tensor` takes, as tensors, `batch_size` at a time.

    Raises:
        ConfigError: not a list of images, or a file that cannot be read.
    """
    if isinstance(images, str | Path | Tensor | np.ndarray) or not isinstance(images, Sequence):
        raise ConfigError(f"predict takes a list of images, not a {type(images).__name__}; write predict([image])")
    for start in range(0, len(images), batch_size):
        yield [as_tensor(image) for image in images[start : start + batch_size]]


def as_tensor(image: Any) -> Tensor:
    """An image of any kind that `predict` takes, as (3, h, w) RGB, float in 0..1 or uint8.

    Raises:
        ConfigError: another type or shape, or a file that cannot be read.
    """
    if isinstance(image, str | Path):
        image = read_image(Path(image))
    if isinstance(image, Image):
        image = to_tensor(to_rgb(upright(image)))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ConfigError(f"an image array must be uint8, not {image.dtype}; floats in 0..1 go in as tensors")
        image = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
        if image.ndim != 3 or image.shape[2] != 3:
            raise ConfigError(f"an image array must be (h, w, 3) or (h, w), not {image.shape}")
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise ConfigError(f"cannot read an image from {type(image).__name__}; give a path, PIL image, array or tensor")
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ConfigError(f"an image tensor must be (3, h, w), not {tuple(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ConfigError(f"an image tensor must be uint8 or float in 0..1, not {image.dtype}")
    if image.is_floating_point():
        low, high = image.min().item(), image.max().item()
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # NaN ends here too
            raise ConfigError(f"a float image is in 0..1, not {low:g}..{high:g}; 0..255 goes in as uint8")
    return image


def padded_size(size: Sequence[int], divisor: int) -> Size:
    """(height, width), each the next multiple of `divisor`."""
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width
