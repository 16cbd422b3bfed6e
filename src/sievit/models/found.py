"""Results in the form that other packages draw, track and count."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sievit.config import ConfigError


class Detections(dict[str, Tensor]):
    """torchvision's dictionary of what was found in an image, which knows the names of its classes.

    Attributes:
        classes: label i + 1 is `classes[i]`.
    """

    def __init__(self, found: Mapping[str, Tensor], classes: Sequence[str]) -> None:
        super().__init__(found)
        self.classes = tuple(classes)

    def to_supervision(self) -> Any:
        """A `supervision.Detections`: class ids count from 0, names are in its data as `class_name`.

        Raises:
            ConfigError: supervision is not installed.
        """
        masks = self["masks"].flatten(0, 1).bool().cpu().numpy() if "masks" in self else None
        boxes, labels, scores = (self[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
        return _detections(boxes, labels - 1, self.classes, masks=masks, scores=scores)


def labels_to_supervision(labels: Tensor, classes: Sequence[str]) -> Any:
    """A `supervision.Detections` of a class for every pixel (h, w): one for each class that is there, with the mask of
    all its pixels and the box around them.

    Raises:
        ConfigError: supervision is not installed.
    """
    from torchvision.ops import masks_to_boxes

    there = [k for k in labels.unique().tolist() if 0 <= k < len(classes)]
    masks = torch.stack([labels == k for k in there]) if there else labels.new_zeros(0, *labels.shape, dtype=torch.bool)
    boxes = masks_to_boxes(masks) + masks.new_tensor([0, 0, 1, 1], dtype=torch.float32)
    return _detections(boxes.cpu().numpy(), np.array(there, dtype=int), classes, masks=masks.cpu().numpy())


def _detections(
    boxes: np.ndarray,
    ids: np.ndarray,
    classes: Sequence[str],
    *,
    masks: np.ndarray | None,
    scores: np.ndarray | None = None,
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it would rather have OpenCV
        try:
            from supervision import Detections as Supervised
        except ImportError as error:
            raise ConfigError("to_supervision needs supervision: pip install 'sievit[video]'") from error
    names = np.array([classes[i] for i in ids], dtype=object)
    return Supervised(xyxy=boxes, mask=masks, confidence=scores, class_id=ids, data={"class_name": names})
