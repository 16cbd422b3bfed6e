"""The data sets of the papers: their classes, and where their files lie as they are usually unpacked."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from sievit.config import ConfigError, nearest
from sievit.data.coco import Transform
from sievit.data.label_files import Colour, Palette, read_palette
from sievit.data.labels import LabelDataset

_CLASSES = Path(__file__).parent / "classes"


@dataclass(frozen=True)
class Part:
    """The files of one part of a data set, relative to its folder; `names` lists the images, None means all."""

    images: Path
    labels: Path
    names: Path | None = None


@dataclass(frozen=True, kw_only=True)
class LabelPreset:
    """A data set as it is unpacked.

    Attributes:
        class_file: palette file in the folder `classes` that lists classes and colours.
        without_first: whether the first of these is left out: the background of Pascal Context 59.
        train, val: its parts.
        image_suffix, label_suffix: what the names of a pair have behind what they have in common.
        zero_is_ignored: 0 in the files means that nothing is known, and classes are counted from 1.
        values: value in the files of each class, in the order of the classes; None: the classes themselves.
    """

    class_file: str
    without_first: bool = False
    train: Part
    val: Part
    image_suffix: str
    label_suffix: str
    zero_is_ignored: bool = False
    values: tuple[int, ...] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the labels."""
        return _palette(self.class_file).names[int(self.without_first) :]

    @property
    def palette(self) -> tuple[Colour, ...]:
        """A colour for each class; the data set's own where it has some."""
        return _palette(self.class_file).colours[int(self.without_first) :]

    def open(
        self,
        root: Path,
        part: Literal["train", "val"],
        *,
        transform: Transform | None = None,
        seed: int = 0,
        cache_bytes: int = 0,
    ) -> LabelDataset:
        """A part of the data set, 255 where nothing is known; see `LabelDataset` for the options.

        Args:
            root: the folder that holds the files.
            part: which.

        Raises:
            ConfigError: files are missing.
        """
        where = {"train": self.train, "val": self.val}[part]
        return LabelDataset.from_folders(
            root / where.images,
            root / where.labels,
            classes=self.classes,
            palette=self.palette,
            zero_is_ignored=self.zero_is_ignored,
            label_map=None if self.values is None else {value: label for label, value in enumerate(self.values)},
            names_file=None if where.names is None else root / where.names,
            image_suffix=self.image_suffix,
            label_suffix=self.label_suffix,
            transform=transform,
            seed=seed,
            cache_bytes=cache_bytes,
        )


def _parts(images: str, labels: str, train: str, val: str, names: str | None = None) -> tuple[Part, Part]:
    """Paths of both parts from patterns in which {} stands for the part's name."""
    first, second = (
        Part(Path(images.format(name)), Path(labels.format(name)), None if names is None else Path(names.format(name)))
        for name in (train, val)
    )
    return first, second


_ADE20K = _parts("images/{}", "annotations/{}", "training", "validation")
_COCO_STUFF = _parts("images/{}", "annotations/{}", "train2014", "test2014")
_CITYSCAPES = _parts("leftImg8bit/{}", "gtFine/{}", "train", "val")
_PASCAL_CONTEXT = _parts(
    "JPEGImages", "SegmentationClassContext", "train", "val", names="ImageSets/SegmentationContext/{}.txt"
)

_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # of the ids 1 to 182 of things and stuff in COCO

PRESETS = {
    "ade20k": LabelPreset(
        class_file="ade20k.txt",
        train=_ADE20K[0],
        val=_ADE20K[1],
        image_suffix=".jpg",
        label_suffix=".png",
        zero_is_ignored=True,
    ),
    "coco_stuff10k": LabelPreset(
        class_file="coco_stuff.txt",
        train=_COCO_STUFF[0],
        val=_COCO_STUFF[1],
        image_suffix=".jpg",
        label_suffix="_labelTrainIds.png",
        zero_is_ignored=True,
    ),
    "coco_stuff10k_ids": LabelPreset(
        class_file="coco_stuff.txt",
        train=_COCO_STUFF[0],
        val=_COCO_STUFF[1],
        image_suffix=".jpg",
        label_suffix=".png",
        values=tuple(number for number in range(1, 183) if number not in _UNUSED_IDS),
    ),
    "pascal_context59": LabelPreset(
        class_file="pascal_context.txt",
        without_first=True,
        train=_PASCAL_CONTEXT[0],
        val=_PASCAL_CONTEXT[1],
        image_suffix=".jpg",
        label_suffix=".png",
        zero_is_ignored=True,
    ),
    "pascal_context60": LabelPreset(
        class_file="pascal_context.txt",
        train=_PASCAL_CONTEXT[0],
        val=_PASCAL_CONTEXT[1],
        image_suffix=".jpg",
        label_suffix=".png",
    ),
    "cityscapes": LabelPreset(
        class_file="cityscapes.txt",
        train=_CITYSCAPES[0],
        val=_CITYSCAPES[1],
        image_suffix="_leftImg8bit.png",
        label_suffix="_gtFine_labelTrainIds.png",
    ),
    "cityscapes_ids": LabelPreset(
        class_file="cityscapes.txt",
        train=_CITYSCAPES[0],
        val=_CITYSCAPES[1],
        image_suffix="_leftImg8bit.png",
        label_suffix="_gtFine_labelIds.png",
        values=(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
    ),
}
"""ADE20K (SceneParsing); COCO-Stuff-10K with labels from 1 to 171, or with COCO's own ids; Pascal Context without and
with its background; Cityscapes with the 19 classes that are judged, or with the ids that it is delivered with."""


def preset(name: str) -> LabelPreset:
    """
    Raises:
        ConfigError: there is no data set of this name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no data set is called {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]


@cache
def _palette(name: str) -> Palette:
    return read_palette(_CLASSES / name)
