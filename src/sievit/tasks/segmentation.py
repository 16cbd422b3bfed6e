"""Semantic segmentation: a class for every pixel, in folders of label images or COCO's panoptic files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sievit import viz
from sievit.config import ConfigError, Label, variant
from sievit.data.label_files import read_palette
from sievit.data.labels import LabelDataset
from sievit.data.semantic import SemanticAugment, SemanticAugmentConfig
from sievit.data.truth import Truth
from sievit.files import write_json, write_png
from sievit.models.segmenter import SegmenterConfig
from sievit.tasks.base import CACHE, DataConfig, Metric, Region, Task, Writer, register_task
from sievit.tasks.metrics import SegmentationMetric, encode_masks

MOST_CLASSES = 8
"""For a row of a table each."""


@variant("labels")
@dataclass(frozen=True, kw_only=True)
class LabelsData(DataConfig):
    """Images with a class for every pixel: two folders each, or COCO's panoptic files.

    Attributes:
        train_labels, val_labels: folders of label images; with `panoptic` folders of its PNGs.
        train_names, val_names: files that list the images of the part, by name or as a COCO file; None for all.
        train_panoptic, val_panoptic: COCO's panoptic JSON files; None for folders of labels.
        image_suffix, label_suffix: what the names of a pair have behind what they have in common.
        zero_is_ignored: 0 in the files means that nothing is known, and classes are counted from 1.
        values: value in the files of each class, in the order of the classes; None: the classes themselves.
        palette: file with the colour of each class, for label images in colours, see `data.label_files.read_palette`.
    """

    train_labels: Path
    val_labels: Path
    train_names: Path | None = None
    val_names: Path | None = None
    train_panoptic: Path | None = None
    val_panoptic: Path | None = None
    image_suffix: str | None = None
    label_suffix: str | None = None
    zero_is_ignored: bool = False
    values: tuple[Label, ...] | None = None
    palette: Path | None = None
    augment: SemanticAugmentConfig = field(default_factory=SemanticAugmentConfig)


@register_task("segmenter")
class SegmentationTask(Task[Tensor]):
    """Mean intersection over union of the whole data set."""

    config: SegmenterConfig
    data_config = LabelsData
    agreed = 0.9999, "pixels"
    shown = ("miou", "pixel_accuracy")

    def open(self, images: Path, truth: Truth) -> LabelDataset:
        return truth.open_labels(images, self.config.classes, ignore_index=self.config.ignore_index)

    def open_training(self, data: LabelsData, root: Path, *, seed: int) -> tuple[LabelDataset, LabelDataset]:
        opened = []
        for part, augment in (("train", data.augment), ("val", None)):
            images, *paths = (getattr(data, f"{part}_{name}") for name in ("images", "labels", "names", "panoptic"))
            labels, names, panoptic, palette = (
                None if path is None else root / path for path in (*paths, data.palette)
            )
            truth = Truth(
                labels=labels,
                names=names,
                panoptic=panoptic,
                image_suffix=data.image_suffix,
                label_suffix=data.label_suffix,
                zero_is_ignored=data.zero_is_ignored,
                palette=palette,
            )
            opened.append(
                truth.open_labels(
                    root / images,
                    self.config.classes,
                    ignore_index=self.config.ignore_index,
                    values=data.values,
                    transform=None if augment is None else SemanticAugment(augment, self.config.ignore_index),
                    seed=seed,
                    cache_bytes=0 if augment is None else CACHE,
                )
            )
        return opened[0], opened[1]

    def with_classes(
        self, data: LabelsData, num_classes: int | None, ignore_index: int | None, palette: Path | None
    ) -> tuple[SegmenterConfig, LabelsData]:
        colours, names = self.config.palette, self.config.classes
        if palette is not None:
            read = read_palette(palette)
            colours, num_classes = read.colours, len(read.colours) if num_classes is None else num_classes
            names = read.names or names
            data = replace(data, palette=palette.resolve())
        if num_classes is not None and len(names) != num_classes:
            names = tuple(f"class {i}" for i in range(num_classes))
        if len(colours) != len(names):
            if palette is not None:
                raise ConfigError(f"{palette}: has {len(colours)} colours for {len(names)} classes; give one for each")
            colours = ()
        ignored = self.config.ignore_index if ignore_index is None else ignore_index
        return replace(self.config, classes=names, palette=colours, ignore_index=ignored), data

    def metric(self, data: LabelDataset) -> Metric[Tensor]:
        metric = SegmentationMetric(len(self.config.classes), self.config.ignore_index)
        return Metric(
            lambda target, labels: metric.update(labels, target["labels"]),
            metric.compute,
            metric.resampled,
            lambda draws: {"class": dict(zip(self.config.classes, metric.by_class(draws), strict=True))},
        )

    def accuracies(self, figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        yield from super().accuracies(figures)
        if len(self.config.classes) <= MOST_CLASSES:
            for name, iou in zip(self.config.classes, figures["iou"], strict=True):
                yield f"  IoU {name}", iou

    @property
    def colours(self) -> tuple[viz.Colour, ...]:
        """Of each class."""
        return self.config.palette or viz.palette(len(self.config.classes))

    def picture(self, image: viz.Picture, result: Tensor, *, min_score: float, box: tuple[int, int]) -> Image.Image:
        return viz.label_map(image, result, self.colours, box=box)

    def legend(self, results: Sequence[Tensor]) -> list[tuple[str, viz.Colour | None]]:
        """The classes of the pictures, the largest first, at most twenty."""
        count = len(self.config.classes)
        pixels = torch.zeros(count, dtype=torch.int64)
        for labels in results:
            values = labels.cpu().flatten()
            pixels += torch.bincount(values[(values >= 0) & (values < count)], minlength=count)
        largest = pixels.argsort(descending=True)[:20].tolist()
        return [(self.config.classes[i], self.colours[i]) for i in largest if pixels[i]]

    def as_result(self, target: dict[str, Any]) -> Tensor:
        return target["labels"]

    def regions(self, target: dict[str, Any], size: tuple[int, int]) -> list[Region]:
        labels = target["labels"]
        return [Region(k, labels == k) for k in labels.unique().tolist() if k != self.config.ignore_index]

    def to_json(self, result: Tensor) -> dict[str, Any]:
        """`columns`; `classes`, the names of the values, and `shares`, of the pixels, by class."""
        count = len(self.config.classes)
        pixels = torch.bincount(result.cpu().flatten(), minlength=count)[:count]
        return {
            **super().to_json(result),
            "classes": list(self.config.classes),
            "shares": [round(share, 5) for share in (pixels / result.numel()).tolist()],
        }

    def only_in(self, result: Tensor, other: Tensor, *, min_score: float) -> Tensor:
        """-1 where both are the same."""
        return torch.where(result == other, -1, result)

    def disagreement(self, result: Tensor, other: Tensor, *, min_score: float) -> float:
        return (result != other).double().mean().item()

    def agreement(self, result: Tensor, other: Tensor) -> tuple[int, int]:
        """Pixels of one class."""
        return int((result == other).sum()), result.numel()

    def columns(self, result: Tensor | None) -> dict[str, Any]:
        """label_map: a PNG of the image's size whose values are classes."""
        buffer = BytesIO()
        if result is not None:
            label_image(result, self.colours).save(buffer, format="png")
        return {"label_map": buffer.getvalue()}

    def annotations(self, result: Tensor) -> list[dict[str, Any]]:
        """One for each class that there is: all its pixels."""
        found = [k for k in result.unique().tolist() if 0 <= k < len(self.config.classes)]
        if not found:
            return []
        masks = torch.stack([result == k for k in found])
        pairs = zip(found, masks.sum((1, 2)).tolist(), encode_masks(masks), strict=True)
        return [{"category_id": k, "area": area, "segmentation": rle} for k, area, rle in pairs]

    def writer(self, out: Path, names: Sequence[str], *, ids: Path | Mapping[str, int] | None = None) -> Writer[Tensor]:
        if isinstance(ids, Path):
            raise ConfigError(f"--ids {ids}: a segmenter labels pixels and writes no COCO results; leave it out")
        return _LabelWriter(self.config.classes, self.colours, out)


