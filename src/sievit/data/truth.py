"""The annotations that a model is compared with, as they are found on disk: COCO's boxes and masks, or label images."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sievit.config import Config, ConfigError, Count
from sievit.data.coco import CocoDetection
from sievit.data.labels import LabelDataset


@dataclass(frozen=True, kw_only=True)
class Truth(Config):
    """The annotations of images: --annotations of objects, or --labels of pixels.

    Attributes:
        annotations: COCO annotation file, for models that find objects.
        labels: folder of label images, for models that label pixels: grey or palette images whose values are classes.
        names: file that lists the images of the set, by a name per line or in COCO's format; default all.
        panoptic: COCO's panoptic JSON; --labels is then the folder of its PNGs.
        image_suffix: end of the images' file names, behind what they have in common with their labels'.
        label_suffix: end of the label images' file names, e.g. _gtFine_labelTrainIds.png.
        zero_is_ignored: 0 in the label images means unknown, and classes are counted from 1.
        palette: file with a line `red green blue name` for each class, for label images in these colours.
        max_detections: the best so many of an image and class are judged; COCO's is 100.
    """

    annotations: Path | None = None
    labels: Path | None = None
    names: Path | None = None
    panoptic: Path | None = None
    image_suffix: str | None = None
    label_suffix: str | None = None
    zero_is_ignored: bool = False
    palette: Path | None = None
    max_detections: Count = 100

    def _require_only(self, *names: str) -> None:
        """Raise a ConfigError if another option was given, for it would have no effect."""
        others = [f.name for f in fields(self) if f.name not in names and getattr(self, f.name) != f.default]
        if others:
            named = " and ".join(f"--{name.replace('_', '-')}" for name in others)
            raise ConfigError(f"{named}: has no effect on this model; it takes --{' --'.join(names).replace('_', '-')}")

    @property
    def given(self) -> bool:
        """Whether there is anything to compare with."""
        return self.annotations is not None or self.labels is not None

    def open_boxes(self, images: Path, category_ids: Sequence[int]) -> CocoDetection:
        """The images and their boxes for a model of these categories; masks stay in the file.

        Raises:
            ConfigError: no annotations are given, they cannot be read, or are of other categories.
        """
        if self.annotations is None or self.labels is not None:
            raise ConfigError("this model is judged by --annotations, a file in COCO's format, and by no --labels")
        self._require_only("annotations", "max_detections")
        options: dict[str, Any] = {"with_masks": False, "max_detections": self.max_detections, "advice": {}}
        dataset = CocoDetection(images, self.annotations, **options)
        if dataset.category_ids != category_ids:
            raise ConfigError(
                f"{self.annotations}: its category ids {_listed(dataset.category_ids)} are not those that the model "
                f"was trained for, {_listed(category_ids)}"
            )
        return dataset

    def open_labels(
        self,
        images: Path,
        classes: tuple[str, ...],
        *,
        ignore_index: int = 255,
        values: Sequence[int] | None = None,
        **options: Any,
    ) -> LabelDataset:
        """The images and their labels for a model of these classes.

        Args:
            ignore_index: label of pixels of which nothing is known.
            values: of each class in the label images; None: the classes themselves.
            options: `transform`, `seed` and `cache_bytes` of `LabelDataset`.

        Raises:
            ConfigError: no labels are given, they do not belong to the images, or are of other classes.
        """
        if self.labels is None or self.annotations is not None:
            raise ConfigError("this model is judged by --labels, a folder of label images, and by no --annotations")
        self._require_only(*(each.name for each in fields(self) if each.name not in ("annotations", "max_detections")))
        dataset = LabelDataset(
            images,
            self.labels,
            panoptic=self.panoptic,
            classes=classes,
            zero_is_ignored=self.zero_is_ignored,
            label_map=None if values is None else {value: label for label, value in enumerate(values)},
            palette=self.palette,
            names_file=self.names,
            image_suffix=self.image_suffix,
            label_suffix=self.label_suffix,
            ignore_index=ignore_index,
            **options,
        )
        if dataset.classes != classes:
            raise ConfigError(
                f"{dataset.source}: its {len(dataset.classes)} classes {_listed(dataset.classes)} are not the model's "
                f"{len(classes)}, {_listed(classes)}"
            )
        return dataset


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
