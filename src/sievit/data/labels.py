"""A data set of images and label images: folders of files that belong together by name, or COCO's panoptic files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sievit.config import ConfigError
from sievit.data.coco import Target, Transform, sample_generator
from sievit.data.images import read_image, to_tensor
from sievit.data.label_files import Colour, LabelReader, Pair, Palette, check_classes, find_pairs, read_palette
from sievit.data.panoptic import load_panoptic

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
        reader = LabelReader(
            len(names),
            ignore_index=ignore_index,
            zero_is_ignored=zero_is_ignored,
            label_map=label_map,
            palette=colours,
        )
        return cls(
            find_pairs(images, labels, names_file, image_suffix=image_suffix, label_suffix=label_suffix),
            reader,
            classes=names,
            palette=colours.colours,
            ignore_index=ignore_index,
            source=str(labels),
            transform=transform,
            seed=seed,
            cache_bytes=cache_bytes,
        )

    @classmethod
    def from_panoptic(
        cls,
        images: Path,
        panoptic_json: Path,
        panoptic_folder: Path,
        *,
        ignore_index: int = 255,
        transform: Transform | None = None,
        seed: int = 0,
        cache_bytes: int = 0,
    ) -> "LabelDataset":
        """COCO's panoptic files as semantic labels: things and stuff alike are classes, in the order of the file's
        categories; crowd regions and pixels of no segment are ignored.

        Args:
            images: folder that the images' `file_name`s are relative to.
            panoptic_json: the panoptic file.
            panoptic_folder: its PNGs, which hold segment ids as colours.
            ignore_index: label of pixels of which nothing is known.
            transform, seed, cache_bytes: as of the class.

        Raises:
            ConfigError: a folder or file is missing, or the JSON is no panoptic file.
        """
        panoptic = load_panoptic(Path(images), Path(panoptic_json), Path(panoptic_folder), ignore_index)
        return cls(
            panoptic.pairs,
            panoptic.read_labels,
            classes=panoptic.classes,
            palette=panoptic.palette,
            ignore_index=ignore_index,
            source=str(panoptic_json),
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
