"""A data set of images and label images: folders of files that belong together by name, or COCO's panoptic files."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sievit.config import ConfigError
from sievit.data.coco import Target, Transform, sample_generator
from sievit.data.images import SUFFIXES, list_images, read_image, to_tensor

Colour = tuple[int, int, int]

LABEL_SUFFIXES = tuple(s for s in SUFFIXES if s not in (".jpg", ".jpeg", ".webp"))
"""Files that keep a number as it is; JPEG does not, and WebP not always."""

_FEW = 3
_VALUES = 2**16
_UNKNOWN = 2**31 - 1


@dataclass(frozen=True)
class Pair:
    """An image and its labels: `name` is what their relative paths have in common."""

    name: str
    image: Path
    label: Path


ReadLabels = Callable[[Pair], np.ndarray]
"""Reads a pair's label file as classes (h, w), with the ignored value where nothing is known."""


class LabelDataset(Dataset[tuple[Tensor, Target]]):
    """Images with a class for every pixel.

    Labels are 0-based; `classes[label]` says what they mean, `ignore_index` that nothing is known of a pixel. Files are
    opened when their sample is asked for: what is wrong with one is reported then.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        read_labels: ReadLabels,
        *,
        classes: Sequence[str],
        palette: Sequence[Colour] = (),
        ignore_index: int = 255,
        source: str = "labels",
        transform: Transform | None = None,
        seed: int = 0,
        cache_bytes: int = 0,
    ) -> None:
        """
        Args:
            pairs: what belongs together; see `from_folders` and `from_panoptic`.
            read_labels: how a label file is read.
            classes: names; there are so many classes.
            palette: RGB colour of each class for pictures, or nothing.
            ignore_index: label of pixels that are neither trained on nor judged; no class.
            source: names the data set in messages.
            transform: for training, a `SemanticAugment`; without one an image comes as it is.
            seed: with the epoch and the index it decides what the transform draws.
            cache_bytes: decoded images and labels are kept up to this size, per worker process.

        Raises:
            ConfigError: `ignore_index` is a class, or the palette lacks some.
        """
        self.pairs, self._read_labels = tuple(pairs), read_labels
        self.classes, self.palette, self.ignore_index = tuple(classes), tuple(palette), ignore_index
        self.source, self.transform, self.seed = source, transform, seed
        check_classes(len(self.classes), ignore_index)
        if self.palette and len(self.palette) != len(self.classes):
            raise ConfigError(
                f"{source}: {len(self.palette)} colours for {len(self.classes)} classes; give one for each"
            )
        self._dtype = _storage(len(self.classes), ignore_index)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._cache_left = cache_bytes

    @classmethod
    def from_folders(
        cls,
        images: Path,
        labels: Path,
        *,
        classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        ignore_index: int = 255,
        zero_is_ignored: bool = False,
        label_map: Mapping[int, int] | None = None,
        palette: Path | str | Sequence[Colour] | None = None,
        names_file: Path | None = None,
        image_suffix: str | None = None,
        label_suffix: str | None = None,
        transform: Transform | None = None,
        seed: int = 0,
        cache_bytes: int = 0,
    ) -> "LabelDataset":
        """Images and label images of the same names, in two folders or below them.

        A label image has one channel (grey of 8 or 16 bits, or indices of a palette) that holds classes, or it is an
        RGB image whose colours `palette` lists.

        Args:
            images: folder of images.
            labels: folder of label images.
            classes: names of the classes, or
            num_classes: their number.
            ignore_index: label of pixels of which nothing is known; the same value in a file means that too.
            zero_is_ignored: 0 in a file means that nothing is known, and classes are counted from 1 (ADE20K).
            label_map: class of a value in the files; all other values are ignored.
            palette: RGB colours of the classes, or a file of them, see `read_palette`.
            names_file: which images are part of the set, see `read_names`; None: all, and each label has an image.
            image_suffix: what an image's name has beyond that of the pair, such as "_leftImg8bit.png"; others are no
                images. None: the extension, whatever it is.
            label_suffix: the same of label images.
            transform, seed, cache_bytes: as of the class.

        Raises:
            ConfigError: a folder is missing or empty, an image lacks its label or a label its image, or options
                contradict each other.
        """
        images, labels = Path(images), Path(labels)
        colours = read_palette(Path(palette)) if isinstance(palette, Path | str) else Palette(tuple(palette or ()))
        names = _class_names(classes, num_classes, colours)
        source = str(labels)
        check_classes(len(names), ignore_index)
        reader = _Folder(
            num_classes=len(names),
            table=_table(len(names), ignore_index, zero_is_ignored=zero_is_ignored, label_map=label_map),
            palette=colours,
            ignore_index=ignore_index,
        )
        return cls(
            find_pairs(images, labels, names_file, image_suffix=image_suffix, label_suffix=label_suffix),
            reader,
            classes=names,
            palette=colours.colours,
            ignore_index=ignore_index,
            source=source,
            transform=transform,
            seed=seed,
            cache_bytes=cache_bytes,
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """The image, float32 (3, h, w) in 0..1, and {"labels": (h, w) int64, "image_id": index}, as drawn for the epoch
        of `set_epoch`."""
        return self.sample(index, epoch=int(self._epoch))

    def set_epoch(self, epoch: int) -> None:
        """Which draws of the augmentation follow. Workers follow suit, also those that live over several epochs."""
        self._epoch.fill_(epoch)

    @property
    def names(self) -> tuple[str, ...]:
        """Of every index, the relative path that image and label have in common."""
        return tuple(pair.name for pair in self.pairs)

    def path(self, index: int) -> Path:
        """The image file."""
        return self.pairs[index].image

    def label_path(self, index: int) -> Path:
        """The label file."""
        return self.pairs[index].label

    def sample(self, index: int, epoch: int) -> tuple[Tensor, Target]:
        """Like indexing, for an epoch that is given: a function of (seed, epoch, index) and nothing else.

        Raises:
            ConfigError: a file cannot be read, the two differ in size, or a label is no class.
        """
        image, labels = self._decoded(index)
        target: Target = {"labels": labels, "image_id": index}
        if self.transform is None:
            picture = image.float().div_(255)
        else:
            picture, target = self.transform(image, target, sample_generator(self.seed, epoch, index))
        return picture, {**target, "labels": target["labels"].to(torch.int64)}

    def _decoded(self, index: int) -> tuple[Tensor, Tensor]:
        if index in self._cache:
            return self._cache[index]
        pair = self.pairs[index]
        labels = torch.from_numpy(self._read_labels(pair).astype(self._dtype))
        image = _image_of(pair, (labels.shape[0], labels.shape[1]))
        cost = image.numel() + labels.numel() * labels.element_size()
        if cost <= self._cache_left:
            self._cache_left -= cost
            self._cache[index] = image, labels
        return image, labels


@dataclass(frozen=True)
class Palette:
    """RGB colours of the classes, names if there are any, and colours that mean that nothing is known of a pixel."""

    colours: tuple[Colour, ...] = ()
    names: tuple[str, ...] = ()
    ignored: tuple[Colour, ...] = ()

    def __post_init__(self) -> None:
        every = (*self.colours, *self.ignored)
        for colour in every:
            if len(colour) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in colour):
                raise ConfigError(f"palette: {colour} is not a colour; give red, green and blue from 0 to 255")
        twice = [colour for colour, count in Counter(every).items() if count > 1]
        if twice:
            raise ConfigError(f"palette: colour {twice[0]} stands for two classes; give each its own")


def read_palette(path: Path) -> Palette:
    """Read colours of classes: lines `red green blue name` (commas or spaces, the name optional), or a JSON list of
    [red, green, blue]. Line number is class; the name `ignore` marks a colour of pixels of which nothing is known.

    Raises:
        ConfigError: the file is missing, or a line is not a colour.
    """
    text = _text(path, "the palette")
    if text.lstrip().startswith("["):
        try:
            return Palette(tuple((int(r), int(g), int(b)) for r, g, b in json.loads(text)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: is not a list of [red, green, blue] ({error})") from error
    colours: list[Colour] = []
    ignored: list[Colour] = []
    names: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.replace(",", " ").split(maxsplit=3)
        if not words:
            continue
        try:
            red, green, blue = (int(word) for word in words[:3])
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {line!r} is not `red green blue name`") from error
        name = words[3] if len(words) == 4 else ""
        if name == "ignore":
            ignored.append((red, green, blue))
        else:
            colours.append((red, green, blue))
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
    text = _text(path, "the list of names")
    if text.lstrip().startswith("{"):
        try:
            names = [str(image["file_name"]) for image in json.loads(text)["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: is no COCO file with images and their file_name ({error!r})") from error
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise ConfigError(f"{path}: names no images; write one name on each line")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"{path}: names {_some(twice)} more than once; leave one of each")
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
    `LabelDataset.from_folders` for the arguments and what is wrong with them."""
    pictures = _by_name(images, SUFFIXES, image_suffix, "images")
    truths = _by_name(labels, LABEL_SUFFIXES, label_suffix, "label images")
    ends = f" (images end with {image_suffix or 'any extension'}, labels with {label_suffix or 'any extension'})"
    if names_file is None:
        names = list(pictures)
        if extra := [name for name in truths if name not in pictures]:
            raise ConfigError(
                f"{labels}: {len(extra)} of {len(truths)} labels have no image in {images}: {_some(extra)}{ends}; "
                "add the images, set the suffixes, or name the images that count in a names_file"
            )
    else:
        suffixes = (image_suffix, label_suffix)
        names = [_stem(name, suffixes) for name in read_names(names_file)]
        if missing := [name for name in names if name not in pictures]:
            raise ConfigError(
                f"{names_file}: {len(missing)} of its {len(names)} names have no image in {images}: "
                f"{_some(missing)}{ends}; correct the list, or the folder"
            )
    if missing := [name for name in names if name not in truths]:
        raise ConfigError(
            f"{images}: {len(missing)} of {len(names)} images have no label in {labels}: {_some(missing)}{ends}; "
            "add the labels, remove the images, set the suffixes, or name the images that count in a names_file"
        )
    return tuple(Pair(name, pictures[name], truths[name]) for name in names)


