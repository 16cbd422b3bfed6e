"""A data set in COCO's format: images and their objects, as torchvision's detectors want them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sievit.config import ConfigError
from sievit.data.annotations import Annotations, load_annotations
from sievit.data.images import read_image, to_tensor
from sievit.data.masks import Masks, decode

Target = dict[str, Any]
"""boxes (k, 4) xyxy pixels, labels (k,) from 1, masks (k, h, w) uint8 if there are masks, iscrowd (k,), area (k,),
image_id (int)."""

Transform = Callable[[Tensor, Target, torch.Generator], tuple[Tensor, Target]]
"""Takes a uint8 image (3, h, w) and a target whose masks are `Masks` still; returns a float image and dense masks."""


class CocoDetection(Dataset[tuple[Tensor, Target]]):
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
    ) -> None:
        """
        Args:
            images: folder that the `file_name`s are relative to.
            annotations: COCO instances file, or its content.
            transform: for training, an `Augment`; without one an image comes as it is.
            with_masks: whether targets hold masks; None: if the file has them. Without a transform masks are dense,
                gigabytes for a large crowded image: evaluation reads them from `annotations.as_coco` instead.
            crowds: whether crowd regions are among the targets. They are no objects to train on, so by default not.
            skip_empty: leave out images without an object (crowds do not count).
            invalid: what to do about annotations that cannot be used, see `load_annotations`.
            seed: with the epoch and the index it decides what the transform draws.
            cache_bytes: decoded images and masks are kept up to this size, per worker process.

        Raises:
            ConfigError: the folder or the file is missing or malformed, or masks are asked for that are not there.
        """
        self.root = Path(images)
        if not self.root.is_dir():
            raise ConfigError(f"{self.root}: no such folder of images")
        self.annotations: Annotations = load_annotations(annotations, invalid=invalid)
        self.classes = self.annotations.classes
        self.category_ids = self.annotations.category_ids
        self.with_masks = self._has_masks() if with_masks is None else with_masks
        if self.with_masks:
            self._require_masks(explicit=with_masks is not None)
        self.transform, self.seed, self._crowds = transform, seed, crowds
        places = range(len(self.annotations.images))
        self._places = [i for i in places if self._objects(i, crowds=False)] if skip_empty else list(places)
        self._labels = {number: label for label, number in enumerate(self.category_ids, start=1)}
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on
        self._cache: dict[int, tuple[Tensor, Masks | None]] = {}
        self._cache_left = cache_bytes

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """The image, float32 (3, h, w) in 0..1, and its target, as drawn for the epoch of `set_epoch`."""
        return self.sample(index, epoch=int(self._epoch))

    def set_epoch(self, epoch: int) -> None:
        """Which draws of the augmentation follow. Workers follow suit, also those that live over several epochs."""
        self._epoch.fill_(epoch)

    @property
    def image_ids(self) -> tuple[int, ...]:
        """COCO's image id of every index."""
        return tuple(self.annotations.images[place]["id"] for place in self._places)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of every index, as the file says."""
        images = (self.annotations.images[place] for place in self._places)
        return tuple((image["height"], image["width"]) for image in images)

    def path(self, index: int) -> Path:
        """The image file."""
        return self.root / self.annotations.images[self._places[index]]["file_name"]

    def sample(self, index: int, *, epoch: int) -> tuple[Tensor, Target]:
        """Like indexing, for an epoch that is given: a function of (seed, epoch, index) and nothing else."""
        image, masks = self._decoded(index)
        target = self._target(index)
        if masks is not None:
            target["masks"] = masks
        if self.transform is None:
            if masks is not None:
                target["masks"] = masks.dense()
            return image.float().div_(255), target
        return self.transform(image, target, sample_generator(self.seed, epoch, index))

    def _objects(self, place: int, *, crowds: bool) -> list[dict[str, Any]]:
        return [a for a in self.annotations.objects[place] if crowds or not a["iscrowd"]]

    def _decoded(self, index: int) -> tuple[Tensor, Masks | None]:
        if index in self._cache:
            return self._cache[index]
        place = self._places[index]
        record = self.annotations.images[place]
        size = (record["height"], record["width"])
        image = to_tensor(read_image(self.path(index), size=size))
        masks = None
        if self.with_masks:
            objects = self._objects(place, crowds=self._crowds)
            masks = Masks(tuple(decode(a["segmentation"], size) for a in objects), size)
        cost = image.numel() + (sum(patch.bits.size for patch in masks.patches) if masks is not None else 0)
        if cost <= self._cache_left:
            self._cache_left -= cost
            self._cache[index] = image, masks
        return image, masks

    def _target(self, index: int) -> Target:
        place = self._places[index]
        record, objects = self.annotations.images[place], self._objects(place, crowds=self._crowds)
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, record["width"])
        boxes[:, 1::2].clamp_(0, record["height"])
        return {
            "boxes": boxes,
            "labels": torch.tensor([self._labels[a["category_id"]] for a in objects], dtype=torch.int64),
            "iscrowd": torch.tensor([a["iscrowd"] for a in objects], dtype=torch.int64),
            "area": torch.tensor([a["area"] for a in objects], dtype=torch.float32),
            "image_id": record["id"],
        }

    def _has_masks(self) -> bool:
        return any(a.get("segmentation") for objects in self.annotations.objects for a in objects)

    def _require_masks(self, *, explicit: bool) -> None:
        for objects in self.annotations.objects:
            for annotation in objects:
                if not annotation.get("segmentation"):
                    why = "with_masks=True needs one" if explicit else "others have one"
                    raise ConfigError(
                        f"{self.annotations.source}: annotation {annotation['id']} has no segmentation and {why}; "
                        "pass with_masks=False to use the boxes alone"
                    )


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The random numbers of one sample in one epoch; the same wherever and whenever they are drawn."""
    state = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch as lists: images keep their sizes, the detector pads them."""
    return [image for image, _ in samples], [target for _, target in samples]
