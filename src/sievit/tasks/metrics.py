"""Average precision as COCO defines it; `faster-coco-eval` does the work, pycocotools is the reference in the tests."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from sievit.config import ConfigError
from sievit.data.annotations import Annotations, load_annotations
from sievit.data.masks import encode, tight_patch
from sievit.distributed import gathered

Kind = Literal["bbox", "segm"]
KINDS: tuple[tuple[Kind, str], ...] = (("bbox", "box_"), ("segm", "mask_"))
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


class CocoMetric:
    """Collects the detections of a data set, image by image, and computes COCO's average precisions.

    Judged are the images that `update` was called for, in all processes together; an image that several processes had
    counts once. Crowd regions are handled as COCO does.
    """

    def __init__(
        self,
        annotations: Annotations | Path | dict[str, Any],
        *,
        with_masks: bool = True,
        max_detections: int = 100,
    ) -> None:
        """
        Args:
            annotations: the truth: `CocoDetection.annotations`, or a COCO instances file or its content.
            with_masks: whether mask figures are wanted besides those of the boxes.
            max_detections: the best so many of an image and class are judged. COCO's is 100.

        Raises:
            ConfigError: masks are to be judged and some object has none; or there is no object at all.
        """
        self.annotations = annotations if isinstance(annotations, Annotations) else load_annotations(annotations)
        if not any(not a["iscrowd"] for objects in self.annotations.objects for a in objects):
            raise ConfigError(
                f"{self.annotations.source}: holds no objects to judge by (crowd regions do not count); name a file "
                "that has the annotations of the images"
            )
        if with_masks and not self.annotations.has_masks:
            raise ConfigError(
                f"{self.annotations.source}: not every object has a segmentation, so masks cannot be judged; "
                "judge the boxes alone (with_masks=False)"
            )
        self.with_masks, self.max_detections = with_masks, max_detections
        self._known = {image["id"] for image in self.annotations.images}
        self._results: dict[int, list[dict[str, Any]]] = {}

    def update(self, image_id: int, detection: Mapping[str, Any]) -> None:
        """Add what was found in one image, in pixels of the original; see `coco_results` for the detection.

        Raises:
            ConfigError: the annotations do not list the image.
        """
        if int(image_id) not in self._known:
            raise ConfigError(
                f"{self.annotations.source}: lists no image with the id {image_id}; judge with the annotations of the "
                "images that were looked at"
            )
        self._results[int(image_id)] = coco_results(detection, image_id, self.annotations.category_ids)

    def reset(self) -> None:
        self._results = {}

    @property
    def results(self) -> list[dict[str, Any]]:
        """All detections of this process, in COCO's results format."""
        return [result for image_id in sorted(self._results) for result in self._results[image_id]]

    def gather(self) -> None:
        """Give every process the detections of all of them; nothing to do without a process group."""
        for part in gathered(self._results):
            self._results = {**part, **self._results}

    def compute(self) -> dict[str, float]:
        """box_ap, box_ap50, box_ap75, box_ap_small, box_ap_medium, box_ap_large, and mask_* if there are masks; 0..1,
        or -1 where there is no object to find. Gathers first: with several processes all of them have to call it."""
        self.gather()
        figures: dict[str, float] = {}
        for kind, prefix in KINDS[: 1 + self.with_masks]:
            figures |= self._average_precision(kind, prefix)
        return figures

    def resampled(self, draws: np.ndarray) -> dict[str, np.ndarray]:
        """AP and AP50 of boxes and of masks for draws of the images, which are numbered by rising id; (draws,) each."""
        figures: dict[str, list[float]] = {}
        for kind, prefix in KINDS[: 1 + self.with_masks]:
            for precision in self._drawn(kind, draws):
                for name, part in (("ap", precision[..., 0]), ("ap50", precision[0, ..., 0])):
                    figures.setdefault(prefix + name, []).append(_mean(part))
        return {name: np.array(values) for name, values in figures.items()}

    def parts(self, draws: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """AP by class and by size of the objects, of masks if there are masks, for draws as in `resampled`; (draws,)
        each, NaN where there is no object to find."""
        names = {"class": self.annotations.classes, "size": tuple(FIGURES[3 + i][3:] for i in range(3))}
        found = [
            [
                [_mean(part) for part in np.moveaxis(precision[..., 0], 2, 0)],
                [_mean(part) for part in np.moveaxis(precision[..., 1:], 3, 0)],
            ]
            for precision in self._drawn(KINDS[self.with_masks][0], draws)
        ]
        return {
            kind: dict(zip(names[kind], known(np.array([draw[i] for draw in found])).T, strict=True))
            for i, kind in enumerate(names)
        }

    def _drawn(self, kind: Kind, draws: np.ndarray) -> Iterator[np.ndarray]:
        """For each draw of the images the precisions (thresholds, recalls, classes, areas)."""
        evaluation = self._evaluated(kind, separate_eval=True)
        whole = np.empty(len(evaluation._evalImgs_cpp), dtype=object)
        whole[:] = evaluation._evalImgs_cpp
        by_image = whole.reshape(-1, len(self._results))  # (classes and areas, images)
        for draw in draws:
            evaluation._evalImgs_cpp = by_image[:, draw].ravel().tolist()
            evaluation.accumulate()
            yield np.asarray(evaluation.eval["precision"])[..., -1]

    def _evaluated(self, kind: Kind, **options: Any) -> COCOeval_faster:
        """The library's evaluation, before it is accumulated."""
        truth = COCO(self._judged(kind))
        results = truth.loadRes(self._numbered(self.results, kind))
        evaluation = COCOeval_faster(truth, results, kind, print_function=_silent, **options)
        evaluation.params.maxDets = [1, 10, self.max_detections]
        evaluation.evaluate()
        return evaluation

    def _average_precision(self, kind: Kind, prefix: str) -> dict[str, float]:
        names = [prefix + name for name in FIGURES]
        if not self._results:
            return dict.fromkeys(names, -1.0)
        evaluation = self._evaluated(kind)
        evaluation.accumulate()
        precision = np.asarray(evaluation.eval["precision"])[..., -1]  # (thresholds, recalls, classes, areas)
        parts = (precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *np.moveaxis(precision, 3, 0)[1:])
        return {name: _mean(part) for name, part in zip(names, parts, strict=True)}

    def _judged(self, kind: str) -> dict[str, Any]:
        """The truth of the images that were looked at. All ids are counted from 1: the evaluation takes 0 for "no
        object" and 64 bits for any number."""
        content = self.annotations.as_coco
        images = {image["id"]: image for image in content["images"]}
        objects = [a for a in content["annotations"] if a["image_id"] in self._results]
        judged = [
            {"id": number, "area": a["area"], "iscrowd": a["iscrowd"], **same}
            for number, (a, same) in enumerate(zip(objects, self._numbered(objects, kind), strict=True), start=1)
        ]
        seen = [{**images[i], "id": number} for number, i in enumerate(sorted(self._results), start=1)]
        categories = [{"id": label, "name": name} for label, name in enumerate(self.annotations.classes, start=1)]
        return {"info": {}, "images": seen, "annotations": judged, "categories": categories}

    def _numbered(self, entries: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
        """Objects or results, with our numbers for images and classes, and the shape that is judged alone: the area of
        a result is that of its box where it has one."""
        images = {image_id: number for number, image_id in enumerate(sorted(self._results), start=1)}
        labels = {category_id: label for label, category_id in enumerate(self.annotations.category_ids, start=1)}
        shape = {"bbox": "bbox", "segm": "segmentation"}[kind]
        return [
            {
                "image_id": images[entry["image_id"]],
                "category_id": labels[entry["category_id"]],
                **{name: copy.copy(entry[name]) for name in ("score", shape) if name in entry},
            }
            for entry in entries
        ]


def coco_results(detection: Mapping[str, Any], image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """One image's detections as entries of a COCO results file.

    Args:
        detection: torchvision's: boxes (k, 4) xyxy pixels, labels (k,) from 1, scores (k,), and optionally masks:
            (k, h, w) or (k, 1, h, w) at the size of the image, bool or probabilities (over 0.5 is the object), or
            a list of compressed RLE.
        image_id: COCO's.
        category_ids: COCO's id of label 1, 2, ...

    Returns:
        image_id, category_id, bbox (xywh), score, and segmentation (compressed RLE) of each, ready for JSON.
    """
    boxes = torch.as_tensor(detection["boxes"]).detach().double().cpu().reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    labels = torch.as_tensor(detection["labels"]).tolist()
    scores = torch.as_tensor(detection["scores"]).double().tolist()
    entries: list[dict[str, Any]] = [
        {"image_id": int(image_id), "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes.tolist(), labels, scores, strict=True)
    ]
    masks = detection.get("masks")
    if masks is not None:
        rles = encode_masks(masks) if isinstance(masks, Tensor) else masks
        for entry, rle in zip(entries, rles, strict=True):
            entry["segmentation"] = rle
    return entries


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Masks (k, h, w) or (k, 1, h, w), bool or probabilities (over 0.5 is the object), as compressed RLE."""
    height, width = masks.shape[-2:]
    dense = masks.detach().reshape(-1, height, width)
    dense = (dense > 0.5 if dense.is_floating_point() else dense.bool()).cpu().numpy()  # bool ones are not copied
    return [encode(tight_patch(mask), (height, width)) for mask in dense]


def known(values: np.ndarray) -> np.ndarray:
    """The values with NaN in place of -1, which stands for nothing to judge."""
    return np.where(values < 0, np.nan, values)


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0


def _silent(*_: object) -> None:
    """In place of faster-coco-eval's print."""


class SegmentationMetric:
    """Counts pixels of a data set by their true and their predicted class, and computes mIoU from all of them at once.

    One confusion matrix of all images: the mean of the images' own figures would be something else.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        """
        Args:
            num_classes: classes, from 0.
            ignore_index: true label of pixels that are not judged.
        """
        if num_classes < 1:
            raise ConfigError(f"num_classes is at least 1, not {num_classes}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        """Pixels of this process by (true class, predicted class)."""
        self._cells: list[tuple[np.ndarray, np.ndarray]] = []
        """Of each image the cells of its matrix that are not zero, and what they hold."""

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Add an image.

        Args:
            predicted: class of each pixel (h, w), any integer type.
            truth: the same, or `ignore_index`.

        Raises:
            ConfigError: the two differ in size, or a value is no class.
        """
        if predicted.shape != truth.shape:
            raise ConfigError(
                f"predicted labels {tuple(predicted.shape)} and true labels {tuple(truth.shape)} differ in size"
            )
        truth = truth.to(predicted.device, torch.int64)
        known = truth != self.ignore_index
        truth, predicted = truth[known], predicted[known].to(torch.int64)
        for name, labels in (("true", truth), ("predicted", predicted)):
            low, high = (int(limit) for limit in labels.aminmax()) if len(labels) else (0, 0)
            if low < 0 or high >= self.num_classes:
                wrong = low if low < 0 else high
                raise ConfigError(f"{name} label {wrong} is none of the {self.num_classes} classes")
        counts = torch.bincount(truth * self.num_classes + predicted, minlength=self.num_classes**2)
        cells = counts.nonzero()[:, 0]
        self._cells.append((cells.cpu().numpy(), counts[cells].cpu().numpy()))
        self.matrix += counts.reshape(self.matrix.shape).cpu()

    def reset(self) -> None:
        self.matrix, self._cells = torch.zeros_like(self.matrix), []

    def total(self) -> Tensor:
        """The matrix of all processes together; with several, all of them have to call it."""
        return torch.stack(gathered(self.matrix)).sum(0)

    def compute(self) -> dict[str, Any]:
        """miou (over classes that are true or predicted somewhere), pixel_accuracy, mean_accuracy (over classes that
        are true somewhere), and iou of every class; 0..1, or -1 where there is nothing to judge. With several processes
        all of them have to call it."""
        return self._figures(self.total().numpy())

    def resampled(self, draws: np.ndarray) -> dict[str, np.ndarray]:
        """miou and pixel_accuracy for draws of the images, which are numbered as `update` got them; (draws,) each."""
        drawn = [self._figures(matrix) for matrix in self._drawn(draws)]
        return {name: np.array([figures[name] for figures in drawn]) for name in ("miou", "pixel_accuracy")}

    def by_class(self, draws: np.ndarray) -> np.ndarray:
        """(classes, draws): IoU of every class for draws as in `resampled`, NaN where there is nothing to judge."""
        return known(np.array([self._figures(matrix)["iou"] for matrix in self._drawn(draws)])).T

    def _drawn(self, draws: np.ndarray) -> Iterator[np.ndarray]:
        """For each draw of the images their matrix."""
        for draw in draws:
            matrix = np.zeros(self.num_classes**2, dtype=np.int64)
            for image in draw:
                cells, counts = self._cells[image]
                matrix[cells] += counts
            yield matrix.reshape(self.num_classes, -1)

    @staticmethod
    def _figures(matrix: np.ndarray) -> dict[str, Any]:
        right, true, predicted = np.diagonal(matrix), matrix.sum(1), matrix.sum(0)
        iou = _shares(right, true + predicted - right)
        accuracy = _shares(right, true)
        return {
            "miou": _mean(iou),
            "pixel_accuracy": float(right.sum() / true.sum()) if true.sum() else -1.0,
            "mean_accuracy": _mean(accuracy),
            "iou": iou.tolist(),
        }


def _shares(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, float64; -1 where there is no whole."""
    return np.where(whole > 0, part / np.maximum(whole, 1), -1.0)
