"""Image files and folders that are damaged, odd or not to be read: a picture, or an error that names the file."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hostile.fuzz import mutate_bytes
from sievit import viz
from sievit.config import ConfigError
from sievit.data.images import list_images, read_image, to_rgb, to_tensor
from sievit.data.label_files import read_values
from sievit.models.inputs import as_tensor

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def frames(count: int) -> list[Image.Image]:
    return [Image.fromarray((COLOURS // 2 + 20 * i).astype(np.uint8)) for i in range(count)]


def oriented(image: Image.Image, orientation: int) -> Image.Image:
    """The image as it is read from a file with this EXIF orientation."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, format="png", exif=exif)
    return Image.open(buffer)


# folders


def test_a_folder_below_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ConfigError, match=r"/b: cannot be read as a folder \(Permission denied\); you may not read it"):
        list_images(tmp_path)


def test_a_folder_whose_files_cannot_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.png").touch()

    def refused(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(ConfigError, match=r"x\.png: .*Permission denied"):
        list_images(tmp_path)


def test_linked_folders_are_listed_once(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").touch()
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "y.png").touch()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "round").symlink_to(folder)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    assert [path.relative_to(folder).as_posix() for path in list_images(folder)] == ["link/x.png", "y.png"]


# files that cannot be read


def test_an_image_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "a.png")

    monkeypatch.setattr(Image, "open", refused)
    for reader in (read_image, read_values):
        with pytest.raises(ConfigError, match=r"a\.png: .*\(Permission denied\); you may not read it") as raised:
            reader(tmp_path / "a.png")
        assert "replace" not in str(raised.value)


def test_a_folder_in_place_of_an_image_is_not_called_damaged(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"\(Is a directory\); check the path"):
        read_image(tmp_path)
    with pytest.raises(ConfigError, match="File name too long"):
        read_image(tmp_path / ("x" * 5000))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_image(tmp_path / "a\0b")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
@pytest.mark.parametrize("suffix", ["gif", "webp", "ppm", "png", "jpg", "tif", "bmp"])
def test_every_damage_of_a_file_ends_in_a_picture_or_names_it(tmp_path: Path, suffix: str):
    path, rng = tmp_path / f"x.{suffix}", np.random.default_rng(1)
    Image.fromarray(COLOURS).save(path)
    whole = path.read_bytes()
    for size in (0, 1, 5, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=rf"x\.{suffix}: cannot be read as an image"):
            read_image(path)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            assert read_image(path).mode == "RGB"
        except ConfigError as error:
            names(error, path)


def names(error: ConfigError, path: Path) -> None:
    """The error tells which file is meant."""
    assert str(path) in str(error), error


def bomb(path: Path, side: int) -> None:
    """A PNG of few bytes that says that it is of side x side pixels."""
    chunks = b""
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize("side", [10_000, 100_000, 2**31 - 1])
def test_an_image_that_would_fill_the_memory_is_named(tmp_path: Path, side: int):
    bomb(tmp_path / "bomb.png", side)
    with pytest.raises(ConfigError, match=r"bomb\.png: .*exceeds limit of \d+ pixels.*; make an image smaller"):
        read_image(tmp_path / "bomb.png")


# files that hold more than a picture, or another kind of one


@pytest.mark.parametrize(
    ("name", "what"), [("a.tif", "pages"), ("a.gif", "frames"), ("a.webp", "frames"), ("a.png", "frames")]
)
def test_further_pages_and_frames_are_not_left_out_in_silence(tmp_path: Path, name: str, what: str):
    first, *others = frames(3)
    first.save(tmp_path / name, save_all=True, append_images=others, lossless=True)
    with pytest.warns(UserWarning, match=rf"{name}: holds 3 {what}; the first is read"):
        read = read_image(tmp_path / name)
    if name != "a.gif":
        assert (np.asarray(read) == np.asarray(first)).all(), "the first one"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / name)
        first.save(tmp_path / f"single_{name}")
        read_image(tmp_path / f"single_{name}")


