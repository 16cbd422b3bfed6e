"""Files of labels: which belong to which images, what their numbers or colours mean, and how they are read."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sievit.config import ConfigError
from sievit.data.images import SUFFIXES, list_images

Colour = tuple[int, int, int]

LABEL_SUFFIXES = tuple(s for s in SUFFIXES if s not in (".jpg", ".jpeg", ".webp"))
"""Files that keep a number as it is; JPEG does not, and WebP not always."""

_COLOUR_LINE = re.compile(r"\s*(\d+)[\s,]+(\d+)[\s,]+(\d+)(?:[\s,]+(.*))?")
_FEW = 3
_VALUES = 2**16
_UNKNOWN = 2**31 - 1


@dataclass(frozen=True)
class Pair:
    """An image and its labels: `name` is what their relative paths have in common."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Palette:
    """RGB colours of the classes, names if there are any, and colours that mean that nothing is known of a pixel."""

    colours: tuple[Colour, ...] = ()
    names: tuple[str, ...] = ()
    ignored: tuple[Colour, ...] = ()

    def __post_init__(self) -> None:
        for colour in (*self.colours, *self.ignored):
            if len(colour) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in colour):
                raise ConfigError(f"palette: {colour} is not a colour; give red, green and blue from 0 to 255")


def read_palette(path: Path) -> Palette:
    """Read colours of classes: lines `red green blue name` (commas or spaces, the name optional), or a JSON list of
    [red, green, blue]. Line number is class; the name `ignore` marks a colour of pixels of which nothing is known.

    Raises:
        ConfigError: the file is missing, or a line is not a colour.
    """
    text = read_text(path, "the palette")
    if text.lstrip().startswith("["):
        try:
            return Palette(tuple((int(r), int(g), int(b)) for r, g, b in json.loads(text)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: is not a list of [red, green, blue] ({error})") from error
    colours: list[Colour] = []
    ignored: list[Colour] = []
    names: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = _COLOUR_LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"{path}, line {number}: {line!r} is not `red green blue name`")
        colour, name = (int(match[1]), int(match[2]), int(match[3])), (match[4] or "").strip()
        if name == "ignore":
            ignored.append(colour)
        else:
            colours.append(colour)
            names.append(name)
    if not colours:
        raise ConfigError(f"{path}: holds no colours; give a line `red green blue name` for each class")
    return Palette(tuple(colours), tuple(names) if all(names) else (), tuple(ignored))


def read_names(path: Path) -> list[str]:
    """Names of the images of a set: a text file with one on each line, as VOC's ImageSets, or a COCO annotation file.
    They are relative paths, with or without what images have as their suffix.

    Raises:
        ConfigError: the file is missing or names nothing.
    """
    text = read_text(path, "the list of names")
    if text.lstrip().startswith("{"):
        try:
            names = [str(image["file_name"]) for image in json.loads(text)["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: is no COCO file with images and their file_name ({error!r})") from error
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise ConfigError(f"{path}: names no images; write one name on each line")
    return names


def find_pairs(
    images: Path,
    labels: Path,
    names_file: Path | None = None,
    *,
    image_suffix: str | None = None,
    label_suffix: str | None = None,
) -> tuple[Pair, ...]:
    """What belongs together in two folders, sorted by name, or in the order of `names_file`; see
    `LabelDataset` for the arguments and what is wrong with them."""
    pictures = _by_name(images, SUFFIXES, image_suffix, "images")
    truths = _by_name(labels, LABEL_SUFFIXES, label_suffix, "label images")
    ends = f" (images end with {image_suffix or 'any extension'}, labels with {label_suffix or 'any extension'})"
    if names_file is None:
        names = list(pictures)
        if extra := [name for name in truths if name not in pictures]:
            raise ConfigError(
                f"{labels}: {len(extra)} of {len(truths)} labels have no image in {images}: {some(extra)}{ends}; "
                "add the images, set the suffixes, or name the images that count in a names_file"
            )
    else:
        suffixes = (image_suffix, label_suffix)
        names = [_stem(name, suffixes) for name in read_names(names_file)]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ConfigError(f"{names_file}: names {some(twice)} more than once; leave one of each")
        if missing := [name for name in names if name not in pictures]:
            raise ConfigError(
                f"{names_file}: {len(missing)} of its {len(names)} names have no image in {images}: "
                f"{some(missing)}{ends}; correct the list, or the folder"
            )
    if missing := [name for name in names if name not in truths]:
        raise ConfigError(
            f"{images}: {len(missing)} of {len(names)} images have no label in {labels}: {some(missing)}{ends}; "
            "add the labels, remove the images, set the suffixes, or name the images that count in a names_file"
        )
    return tuple(Pair(name, pictures[name], truths[name]) for name in names)


class LabelReader:
    """Reads label images: values of one channel as classes, colours through a palette."""

    def __init__(
        self,
        *,
        classes: tuple[str, ...],
        palette: Palette,
        ignore_index: int,
        zero_is_ignored: bool,
        label_map: Mapping[int, int] | None,
    ) -> None:
        """See `LabelDataset` for the arguments.

        Raises:
            ConfigError: they contradict each other.
        """
        self.classes, self.palette, self.ignore_index = classes, palette, ignore_index
        num_classes = len(classes)
        if num_classes > _VALUES:
            raise ConfigError(f"labels: {num_classes} classes are more than the {_VALUES} that label images can hold")
        if 0 <= ignore_index < num_classes:
            raise ConfigError(
                f"ignore_index {ignore_index} is one of the {num_classes} classes; choose a value outside of them "
                "(where 0 in the files means that nothing is known, zero_is_ignored says so)"
            )
        if palette.colours and len(palette.colours) != num_classes:
            raise ConfigError(
                f"palette: {len(palette.colours)} colours for {num_classes} classes; give one for each class"
            )
        if label_map is None:
            first = int(zero_is_ignored)
            entries = {ignore_index: ignore_index} | {first + label: label for label in range(num_classes)}
            label_map = entries | dict.fromkeys(range(first), ignore_index)
            other = _UNKNOWN
        elif zero_is_ignored:
            raise ConfigError("zero_is_ignored and label_map both say what values mean; use one of them")
        else:
            other = ignore_index
        self._table = np.full(_VALUES + 2, other, dtype=np.int32)  # the last two stand for all other values
        for value, label in label_map.items():
            if label != ignore_index and not 0 <= label < num_classes:
                raise ConfigError(f"label_map: {value} becomes {label}, which is none of the {num_classes} classes")
            if 0 <= value < _VALUES:  # Cityscapes lists a value of -1
                self._table[value] = label

    def __call__(self, path: Path) -> np.ndarray:
        """The class of each pixel (h, w), or `ignore_index`.

        Raises:
            ConfigError: the file cannot be read, or a value of it is no class.
        """
        values = read_values(path)
        if values.ndim == 3:
            return self._from_colours(path, packed_colours(values))
        labels = self._table[values if values.dtype == np.uint8 else values.clip(-1, _VALUES)]
        if (labels == _UNKNOWN).any():
            raise ConfigError(
                f"{path}: value {commonest(values[labels == _UNKNOWN])} is none of the {len(self.classes)} classes and "
                f"not ignored ({self.ignore_index}); correct the classes, set zero_is_ignored or a label_map, or the "
                "file"
            )
        return labels

    def _from_colours(self, path: Path, colours: np.ndarray) -> np.ndarray:
        if not self.palette.colours:
            raise ConfigError(
                f"{path}: is an RGB image, where labels are the numbers of classes in one channel; give a palette that "
                "lists the colour of each class, or save the labels as grey or palette images"
            )
        entries = [*enumerate(self.palette.colours), *((self.ignore_index, c) for c in self.palette.ignored)]
        packed = {r | g << 8 | b << 16: label for label, (r, g, b) in entries}
        if len(packed) != len(entries):
            twice = Counter(colour for _, colour in entries).most_common(1)[0][0]
            raise ConfigError(f"palette: colour {twice} stands for two classes, so {path} cannot be read by colours")
        labels, wrong = look_up(colours, packed)
        if wrong.any():
            found = commonest(colours[wrong], lambda number: (number & 255, number >> 8 & 255, number >> 16))
            raise ConfigError(
                f"{path}: colour {found} is not in the palette; add it there (with the name `ignore` if nothing is "
                "known of such pixels), or correct the file"
            )
        return labels


def commonest(values: np.ndarray, shown: Callable[[int], object] = str) -> str:
    """The commonest of some values and how many pixels have it, for a message."""
    value, count = Counter(values.tolist()).most_common(1)[0]
    return f"{shown(value)} ({count} pixels)"


def read_values(path: Path) -> np.ndarray:
    """The numbers in a label image as they are stored: (h, w), or uint8 (h, w, 3) of one that has colours.

    Raises:
        ConfigError: the file is missing or damaged, or holds no whole numbers.
    """
    try:
        with Image.open(path) as image:
            image.load()
            values, mode = np.asarray(image), image.mode
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such label image; check the folder of the labels and the file name") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: cannot be read as a label image ({error}); replace the file") from error
    if mode in ("RGB", "RGBA"):
        return values[..., :3]
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise ConfigError(f"{path}: is an image of mode {mode}; labels are grey of 8 or 16 bits, palette or RGB images")
    return values.astype(np.uint8) if mode == "1" else values


def packed_colours(values: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) as int32 (h, w), red + 256 green + 65536 blue."""
    wide = values.astype(np.int32)
    return wide[..., 0] | wide[..., 1] << 8 | wide[..., 2] << 16


def look_up(values: np.ndarray, entries: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """`entries[v]` of every value, int32, and a mask of the values that have no entry."""
    keys = np.array(sorted(entries), dtype=np.int64)
    targets = np.array([entries[key] for key in keys.tolist()], dtype=np.int32)
    places = np.searchsorted(keys, values).clip(max=len(keys) - 1)
    return targets[places], keys[places] != values


def _by_name(folder: Path, known: Iterable[str], suffix: str | None, what: str) -> dict[str, Path]:
    """The files of a folder by the names of their pairs."""
    files = [path for path in list_images(folder) if path.suffix.lower() in known]
    named = [path for path in files if suffix is None or path.name.endswith(suffix)]
    if not named:
        kinds = f"that end with {suffix}" if suffix is not None else f"({', '.join(known)})"
        lossy = "; JPEG changes values, so it cannot hold labels" if what == "label images" else ""
        raise ConfigError(f"{folder}: holds no {what} {kinds}{lossy}")
    found: dict[str, Path] = {}
    for path in named:
        name = _stem(path.relative_to(folder).as_posix(), (suffix,))
        if name in found:
            raise ConfigError(f"{found[name]} and {path}: two {what} of one name; remove one, or set its suffix")
        found[name] = path
    return found


def _stem(name: str, suffixes: Iterable[str | None]) -> str:
    """A file's name without the first suffix that it has, else without its extension."""
    for suffix in suffixes:
        if suffix and name.endswith(suffix):
            return name.removesuffix(suffix)
    extension = Path(name).suffix
    return name.removesuffix(extension) if extension.lower() in SUFFIXES else name


def some(names: Sequence[Any]) -> str:
    """The first few of them, for a message."""
    return ", ".join(map(str, names[:_FEW])) + (", ..." if len(names) > _FEW else "")


def read_text(path: Path, what: str) -> str:
    """
    Raises:
        ConfigError: there is no such file, or it is no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {what} cannot be read ({error})") from error