def check_classes(num_classes: int, ignore_index: int) -> None:
    """
    Raises:
        ConfigError: there are no classes or too many, or `ignore_index` is one of them.
    """
    if not 1 <= num_classes <= _VALUES:
        raise ConfigError(f"num_classes is 1 to {_VALUES}, not {num_classes}")
    if 0 <= ignore_index < num_classes:
        raise ConfigError(
            f"ignore_index {ignore_index} is one of the {num_classes} classes; choose a value outside of them "
            "(where 0 in the files means that nothing is known, zero_is_ignored says so)"
        )


@dataclass(frozen=True, eq=False)
class _Folder:
    """Reads label images of one channel through a table of their values, others through the palette."""

    num_classes: int
    table: np.ndarray
    palette: Palette
    ignore_index: int

    def __call__(self, pair: Pair) -> np.ndarray:
        values = read_values(pair.label)
        if values.ndim == 3:
            if not self.palette.colours:
                raise ConfigError(
                    f"{pair.label}: is an RGB image, where labels are the numbers of classes in one channel; give a "
                    "palette that lists the colour of each class, or save the labels as grey or palette images"
                )
            return self._from_colours(pair, values)
        if values.dtype != np.uint8 and not (values.min() >= 0 and values.max() < _VALUES):
            low, high = int(values.min()), int(values.max())
            raise ConfigError(f"{pair.label}: its values go from {low} to {high}; labels are from 0 to {_VALUES - 1}")
        labels = self.table[values]
        wrong = labels == _UNKNOWN
        if wrong.any():
            number, count = Counter(values[wrong].tolist()).most_common(1)[0]
            raise ConfigError(
                f"{pair.label}: value {number} ({count} pixels) is none of the {self.num_classes} classes and not "
                f"ignored ({self.ignore_index}); correct num_classes, set zero_is_ignored or a label_map, or the file"
            )
        return labels

    def _from_colours(self, pair: Pair, values: np.ndarray) -> np.ndarray:
        entries = {colour: label for label, colour in enumerate(self.palette.colours)}
        entries.update(dict.fromkeys(self.palette.ignored, self.ignore_index))
        packed = {r << 16 | g << 8 | b: label for (r, g, b), label in entries.items()}
        wide = values.astype(np.int32)
        colours = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
        labels, wrong = look_up(colours, packed)
        if wrong.any():
            number, count = Counter(colours[wrong].tolist()).most_common(1)[0]
            rgb = (number >> 16, number >> 8 & 255, number & 255)
            raise ConfigError(
                f"{pair.label}: colour {rgb} ({count} pixels) is not in the palette; add it there (with the name "
                "`ignore` if nothing is known of such pixels), or correct the file"
            )
        return labels


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