def test_pages_of_label_images_are_not_left_out_in_silence(tmp_path: Path):
    pages = [Image.fromarray(COLOURS[..., i]) for i in range(2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match=r"a\.tif: holds 2 pages"):
        assert (read_values(tmp_path / "a.tif") == COLOURS[..., 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_means_the_same_of_a_path_and_of_an_image(tmp_path: Path, orientation: int):
    image = oriented(Image.fromarray(COLOURS), orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    from_path = as_tensor(tmp_path / "a.png")
    assert from_path.shape == ((3, 6, 9) if orientation < 5 else (3, 9, 6))
    assert (as_tensor(image) == from_path).all()
    assert (np.asarray(viz.to_pil(image)).transpose(2, 0, 1) == from_path.numpy()).all(), "pictures of it too"


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "I;16"]
)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (0, 0)])
def test_every_mode_and_size_of_an_image_is_made_rgb(mode: str, size: tuple[int, int]):
    image = Image.new(mode, size)
    assert to_rgb(image).size == size and to_rgb(image).mode == "RGB"
    if 0 in size:
        with pytest.raises(ConfigError):
            as_tensor(image)


@pytest.mark.parametrize("value", [-1.0, 1.5, 300.0, float("nan"), float("inf"), -float("inf"), 1e38])
def test_floats_that_are_no_shares_are_an_error(tmp_path: Path, value: float):
    image = Image.fromarray(np.full((4, 5), value, dtype=np.float32))
    with pytest.raises(ConfigError, match="values"):
        as_tensor(image)
    image.save(tmp_path / "a.tif")
    with pytest.raises(ConfigError, match=r"a\.tif: .*values"):
        read_image(tmp_path / "a.tif")


def test_a_pixel_is_an_image(tmp_path: Path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert to_tensor(read_image(tmp_path / "a.png")).flatten().tolist() == [1, 2, 3]


def test_a_palette_with_transparency_is_on_white(tmp_path: Path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=bytes([255, 0]))
    assert np.asarray(read_image(tmp_path / "a.png")).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
def test_exif_data_that_are_damaged_end_in_a_picture_or_an_error():
    exif, rng = Image.Exif(), np.random.default_rng(2)
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 1.5
    exif.get_ifd(0x8769)[0x9000] = b"0220"
    errors = 0
    for _ in range(400):
        damaged = bytearray(exif.tobytes())
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(0, 256)
        image = Image.fromarray(COLOURS)
        image.info["exif"] = bytes(damaged)
        try:
            assert as_tensor(image).shape in ((3, 6, 9), (3, 9, 6))
        except ConfigError:
            errors += 1
    assert 0 < errors < 400


def test_a_tiff_without_a_size_is_named(tmp_path: Path):
    """Pillow raises a TypeError."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "tiff")
    width = struct.pack("<H", 256)
    start = buffer.getvalue().index(width + struct.pack("<H", 4))
    (tmp_path / "a.tif").write_bytes(buffer.getvalue()[:start] + b"\x01\x00" + buffer.getvalue()[start + 2 :])
    with pytest.raises(ConfigError, match=r"a\.tif: cannot be read as an image"):
        read_image(tmp_path / "a.tif")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, kind)
    return buffer.getvalue()


HEADS = {kind: encoded(kind) for kind in ("bmp", "gif", "jpeg", "png", "tiff", "webp")}


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(HEADS)), st.randoms(use_true_random=True))
@pytest.mark.filterwarnings("ignore")
def test_an_image_of_any_header_is_a_picture_or_is_named(tmp_path_factory: pytest.TempPathFactory, suffix: str, random):
    path = tmp_path_factory.getbasetemp() / f"head.{suffix}"
    path.write_bytes(mutate_bytes(HEADS[suffix][:60], random) + HEADS[suffix][60:])
    try:
        picture = read_image(path)
    except ConfigError as error:
        said = str(error)
    else:
        said = str(path) if picture.mode == "RGB" else picture.mode
    assert f"head.{suffix}" in said
