"""A data set in COCO's format: images and their objects, as torchvision's detectors take them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sievit.config import ConfigError
from sievit.data.annotations import ADVICE, load_annotations
from sievit.data.dataset import ImageDataset, Target, Transform
from sievit.data.images import read_image, to_tensor
from sievit.data.masks import Masks, decode


class CocoDetection(ImageDataset):
    """Images with a COCO instances file.

    Labels are 1-based and without holes; `classes[label - 1]` and `category_ids[label - 1]` say what they mean. Images
    without objects are part of the set.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path | dict[str, Any],
        *,
        transform: Transform | None = None,
        with_masks: bool | None = None,
        crowds: bool = False,
        skip_empty: bool = False,
        invalid: Literal["error", "skip"] = "error",
        seed: int = 0,
        cache_bytes: int = 0,
        max_detections: int = 100,
        advice: Mapping[str, str] = ADVICE,
    ) -> None:
        """
        Args:
            images: folder that the `file_name`s are relative to.
            annotations: COCO instances file, or its content.
            with_masks: whether targets hold masks; None: if the file has them. Without a transform masks are dense,
                gigabytes for a large crowded image: evaluation reads them from `annotations.as_coco` instead.
            crowds: whether crowd regions are among the targets. They are no objects to train on, so by default not.
            skip_empty: leave out images without an object (crowds do not count).
            invalid: what to do about annotations that cannot be used, see `load_annotations`.
            transform, seed, cache_bytes: see `ImageDataset`.
            max_detections: the best so many of an image and class are judged. COCO's is 100.
            advice: what a user does about `invalid` and `with_masks`, see `load_annotations`.

        Raises:
            ConfigError: the folder or the file is missing or malformed, or masks are asked for that are not there.
        """
        super().__init__(transform=transform, seed=seed, cache_bytes=cache_bytes)
        self.root = Path(images)
        if not self.root.is_dir():
            raise ConfigError(f"{self.root}: no such folder of images")
        self.annotations = load_annotations(annotations, invalid=invalid, advice=advice)
        self.source, self.classes = self.annotations.source, self.annotations.classes
        self.category_ids = self.annotations.category_ids
        self.with_masks, self._crowds = self._use_masks(with_masks, advice.get("with_masks")), crowds
        self.max_detections = max_detections
        images_with_objects = enumerate(self.annotations.objects)
        self._places = [i for i, objects in images_with_objects if not (skip_empty and all(_crowd(a) for a in objects))]
        self._labels = {number: label for label, number in enumerate(self.category_ids, start=1)}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of every index, as the file says."""
        images = (self.annotations.images[place] for place in self._places)
        return tuple((image["height"], image["width"]) for image in images)

    @property
    def objects(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Of every index the boxes (k, 4) float32, xyxy pixels, and labels (k,) of its targets."""
        return tuple((self._boxes(place), self._labels_of(place)) for place in self._places)

    def path(self, index: int) -> Path:
        return self.root / self.annotations.images[self._places[index]]["file_name"]

    def read(self, index: int) -> tuple[Tensor, Target]:
        place = self._places[index]
        record = self.annotations.images[place]
        size = (record["height"], record["width"])
        objects = self._objects(place)
        target: Target = {
            "boxes": self._boxes(place),
            "labels": self._labels_of(place),
            "iscrowd": torch.tensor([a["iscrowd"] for a in objects], dtype=torch.int64),
            "area": torch.tensor([a["area"] for a in objects], dtype=torch.float32),
            "image_id": record["id"],
        }
        image = to_tensor(read_image(self.path(index), size=size))
        if self.with_masks:
            target["masks"] = Masks(tuple(decode(a["segmentation"], size) for a in objects), size)
        return image, target

    def _objects(self, place: int) -> list[dict[str, Any]]:
        return [a for a in self.annotations.objects[place] if self._crowds or not _crowd(a)]

    def _boxes(self, place: int) -> Tensor:
        record = self.annotations.images[place]
        boxes = torch.tensor([a["bbox"] for a in self._objects(place)], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, record["width"])
        boxes[:, 1::2].clamp_(0, record["height"])
        return boxes

    def _labels_of(self, place: int) -> Tensor:
        return torch.tensor([self._labels[a["category_id"]] for a in self._objects(place)], dtype=torch.int64)

    def _use_masks(self, with_masks: bool | None, advice: str | None) -> bool:
        annotations = [a for objects in self.annotations.objects for a in objects]
        without = [a["id"] for a in annotations if not a.get("segmentation")]
        if with_masks is None and len(without) == len(annotations):
            return False
        if with_masks is not False and without:
            why = "masks are needed" if with_masks else "others have one"
            use_boxes = f", or {advice} to use the boxes alone" if advice else ""
            raise ConfigError(
                f"{self.source}: annotation {without[0]} has no segmentation and {why}; add it{use_boxes}"
            )
        return with_masks is not False


def _crowd(annotation: dict[str, Any]) -> bool:
    return bool(annotation["iscrowd"])
