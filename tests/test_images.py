"""Reading image files of every usual kind, and saying clearly what is wrong with the others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sievit.config import ConfigError
from sievit.data.images import list_images, read_image, to_rgb, to_tensor
from tiny import refused

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREYS = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


def saved(image: Image.Image, path: Path, **options) -> np.ndarray:
    image.save(path, **options)
    read = read_image(path)
    assert read.mode == "RGB"
    return np.asarray(read)


PALETTE = Image.fromarray(COLOURS).quantize(8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(COLOURS), COLOURS),
        (Image.fromarray(GREYS), GREYS[..., None]),
        (Image.fromarray(GREYS > 127), 255 * (GREYS > 127)[..., None]),
        (PALETTE, np.asarray(PALETTE.convert("RGB"))),
    ],
    ids=["colours", "grey", "two levels", "palette"],
)
def test_every_mode_is_colours(tmp_path: Path, image: Image.Image, expected: np.ndarray):
    assert (saved(image, tmp_path / "a.png") == expected).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_the_upper_eight(tmp_path: Path, suffix: str):
    deep = GREYS.astype(np.uint16) * 256 + 77
    assert (saved(Image.fromarray(deep), tmp_path / f"a.{suffix}") == GREYS[..., None]).all()


def test_float_images_are_0_to_1_and_cmyk_is_turned(tmp_path: Path):
    assert (saved(Image.fromarray(GREYS.astype(np.float32) / 255), tmp_path / "a.tif") == GREYS[..., None]).all()
    Image.fromarray(GREYS.astype(np.float32)).save(tmp_path / "b.tif")
    refused(r"b\.tif.*float values", read_image, tmp_path / "b.tif")
    Image.fromarray(GREYS.astype(np.int32) * 70000).save(tmp_path / "c.tif")
    refused(r"c\.tif.*16-bit", read_image, tmp_path / "c.tif")

    image = Image.new("CMYK", (9, 6), (0, 255, 255, 0))
    assert (saved(image, tmp_path / "a.tif")[..., 0] > 200).all()


def test_transparency_is_white(tmp_path: Path):
    alpha = np.full((6, 9), 255, dtype=np.uint8)
    opaque = Image.fromarray(np.dstack([COLOURS, alpha]))
    assert (saved(opaque, tmp_path / "a.png") == COLOURS).all()
    alpha[2] = 0
    read = saved(Image.fromarray(np.dstack([COLOURS, alpha])), tmp_path / "b.png")
    assert (read[2] == 255).all() and (read[3] == COLOURS[3]).all()
    read = saved(Image.fromarray(np.dstack([GREYS, alpha])), tmp_path / "c.png")
    assert (read[2] == 255).all() and (read[3] == GREYS[3, :, None]).all()
    palette = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9) % 4, mode=None).convert("P")
    read = saved(palette, tmp_path / "d.png", transparency=3)
    assert (read[np.asarray(palette) == 3] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = saved(Image.fromarray(COLOURS), tmp_path / "a.png", exif=exif)
    assert read.shape == ((6, 9, 3) if orientation < 5 else (9, 6, 3))
    upright = {1: COLOURS, 3: COLOURS[::-1, ::-1], 6: np.rot90(COLOURS, -1), 8: np.rot90(COLOURS)}
    if orientation in upright:
        assert (read == upright[orientation]).all()


def test_exif_rotation_yields_to_the_annotated_size(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png", size=(9, 6)).size == (6, 9)
    assert (np.asarray(read_image(tmp_path / "a.png", size=(6, 9))) == COLOURS).all()
    with pytest.raises(ConfigError, match=r"a\.png: the image is 6x9 pixels, the annotation file says 5x5"):
        read_image(tmp_path / "a.png", size=(5, 5))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Possibly corrupt EXIF data", "ignore:Truncated File")
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_truncated_files_are_named(tmp_path: Path, suffix: str):
    path = tmp_path / f"broken.{suffix}"
    Image.fromarray(np.tile(COLOURS, (20, 20, 1))).save(path)
    content = path.read_bytes()
    for size in (0, 3, 20, len(content) // 2, len(content) - 60):
        path.write_bytes(content[:size])
        refused(rf"broken\.{suffix}: cannot be read as an image", read_image, path)


def test_missing_and_foreign_files_are_named(tmp_path: Path):
    refused(r"gone\.png: no such image", read_image, tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("hello")
    refused(r"text\.png: cannot be read", read_image, tmp_path / "text.png")
    refused("cannot be read", read_image, tmp_path)


def test_tensors_are_channels_first():
    tensor = to_tensor(to_rgb(Image.fromarray(COLOURS)))
    assert tensor.dtype == torch.uint8 and (tensor.numpy() == COLOURS.transpose(2, 0, 1)).all()


def test_listing_a_folder(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    for name in ("b.PNG", "a.jpg", "sub/c.tiff", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == ["a.jpg", "b.PNG", "sub/c.tiff"]
    refused("no such folder", list_images, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    refused("holds no images", list_images, tmp_path / "empty")
