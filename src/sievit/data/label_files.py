"""Files of labels: which belong to which images, what their numbers or colours mean, and how they are read."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sievit.config import Byte, Config, ConfigError, from_json
from sievit.data.coco_json import CocoFile
from sievit.data.images import SUFFIXES, list_images, opened
from sievit.text import is_text, read_json, read_text

Colour = tuple[Byte, Byte, Byte]

LABEL_SUFFIXES = tuple(s for s in SUFFIXES if s not in (".jpg", ".jpeg", ".webp"))
"""Files that keep a number as it is; JPEG does not, and WebP not always."""

_COLOUR_LINE = re.compile(r"\s*(\d{1,9})[\s,]+(\d{1,9})[\s,]+(\d{1,9})(?:[\s,]+(.*))?")
_FEW = 3
_UNKNOWN = np.int32(2**31 - 1)


@dataclass(frozen=True)
class Pair:
    """An image and its labels: `name` is what their relative paths have in common."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Palette(Config):
    """RGB colours of the classes, names if there are any, and colours that mean that nothing is known of a pixel."""

    colours: tuple[Colour, ...] = ()
    names: tuple[str, ...] = ()
    ignored: tuple[Colour, ...] = ()


def read_palette(path: Path) -> Palette:
    """Read colours of classes: lines `red green blue name` (commas or spaces, the name optional), or a JSON list of
    [red, green, blue]. Line number is class; the name `ignore` marks a colour of pixels of which nothing is known.

    Raises:
        ConfigError: the file is missing, or a line is not a colour.
    """
    text = read_text(path, "a palette")
    if text.lstrip().startswith("["):
        return from_json(Palette, {"colours": read_json(path)}, where=str(path))
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
    found = {"colours": colours, "names": names if all(names) else [], "ignored": ignored}
    return from_json(Palette, found, where=str(path))


def read_names(path: Path) -> list[str]:
    """Names of the images of a set: a text file with one on each line, as VOC's ImageSets, or a COCO annotation file.
    They are relative paths, with or without what images have as their suffix.

    Raises:
        ConfigError: the file is missing or names nothing.
    """
    text = read_text(path, "a list of names")
    if text.lstrip().startswith("{"):
        names = [image["file_name"] for image in CocoFile(path).records("images", {"file_name": is_text})]
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
        self.classes, self.palette, self.ignore_index, count = classes, palette, ignore_index, len(classes)
        if 0 <= ignore_index < count:
            raise ConfigError(
                f"ignore_index {ignore_index} is one of the {count} classes; choose a value outside of them "
                "(where 0 in the files means that nothing is known, zero_is_ignored says so)"
            )
        if palette.colours and len(palette.colours) != count:
            raise ConfigError(f"palette: {len(palette.colours)} colours for {count} classes; give one for each class")
        if label_map is not None and zero_is_ignored:
            raise ConfigError("zero_is_ignored and label_map both say what values mean; use one of them")
        if not all(-_UNKNOWN <= value < _UNKNOWN for value in (ignore_index, *(label_map or ()))):
            raise ConfigError("ignore_index and the values of label_map are numbers of pixels: they have 32 bits")
        for value, label in (label_map or {}).items():
            if label != ignore_index and not 0 <= label < count:
                raise ConfigError(f"label_map: {value} becomes {label}, which is none of the {count} classes")
        self._other = None if label_map is None else ignore_index
        first = int(zero_is_ignored)
        stored = {ignore_index: ignore_index} | {first + label: label for label in range(count)}
        self._labels = stored | dict.fromkeys(range(first), ignore_index) if label_map is None else label_map

    def __call__(self, path: Path) -> np.ndarray:
        """The class of each pixel (h, w), or `ignore_index`.

        Raises:
            ConfigError: the file cannot be read, or a value of it is no class.
        """
        values = read_values(path)
        if values.ndim == 3:
            return self._from_colours(path, packed_colours(values))
        advice = (
            f"is none of the {len(self.classes)} classes and not ignored ({self.ignore_index}); correct the classes, "
            "set zero_is_ignored or a label_map, or the file"
        )
        return translated(values, self._labels, lambda found: f"{path}: value {found} {advice}", other=self._other)

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
        advice = (
            "is not in the palette; add it there (with the name `ignore` if nothing is known of such pixels), or "
            "correct the file"
        )
        return translated(
            colours,
            packed,
            lambda found: f"{path}: colour {found} {advice}",
            shown=lambda number: (number & 255, number >> 8 & 255, number >> 16),
        )


def translated(
    values: np.ndarray,
    labels: Mapping[int, int],
    message: Callable[[str], str],
    *,
    shown: Callable[[int], object] = str,
    other: int | None = None,
) -> np.ndarray:
    """`labels[v]` of every value v, int32.

    Args:
        message: of the error, from the commonest value that has no label and how many pixels have it.
        shown: how that value is written.
        other: label of all other values; None: they are an error.

    Raises:
        ConfigError: a value has no label.
    """
    keys = np.array(sorted(labels), dtype=np.int64)
    targets = np.array([labels[key] for key in keys.tolist()], dtype=np.int32)
    stored = np.arange(256) if values.dtype == np.uint8 else values
    places = np.searchsorted(keys, stored).clip(max=len(keys) - 1)
    found = np.where(keys[places] == stored, targets[places], _UNKNOWN if other is None else np.int32(other))
    found = found[values] if values.dtype == np.uint8 else found
    if other is None and (found == _UNKNOWN).any():
        value, count = Counter(values[found == _UNKNOWN].tolist()).most_common(1)[0]
        raise ConfigError(message(f"{shown(value)} ({count} pixels)"))
    return found


def read_values(path: Path) -> np.ndarray:
    """The numbers in a label image as they are stored: (h, w), or uint8 (h, w, 3) of one that has colours.

    Raises:
        ConfigError: the file is missing or damaged, or holds no whole numbers.
    """
    with opened(path, "a label image") as image:
        values, mode = np.asarray(image), image.mode
    if mode in ("RGB", "RGBA"):
        return values[..., :3]
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise ConfigError(f"{path}: is an image of mode {mode}; labels are grey of 8 or 16 bits, palette or RGB images")
    return values.astype(np.uint8) if mode == "1" else values


def packed_colours(values: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) as int32 (h, w), red + 256 green + 65536 blue."""
    wide = values.astype(np.int32)
    return wide[..., 0] | wide[..., 1] << 8 | wide[..., 2] << 16


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
