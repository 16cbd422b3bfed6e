"""Image files of every usual kind, as 8-bit RGB."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sievit.config import ConfigError
from sievit.text import unreadable

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the values of it; from 5 on width and height change places
_ERRORS = (OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError)
_BROKEN = (*_ERRORS, MemoryError, zlib.error, struct.error)  # what Pillow raises depends on the damage
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # the latter where warnings are errors
_PICTURES = ("GIF", "PNG", "TIFF", "WEBP")  # formats whose further frames or pages are pictures of their own

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What `decode_image` takes: Pillow's names of the formats that it reads by itself."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")


class NotAnImage(ConfigError):
    """Bytes that are no image of a known format."""


class ImageTooLarge(ConfigError):
    """An image with more pixels than are taken."""


def list_images(folder: Path) -> list[Path]:
    """The image files in a folder and those below it, links to folders included, sorted.

    Raises:
        ConfigError: there is no such folder, no image in it, or one below it cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    paths, seen = [], set[str]()
    for parent, folders, names in os.walk(folder, onerror=_unlisted, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in sorted(folders) if os.path.realpath(Path(parent, name)) not in seen]
        paths += [Path(parent, name) for name in names if Path(name).suffix.lower() in SUFFIXES and name[0] != "."]
    try:
        paths = sorted(path for path in paths if path.is_file())
    except OSError as error:  # a folder whose names may be read and whose files may not
        _unlisted(error)
    if not paths:
        raise ConfigError(f"{folder}: holds no images (looked for {', '.join(SUFFIXES)})")
    return paths


def _unlisted(error: OSError) -> NoReturn:
    raise unreadable(Path(error.filename), "a folder", error) from error


@contextmanager
def opened(path: Path, what: str, *, data: bytes | None = None) -> Generator[Image.Image]:
    """An image file that is open meanwhile, `what` being "an image" or the like; with `data` that is what it holds.

    Raises:
        ConfigError: the file is missing, truncated or not an image; also where pixels are found wrong meanwhile.
    """
    try:
        with Image.open(path if data is None else BytesIO(data)) as image:
            if image.format in _PICTURES and getattr(image, "is_animated", False):
                _warn_of_frames(path, getattr(image, "n_frames", 2), "pages" if image.format == "TIFF" else "frames")
            image.load()
            yield image
    except FileNotFoundError as error:
        kind = what.partition(" ")[2]
        raise ConfigError(f"{path}: no such {kind}; check the folder of the {kind}s and the file name") from error
    except _TOO_LARGE as error:
        raise ConfigError(f"{path}: {error}; make {what} smaller") from error
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, what, error) from error
        raise ConfigError(f"{path}: cannot be read as {what} ({error}); replace the file") from error


@cache
def _warn_of_frames(path: Path, count: int, what: str) -> None:
    """Once per file, as an image is read many times."""
    warnings.warn(f"{path}: holds {count} {what}; the first is read, and no other", stacklevel=4)


def read_image(path: Path, *, size: tuple[int, int] | None = None, data: bytes | None = None) -> Image.Image:
    """Read an image file as RGB, upright.

    Args:
        path: any format that Pillow reads.
        size: (height, width) that the image is known to have. An EXIF rotation that would contradict it is left out,
            as some annotation tools ignore EXIF.
        data: what the file holds, where it was read already; `path` is then a name for errors.

    Raises:
        ConfigError: the file is missing, truncated, not an image, or not of `size`; the message names it.
    """
    with opened(path, "an image", data=data) as stored:
        image = to_rgb(stored if _contradicts(stored, size) else upright(stored))
        image.info.clear()  # nobody shall turn it once more
    if size is not None and (image.height, image.width) != tuple(size):
        raise ConfigError(
            f"{path}: the image is {image.width}x{image.height} pixels, the annotation file says {size[1]}x{size[0]}; "
            "correct 'width' and 'height' there, or use the images that were annotated"
        )
    return image


def decode_image(content: bytes, *, max_pixels: int) -> Image.Image:
    """The bytes of an image file, from anybody, as RGB, upright. Of several frames or pages the first is read.

    Args:
        content: of one of `FORMATS`; no other program is started to read it, as Pillow does for some others.
        max_pixels: an image that its header says to be larger is refused before it is decoded.

    Raises:
        NotAnImage, ImageTooLarge, ConfigError: another format, more pixels, damaged. No message says anything about
            this machine.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as stored:
            if stored.width * stored.height > max_pixels:
                raise ImageTooLarge(
                    f"the image has {stored.width} x {stored.height} pixels, {stored.width * stored.height / 1e6:.3g} "
                    f"megapixels; at most {max_pixels / 1e6:.3g} are taken: make it smaller"
                )
            stored.load()
            image = to_rgb(upright(stored))
            image.info.clear()
            return image
    except ConfigError:
        raise
    except UnidentifiedImageError as error:
        raise NotAnImage(f"this is no image that can be read; {', '.join(FORMATS)} are taken") from error
    except _TOO_LARGE as error:
        raise ImageTooLarge(
            f"the image has far too many pixels; at most {max_pixels / 1e6:.3g} megapixels are taken"
        ) from error
    except _BROKEN as error:
        raise ConfigError("the image is damaged or cut short; save it anew") from error


def image_size(path: Path) -> tuple[int, int] | None:
    """(height, width) by the head of the file, upright; None where it says none. The pixels are not read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)
    except (*_BROKEN, *_TOO_LARGE):
        return None


def upright(image: Image.Image) -> Image.Image:
    """A Pillow image turned as its EXIF data say.

    Raises:
        ConfigError: they cannot be read.
    """
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


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
    if size is None or image.height == image.width or (image.height, image.width) != tuple(size):
        return False
    return _orientation(image) in (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN as error:
        raise ConfigError(f"its EXIF data are damaged ({error}); remove them") from error
    return value if isinstance(value, int) else 1


def _eight_bits(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if not (low >= 0 and high <= 65535):  # NaN ends here too
        raise ConfigError(f"values from {low:g} to {high:g} are neither 8-bit nor 16-bit")
    if values.dtype.kind == "f":
        if high > 1:
            raise ConfigError(f"float values up to {high:g}; 0 to 1 are understood")
        return (values * 255).round().astype(np.uint8)
    return (values.astype(np.uint16) >> 8).astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