def label_image(labels: Tensor, colours: Sequence[viz.Colour]) -> Image.Image:
    """Labels (h, w) as an image whose values they are: 8 bits with a palette, or 16 bits grey where there are more than
    256 classes."""
    values, few = labels.cpu().numpy(), len(colours) <= 256
    picture = Image.fromarray(values.astype(np.uint8 if few else np.uint16))
    if few:
        picture.putpalette([part for colour in colours for part in colour])
    return picture


class _LabelWriter(Writer[Tensor]):
    """labels/: PNGs of the images' sizes whose values are classes, with a palette; classes.json: name and colour of
    each value."""

    shared = ("classes.json",)

    def __init__(self, classes: Sequence[str], colours: Sequence[viz.Colour], out: Path) -> None:
        self.classes, self.colours, self.out = classes, colours, out

    def files(self, name: str) -> tuple[str, ...]:
        return (f"labels/{name}.png",)

    def add(self, name: str, size: tuple[int, int], result: Tensor) -> dict[str, Any]:
        write_png(self.out / self.files(name)[0], label_image(result, self.colours))
        return {}

    def finish(self, added: Mapping[str, dict[str, Any]]) -> str:
        pairs = enumerate(zip(self.classes, self.colours, strict=True))
        classes = [{"value": i, "name": name, "colour": list(colour)} for i, (name, colour) in pairs]
        write_json(self.out / "classes.json", classes)
        return f"{len(added)} label images: {self.out / 'labels'}"