def look_up(values: np.ndarray, entries: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """`entries[v]` of every value, int32, and a mask of the values that have no entry."""
    keys = np.array(sorted(entries), dtype=np.int64)
    targets = np.array([entries[key] for key in keys.tolist()], dtype=np.int32)
    places = np.searchsorted(keys, values).clip(max=len(keys) - 1)
    return targets[places], keys[places] != values


def _image_of(pair: Pair, size: tuple[int, int]) -> Tensor:
    """The image, uint8 (3, h, w), of the size of its labels."""
    try:
        return to_tensor(read_image(pair.image, size=size))
    except ConfigError:
        image = read_image(pair.image)  # an image that cannot be read says so here
        raise ConfigError(
            f"{pair.label}: the labels are {size[1]}x{size[0]} pixels, their image {pair.image} is "
            f"{image.width}x{image.height}; use the labels of this very image"
        ) from None


def _table(
    num_classes: int, ignore_index: int, *, zero_is_ignored: bool, label_map: Mapping[int, int] | None
) -> np.ndarray:
    """The label of every value that a file may hold, int32; `_UNKNOWN` for values that it may not."""
    if label_map is not None and zero_is_ignored:
        raise ConfigError("zero_is_ignored and label_map both say what values mean; use one of them")
    table = np.full(_VALUES, ignore_index if label_map is not None else _UNKNOWN, dtype=np.int32)
    if label_map is None:
        first = int(zero_is_ignored)
        labels = np.arange(min(num_classes, _VALUES - first))
        table[:first] = ignore_index
        table[first : first + len(labels)] = labels
        if first + num_classes <= ignore_index < _VALUES:
            table[ignore_index] = ignore_index
        return table
    for value, label in label_map.items():
        if label != ignore_index and not 0 <= label < num_classes:
            raise ConfigError(f"label_map: {value} becomes {label}, which is none of the {num_classes} classes")
        if 0 <= value < _VALUES:  # Cityscapes lists a value of -1
            table[value] = label
    return table


def _class_names(classes: Sequence[str] | None, num_classes: int | None, palette: Palette) -> tuple[str, ...]:
    given = tuple(classes) if classes is not None else palette.names
    count = num_classes if num_classes is not None else len(given) or len(palette.colours)
    if not count:
        raise ConfigError("labels: how many classes are there? Give num_classes, or classes by name")
    if given and len(given) != count:
        raise ConfigError(f"labels: {len(given)} classes are named, num_classes is {count}; they have to agree")
    return given or tuple(f"class {index}" for index in range(count))


def _storage(num_classes: int, ignore_index: int) -> type[np.generic]:
    """The smallest type that holds every label."""
    if 0 <= ignore_index <= 255 and num_classes <= 256:
        return np.uint8
    return np.int16 if -(2**15) <= ignore_index < 2**15 and num_classes <= 2**15 else np.int32


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


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:_FEW])) + (", ..." if len(names) > _FEW else "")


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {what} cannot be read ({error})") from error
