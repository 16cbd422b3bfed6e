"""A data set whose samples are a function of (seed, epoch, index): the base of boxes and of labels."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sievit.data.masks import Masks
from sievit.files import digest

Target = dict[str, Any]
"""Of a detector: boxes (k, 4) xyxy pixels, labels (k,) from 1, masks (k, h, w) uint8 if there are masks, iscrowd (k,),
area (k,). Of a segmenter: labels (h, w). Of both: image_id (int)."""

Transform = Callable[[Tensor, Target, torch.Generator], tuple[Tensor, Target]]
"""Takes a uint8 image (3, h, w) and a target as it is stored (masks as `Masks`, labels of any integer type), which it
leaves as they are; returns a float image and a target with dense masks and int64 labels."""


class ImageDataset(Dataset[tuple[Tensor, Target]]):
    """Images and their targets. Files are opened when their sample is asked for; what is wrong with one is an error
    then.

    Attributes:
        source: names the data set in messages.
        classes: names.
    """

    source: str
    classes: tuple[str, ...]

    def __init__(self, *, transform: Transform | None, seed: int, cache_bytes: int) -> None:
        """
        Args:
            transform: for training, an `Augment` or `SemanticAugment`; without one an image comes as it is.
            seed: with the epoch and the index it decides what the transform draws.
            cache_bytes: decoded images and targets are kept up to this size, per worker process.
        """
        self.transform, self.seed = transform, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on
        self._cache: dict[int, tuple[Tensor, Target]] = {}
        self._cache_left = cache_bytes

    def path(self, index: int) -> Path:
        """The image file."""
        raise NotImplementedError

    def files(self, index: int) -> tuple[Path, ...]:
        """All files that are read for a sample."""
        return (self.path(index),)

    def fingerprint(self) -> dict[str, Any]:
        """What tells that the data was changed: how many images, and digests of file names and sizes and of the
        annotation file."""
        names = hashlib.sha256()
        for path in (path for index in range(len(self)) for path in self.files(index)):
            names.update(f"{path} {path.stat().st_size if path.is_file() else None}\n".encode(errors="surrogateescape"))
        source = Path(self.source)
        found: dict[str, Any] = {"images": len(self), "files": names.hexdigest()[:16]}
        return found | ({"annotations": digest(source)} if source.is_file() else {})

    def read(self, index: int) -> tuple[Tensor, Target]:
        """The uint8 image (3, h, w) and its target as they are stored.

        Raises:
            ConfigError: a file cannot be read, or does not fit the image.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """The image, float32 (3, h, w) in 0..1, and its target, as drawn for the epoch of `set_epoch`."""
        return self.sample(index, epoch=int(self._epoch))

    def set_epoch(self, epoch: int) -> None:
        """Which draws of the augmentation follow, in workers that live over several epochs too."""
        self._epoch.fill_(epoch)

    def sample(self, index: int, *, epoch: int) -> tuple[Tensor, Target]:
        """Like indexing, for an epoch that is given: a function of (seed, epoch, index) and nothing else."""
        image, target = self._decoded(index)
        if self.transform is not None:
            return self.transform(image, target, sample_generator(self.seed, epoch, index))
        return image.float().div_(255), plain(target)

    def _decoded(self, index: int) -> tuple[Tensor, Target]:
        if index in self._cache:
            return self._cache[index]
        image, target = self.read(index)
        cost = image.nbytes + sum(value.nbytes for value in target.values() if isinstance(value, Tensor | Masks))
        if cost <= self._cache_left:
            self._cache_left -= cost
            self._cache[index] = image, target
        return image, target


def plain(target: Target) -> Target:
    """A target as it is stored, with dense masks and int64 labels."""
    found = {name: value.dense() if isinstance(value, Masks) else value for name, value in target.items()}
    found |= {name: value.clone() for name, value in found.items() if isinstance(value, Tensor)}
    if "labels" in found:
        found["labels"] = found["labels"].to(torch.int64)
    return found


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The random numbers of one sample in one epoch; the same wherever and whenever they are drawn."""
    state = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch as lists: images keep their sizes, the detector pads them."""
    return [image for image, _ in samples], [target for _, target in samples]
