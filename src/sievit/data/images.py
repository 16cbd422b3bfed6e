"""Image files of every usual kind, as 8-bit RGB."""

import struct
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sievit.config import ConfigError

_ORIENTATION = 0x0112  # EXIF tag
_TURNED = (5, 6, 7, 8)  # values of it that exchange width and height
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error, Image.DecompressionBombError)

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")


def list_images(folder: Path) -> list[Path]:
    """The image files in a folder and those below it, sorted.

    Raises:
        ConfigError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != ".")
    if not paths:
        raise ConfigError(f"{folder}: holds no images (looked for {', '.join(SUFFIXES)})")
    return paths


@contextmanager
def opened(path: Path, what: str) -> Generator[Image.Image]:
    """An image file that is open meanwhile, `what` being "an image" or the like.

    Raises:
        ConfigError: the file is missing, truncated or not an image; also where pixels are found wrong meanwhile.
    """
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except FileNotFoundError as error:
        kind = what.partition(" ")[2]
        raise ConfigError(f"{path}: no such {kind}; check the folder of the {kind}s and the file name") from error
    except _BROKEN as error:
        raise ConfigError(f"{path}: cannot be read as {what} ({error}); replace the file") from error


def read_image(path: Path, *, size: tuple[int, int] | None = None) -> Image.Image:
    """Read an image file as RGB, upright.

    Args:
        path: any format that Pillow reads.
        size: (height, width) that the image is known to have. An EXIF rotation that would contradict it is left out,
            as some annotation tools ignore EXIF.

    Raises:
        ConfigError: the file is missing, truncated, not an image, or not of `size`; the message names it.
    """
    with opened(path, "an image") as stored:
        image = to_rgb(stored if _contradicts(stored, size) else ImageOps.exif_transpose(stored))
    if size is not None and (image.height, image.width) != tuple(size):
        raise ConfigError(
            f"{path}: the image is {image.width}x{image.height} pixels, the annotation file says {size[1]}x{size[0]}; "
            "correct 'width' and 'height' there, or use the images that were annotated"
        )
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB: 16-bit values are divided by 256, transparency is put on white.

    Raises:
        ConfigError: an integer or float image whose values fit neither 0..65535 nor, for float, 0..1.
    """
    if image.mode == "RGB":
        return image.copy() if image.info.get("transparency") is None else _on_white(image)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or image.info.get("transparency") is not None:
        return _on_white(image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, h, w); the memory stays interleaved, which is what resizing likes."""
    assert image.mode == "RGB", image.mode
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _contradicts(image: Image.Image, size: tuple[int, int] | None) -> bool:
    turned = image.getexif().get(_ORIENTATION) in _TURNED
    return turned and size is not None and image.height != image.width and (image.height, image.width) == tuple(size)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):  # NaN ends here too
        raise ValueError(f"values from {low:g} to {high:g} are neither 8-bit nor 16-bit")
    if values.dtype.kind == "f":
        if high > 1:
            raise ValueError(f"float values up to {high:g}; 0 to 1 are understood")
        return (values * 255).round().astype(np.uint8)
    return (values.astype(np.uint16) >> 8).astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
