"""Detection and instance segmentation: boxes and masks in COCO's format."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from sievit import viz
from sievit.config import ConfigError, Count, variant
from sievit.data.annotations import load_categories
from sievit.data.coco import CocoDetection
from sievit.data.coco_json import CocoFile
from sievit.data.transforms import Augment, AugmentConfig
from sievit.data.truth import Truth
from sievit.files import writing
from sievit.heads.rpn import best_overlaps
from sievit.models.detector import DetectorConfig
from sievit.tasks.base import CACHE, DataConfig, Metric, Region, Task, Writer, register_task
from sievit.tasks.metrics import CocoMetric, coco_results, encode_masks
from sievit.text import is_text

MISSED = 0.05
"""Share of the training objects without an anchor, mean over classes, from which on it is said."""
Detections = dict[str, Tensor]
"""torchvision's: boxes (d, 4) xyxy pixels, labels (d,) from 1, scores (d,), masks (d, 1, h, w) if there are any."""

_ADVICE = {"invalid": "--data.invalid skip", "with_masks": "--model.head.with-masks False"}
"""What to do about annotation files in training, in the words of the command."""


@variant("coco")
@dataclass(frozen=True, kw_only=True)
class CocoData(DataConfig):
    """Boxes and masks in COCO's format.

    Attributes:
        max_detections: per image, in evaluation. COCO's is 100.
        invalid: what to do about annotations that cannot be used.
        skip_empty: leave training images without an object out.
        own_classes: the model gets the classes of `train_annotations`, not those of the recipe.
    """

    train_annotations: Path
    val_annotations: Path
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    max_detections: Count = 100
    invalid: Literal["error", "skip"] = "error"
    skip_empty: bool = False
    own_classes: bool = False


