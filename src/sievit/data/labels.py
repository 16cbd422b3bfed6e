"""A data set of images and label images: folders of files that belong together by name, or COCO's panoptic files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sievit.config import ConfigError
from sievit.data.dataset import ImageDataset, Target, Transform
from sievit.data.images import read_image, to_tensor
from sievit.data.label_files import Colour, LabelReader, Palette, find_pairs, read_palette
from sievit.data.panoptic import load_panoptic


class LabelDataset(ImageDataset):
    """Images with a class for every pixel.

    Labels are 0-based; `classes[label]` says what they mean, `ignore_index` that nothing is known of a pixel, and
    `palette` has a colour for each class, or none.
    """

    def __init__(
        self,
        images: Path,
        labels: Path,
        *,
        panoptic: Path | None = None,
        classes: Sequence[str] | int | None = None,
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
    ) -> None:
        """Images and label images of the same names, in two folders or below them.

        A label image has one channel (grey of 8 or 16 bits, or indices of a palette) that holds classes, or it is an
        RGB image whose colours `palette` lists.

        Args:
            images: folder of images.
            labels: folder of label images.
            panoptic: COCO's panoptic JSON; `labels` is then the folder of its PNGs, and the JSON says what belongs
                together. Things and stuff alike are classes, in the order of the file's categories; crowd regions and
                pixels of no segment are ignored. Of the options below only `ignore_index` counts.
            classes: names of the classes, or their number; None: those of the palette.
            ignore_index: label of pixels of which nothing is known; the same value in a file means that too.
            zero_is_ignored: 0 in a file means that nothing is known, and classes are counted from 1 (ADE20K).
            label_map: class of a value in the files; all other values are ignored.
            palette: RGB colours of the classes, or a file of them, see `read_palette`.
            names_file: which images are part of the set, see `read_names`; None: all, and each label has an image.
            image_suffix: what an image's name has beyond that of the pair, such as "_leftImg8bit.png"; others are no
                images. None: the extension, whatever it is.
            label_suffix: the same of label images.
            transform, seed, cache_bytes: see `ImageDataset`.

        Raises:
            ConfigError: folders, files or labels of images are missing, or options contradict each other.
        """
        super().__init__(transform=transform, seed=seed, cache_bytes=cache_bytes)
        images, labels, self.ignore_index = Path(images), Path(labels), ignore_index
        self.source = str(labels if panoptic is None else panoptic)
        if panoptic is not None:
            self.pairs, self._reader = load_panoptic(images, Path(panoptic), labels, ignore_index)
        else:
            colours = read_palette(Path(palette)) if isinstance(palette, Path | str) else Palette(tuple(palette or ()))
            self._reader = LabelReader(
                classes=_names(classes, colours),
                palette=colours,
                ignore_index=ignore_index,
                zero_is_ignored=zero_is_ignored,
                label_map=label_map,
            )
            self.pairs = find_pairs(images, labels, names_file, image_suffix=image_suffix, label_suffix=label_suffix)
        self.classes, self.palette = self._reader.classes, self._reader.palette.colours
        self._dtype = np.uint8 if max(len(self.classes), ignore_index + 1) <= 256 and ignore_index >= 0 else np.int32

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def names(self) -> tuple[str, ...]:
        """Of every index, the relative path that image and label have in common."""
        return tuple(pair.name for pair in self.pairs)

    def path(self, index: int) -> Path:
        return self.pairs[index].image

    def files(self, index: int) -> tuple[Path, ...]:
        return self.pairs[index].image, self.pairs[index].label

    def read(self, index: int) -> tuple[Tensor, Target]:
        pair = self.pairs[index]
        labels = self._reader(pair.label)
        height, width = labels.shape
        try:
            image = read_image(pair.image, size=(height, width))
        except ConfigError:
            image = read_image(pair.image)  # an image that cannot be read is an error here
            raise ConfigError(
                f"{pair.label}: the labels are {width}x{height} pixels, their image {pair.image} is "
                f"{image.width}x{image.height}; use the labels of this very image"
            ) from None
        return to_tensor(image), {"labels": torch.from_numpy(labels.astype(self._dtype)), "image_id": index}


def _names(classes: Sequence[str] | int | None, palette: Palette) -> tuple[str, ...]:
    if classes is None:
        classes = palette.names or len(palette.colours)
    names = tuple(f"class {index}" for index in range(classes)) if isinstance(classes, int) else tuple(classes)
    if not names:
        raise ConfigError("labels: how many classes are there? Give classes, their number or their names")
    return names
