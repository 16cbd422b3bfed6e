"""The data sets of the papers: their classes, and where their files lie as they are usually unpacked."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from sievit.config import ConfigError, nearest
from sievit.data.label_files import Colour, Palette, read_palette

_CLASSES = Path(__file__).parent / "classes"


@dataclass(frozen=True, kw_only=True)
class LabelPreset:
    """A data set as it is unpacked.

    Attributes:
        class_file: palette file in the folder `classes` that lists classes and colours.
        without_first: whether the first of these is left out: the background of Pascal Context 59.
        images, labels, names: paths of a part, {} being its name.
        parts: names of the parts to train on and to validate on.
        image_suffix, label_suffix: what the names of a pair have behind what they have in common.
        zero_is_ignored: 0 in the files means that nothing is known, and classes are counted from 1.
        values: value in the files of each class, in the order of the classes; None: the classes themselves.
    """

    class_file: str
    without_first: bool = False
    images: str = "images/{}"
    labels: str = "annotations/{}"
    names: str | None = None
    parts: tuple[str, str] = ("train", "val")
    image_suffix: str = ".jpg"
    label_suffix: str = ".png"
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

    def files(self, folder: Path) -> dict[str, Path | None]:
        """Where the parts lie if the data set was unpacked into `folder`, by the fields of `LabelsData`."""
        return {
            f"{part}_{what}": None if path is None else folder / path.format(name)
            for part, name in zip(("train", "val"), self.parts, strict=True)
            for what, path in (("images", self.images), ("labels", self.labels), ("names", self.names))
        }


_COCO_STUFF = LabelPreset(
    class_file="coco_stuff.txt",
    parts=("train2014", "test2014"),
    label_suffix="_labelTrainIds.png",
    zero_is_ignored=True,
)
_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # of the ids 1 to 182 of things and stuff in COCO
_PASCAL_CONTEXT = LabelPreset(
    class_file="pascal_context.txt",
    images="JPEGImages",
    labels="SegmentationClassContext",
    names="ImageSets/SegmentationContext/{}.txt",
)
_CITYSCAPES = LabelPreset(
    class_file="cityscapes.txt",
    images="leftImg8bit/{}",
    labels="gtFine/{}",
    image_suffix="_leftImg8bit.png",
    label_suffix="_gtFine_labelTrainIds.png",
)

PRESETS = {
    "ade20k": LabelPreset(class_file="ade20k.txt", parts=("training", "validation"), zero_is_ignored=True),
    "coco_stuff10k": _COCO_STUFF,
    "coco_stuff10k_ids": replace(
        _COCO_STUFF,
        label_suffix=".png",
        zero_is_ignored=False,
        values=tuple(number for number in range(1, 183) if number not in _UNUSED_IDS),
    ),
    "pascal_context59": replace(_PASCAL_CONTEXT, without_first=True, zero_is_ignored=True),
    "pascal_context60": _PASCAL_CONTEXT,
    "cityscapes": _CITYSCAPES,
    "cityscapes_ids": replace(
        _CITYSCAPES,
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