@register_task("detector")
class DetectionTask(Task[Detections]):
    """Average precision of boxes, and of masks where both the model and the truth have them."""

    config: DetectorConfig
    data_config = CocoData
    has_scores = True
    agreed = 0.99, "detections"
    shown = ("mask_ap", "box_ap", "mask_ap50", "box_ap50")

    def open(self, images: Path, truth: Truth) -> CocoDetection:
        return truth.open_boxes(images, self.config.category_ids)

    def open_training(self, data: CocoData, root: Path, *, seed: int) -> tuple[CocoDetection, CocoDetection]:
        train = CocoDetection(
            root / data.train_images,
            root / data.train_annotations,
            transform=Augment(data.augment),
            with_masks=self.config.head.with_masks,
            invalid=data.invalid,
            skip_empty=data.skip_empty,
            seed=seed,
            cache_bytes=CACHE,
            advice=_ADVICE,
        )
        val = CocoDetection(
            root / data.val_images,
            root / data.val_annotations,
            with_masks=False,
            invalid=data.invalid,
            max_detections=data.max_detections,
            advice=_ADVICE,
        )
        for source, path in ((train, data.train_annotations), (val, data.val_annotations)):
            if source.category_ids != self.config.category_ids:
                raise ConfigError(
                    f"{root / path}: its categories {_named(source.classes)} are not the model's "
                    f"{_named(self.config.classes)}; --data.own-classes takes those of "
                    f"{data.train_annotations.name}"
                )
        return train, val

    def remarks(self, train: CocoDetection) -> list[str]:
        """Of objects that no anchor fits, which proposals learn nothing of: how many there are, and a way out."""
        anchors, least = self.config.head.anchors, self.config.head.rpn.low_quality_iou
        scales = [self.config.input.test_size(size)[0] / size[0] for size in train.sizes]
        boxes = torch.cat([scale * boxes for scale, (boxes, _) in zip(scales, train.objects, strict=True)])
        labels = torch.cat([labels for _, labels in train.objects])
        if not len(boxes):
            return []

        def missed(factor: float) -> dict[int, float]:
            out = (best_overlaps(anchors.scaled(factor), boxes) < least).float()
            return {label: out[labels == label].mean().item() for label in labels.unique().tolist()}

        by_class = missed(1)
        here = fmean(by_class.values())
        if here < MISSED:
            return []
        means = {factor: fmean(missed(factor).values()) for factor in (0.25, 0.35, 0.5, 0.7, 1.4, 2, 2.8, 4)}
        worst = sorted(by_class, key=lambda label: -by_class[label])[:3]
        named = ", ".join(f"{self.config.classes[label - 1]} {by_class[label]:.0%}" for label in worst)
        text = f"{here:.0%} of the training objects (mean over classes; {named}) overlap no anchor by {least:g}"
        best = min(means, key=lambda factor: means[factor])
        way_out = "other sizes hardly help, other shapes may: --model.head.anchors.ratios"
        if means[best] <= 0.6 * here:
            sizes = " ".join(f"{size:.0f}" for level in anchors.scaled(best).sizes for size in level)
            way_out = f"of {best:g} times the size it is {means[best]:.0%}: --model.head.anchors.sizes.0 to .4, {sizes}"
        return [f"{text} at the size of the model's images, and proposals cannot learn them; {way_out}"]

    def classes_of(self, data: CocoData, root: Path) -> DetectorConfig:
        if not data.own_classes:
            return self.config
        classes, ids = load_categories(root / data.train_annotations)
        head = replace(self.config.head, num_classes=len(classes))
        return replace(self.config, classes=classes, category_ids=ids, head=head)

    def with_classes(
        self, data: CocoData, num_classes: int | None, ignore_index: int | None, palette: Path | None
    ) -> tuple[DetectorConfig, CocoData]:
        raise ConfigError(
            "num-classes, ignore-index and palette are those of a segmenter; this recipe is a detector's: "
            "--data.own-classes takes the classes of its annotation file"
        )

    def metric(self, data: CocoDetection) -> Metric[Detections]:
        with_masks = self.config.head.with_masks and data.annotations.has_masks
        metric = CocoMetric(data.annotations, with_masks=with_masks, max_detections=data.max_detections)
        return Metric(
            lambda target, found: metric.update(target["image_id"], found),
            metric.compute,
            metric.resampled,
            metric.parts,
        )

    def picture(self, image: viz.Picture, result: Detections, *, min_score: float, box: tuple[int, int]) -> Image.Image:
        return viz.predictions(image, result, self.config.classes, min_score=min_score, box=box)

    def regions(self, target: dict[str, Any], size: tuple[int, int]) -> list[Region]:
        """The boxes of the objects."""
        found = []
        for label, box, area in zip(*(target[name].tolist() for name in ("labels", "boxes", "area")), strict=True):
            x0, y0, x1, y1 = (round(edge) for edge in box)
            pixels = torch.zeros(size, dtype=torch.bool)
            pixels[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
            found.append(Region(label - 1, pixels, area))
        return found

    def only_in(self, result: Detections, other: Detections, *, min_score: float) -> Detections:
        """Objects are the same where class is, and boxes overlap by half (IoU)."""
        mine, theirs = (found["scores"] >= min_score for found in (result, other))
        same = box_iou(result["boxes"], other["boxes"][theirs]) >= 0.5
        same &= result["labels"][:, None] == other["labels"][theirs]
        chosen = mine & ~same.any(1)
        return {name: values[chosen] for name, values in result.items()}

    def disagreement(self, result: Detections, other: Detections, *, min_score: float) -> float:
        pairs = (result, other), (other, result)
        alone = sum(len(self.only_in(a, b, min_score=min_score)["scores"]) for a, b in pairs)
        return alone / max(1, sum(int((found["scores"] >= min_score).sum()) for found in (result, other)))

    def agreement(self, result: Detections, other: Detections) -> tuple[int, int]:
        """Detections of both, the same in class, edges of the box (0.5 pixels), score (0.001) and mask (IoU 0.9)."""
        same = (result["boxes"][:, None] - other["boxes"]).abs().amax(2) <= 0.5
        same &= (result["scores"][:, None] - other["scores"]).abs() <= 1e-3
        same &= result["labels"][:, None] == other["labels"]
        for i, j in same.nonzero().tolist() if "masks" in result else ():
            mine, its = result["masks"][i], other["masks"][j]
            same[i, j] = int((mine & its).sum()) >= 0.9 * int((mine | its).sum())
        return int(same.any(1).sum() + same.any(0).sum()), sum(same.shape)

    def summary(self, result: Detections, *, min_score: float) -> str:
        return f"{int((result['scores'] >= min_score).sum())} objects"

    def to_json(self, result: Detections) -> dict[str, Any]:
        """`columns`, the masks as values, and `names` of the labels; the best first."""
        found = super().to_json(result)
        masks = {"masks": json.loads(found["masks"])} if "masks" in found else {}
        return {**found, **masks, "names": [self.config.classes[label - 1] for label in found["labels"]]}

    def columns(self, result: Detections | None) -> dict[str, Any]:
        """boxes (d, 4) float32, xyxy pixels; labels (d,) int64, from 1; scores (d,) float32; and where the model has
        masks, those as JSON: a list of COCO's compressed RLE."""
        found = result or {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
        values: dict[str, Any] = {name: found[name].float().cpu().numpy() for name in ("boxes", "scores")}
        values["labels"] = found["labels"].cpu().numpy()
        if self.config.head.with_masks:
            values["masks"] = json.dumps(encode_masks(found["masks"]) if result else [])
        return values

    def writer(
        self, out: Path, names: Sequence[str], *, ids: Path | Mapping[str, int] | None = None
    ) -> Writer[Detections]:
        return _CocoWriter(self, out, _image_ids(names, ids))

    def categories(self) -> list[dict[str, Any]]:
        pairs = zip(self.config.category_ids, self.config.classes, strict=True)
        return [{"id": i, "name": name} for i, name in pairs]

    def annotations(self, result: Detections) -> list[dict[str, Any]]:
        """With a box, a score, and where there are masks a segmentation."""
        found = coco_results(result, 0, self.config.category_ids)
        return [{name: value for name, value in each.items() if name != "image_id"} for each in found]


class _CocoWriter(Writer[Detections]):
    """results.json: COCO results; images.json: its images and categories, itself a COCO file."""

    shared = ("results.json", "images.json")

    def __init__(self, task: DetectionTask, out: Path, ids: Mapping[str, int]) -> None:
        self.task, self.out, self.ids = task, out, ids

    def add(self, name: str, size: tuple[int, int], result: Detections) -> dict[str, Any]:
        return {"width": size[1], "height": size[0], "detections": self.task.annotations(result)}

    def finish(self, added: Mapping[str, dict[str, Any]]) -> str:
        """Both files are written while the lines are read: what all images have may not fit into memory."""
        images = results = 0
        with writing(self.out / "images.json") as listing, writing(self.out / "results.json") as found:
            listing.write(b'{"images": [')
            found.write(b"[")
            for name, line in added.items():
                image = {"id": self.ids[name], "file_name": name, "width": line["width"], "height": line["height"]}
                listing.write((", " * (images > 0) + json.dumps(image)).encode())
                for each in line["detections"]:
                    found.write((", " * (results > 0) + json.dumps({"image_id": self.ids[name], **each})).encode())
                    results += 1
                images += 1
            listing.write(f'], "categories": {json.dumps(self.task.categories())}, "annotations": []}}'.encode())
            found.write(b"]")
        return f"{images} images, {results} detections: {self.out / 'results.json'}"


def _image_ids(names: Sequence[str], annotations: Path | Mapping[str, int] | None) -> Mapping[str, int]:
    """The image id of every file name: of a COCO file, as given, or else 1, 2, ... by name."""
    if isinstance(annotations, Mapping):
        return annotations
    if annotations is None:
        return {name: i for i, name in enumerate(names, start=1)}
    known = {
        image["file_name"]: image["id"] for image in CocoFile(annotations).records("images", {"file_name": is_text})
    }
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(
            f"{annotations}: has no id for {missing[0]} (nor for {len(missing) - 1} more); leave out --ids"
        )
    return known


def _named(classes: tuple[str, ...]) -> str:
    return f"({len(classes)}: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
