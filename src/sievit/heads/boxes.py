"""Boxes as functions of tensors: matching, sampling, losses and their normaliser. torchvision's `BoxCoder` encodes.

Letters: n boxes or anchors, k classes, g objects of an image. Boxes are xyxy pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import box_iou

from sievit.distributed import global_sum, world_size
from sievit.heads.config import BoxLoss, StageConfig

ANCHORS_PER_RUN = 2048


def match(
    boxes: Tensor, anchors: Tensor, config: StageConfig, *, low_quality_iou: float | None = None
) -> tuple[Tensor, Tensor]:
    """Which of the objects `boxes` (g, 4) each of the `anchors` (n, 4) is to predict.

    Args:
        low_quality_iou: the best anchors of an object are positive from this overlap on; None: only from `fg_iou`.

    Returns:
        (n,) int: the object, 0 where there is none; (n,) int: 1 positive, 0 negative, -1 neither.
    """
    if len(boxes) == 0 or len(anchors) == 0:
        zeros = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        return zeros, zeros.clone()
    overlaps = _overlaps(boxes, anchors)
    best_of_object = boxes.new_zeros(len(boxes))
    matched, labels = [], []
    for objects, iou in overlaps:
        best, index = iou.max(dim=0)
        matched.append(objects[index])
        labels.append(torch.where(best >= config.fg_iou, 1, torch.where(best < config.bg_iou, 0, -1)))
        best_of_object[objects] = best_of_object[objects].maximum(iou.amax(dim=1))
    if low_quality_iou is not None:
        # an object that no anchor touches matches none
        low_quality = (best_of_object >= low_quality_iou) & (best_of_object > 0)
        best_of_object = torch.where(low_quality, best_of_object, math.inf)
        for (objects, iou), part in zip(overlaps, labels, strict=True):
            part[(iou == best_of_object[objects, None]).any(dim=0)] = 1
    return torch.cat(matched), torch.cat(labels)


def _overlaps(boxes: Tensor, anchors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per run of anchors, indices (m,) of objects that may touch them (at least one), and their IoU (m, run).

    Anchors come row by row, so that a run of them spans a band of the image: on CPU, with hundreds of objects, leaving
    out the objects beyond the band and staying in the cache is many times faster than one large matrix.
    """
    every_row = torch.arange(len(boxes), device=boxes.device)
    if anchors.device.type != "cpu":
        return [(every_row, box_iou(boxes, anchors))]
    overlaps = []
    for run in anchors.split(ANCHORS_PER_RUN):
        touch = (boxes[:, :2] < run[:, 2:].amax(0)) & (boxes[:, 2:] > run[:, :2].amin(0))
        objects = torch.where(touch.all(1))[0]
        objects = objects if len(objects) else every_row[:1]
        overlaps.append((objects, _iou(boxes[objects], run)))
    return overlaps


def _iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union (m, n), as torchvision's `box_iou` but with half of the memory traffic."""
    x1, y1, x2, y2 = boxes[..., None].unbind(1)  # (m, 1)
    u1, v1, u2, v2 = others.unbind(1)  # (n,)
    width = x2.minimum(u2).sub_(x1.maximum(u1)).clamp_(min=0)
    inter = y2.minimum(v2).sub_(y1.maximum(v1)).clamp_(min=0).mul_(width)
    union = ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1)).sub_(inter)
    return inter.div_(union)


def sample(labels: Tensor, config: StageConfig) -> tuple[Tensor, Tensor]:
    """Masks (n,) of a random choice of positives and of negatives, by the labels (n,) that `match` gives."""
    positive, negative = BalancedPositiveNegativeSampler(config.batch_size, config.positive_fraction)([labels])
    return positive[0].bool(), negative[0].bool()


def box_loss(predicted: Tensor, target: Tensor, kind: BoxLoss, beta: float) -> Tensor:
    """The summed loss of box offsets; smooth L1 with a beta of zero is L1."""
    return F.smooth_l1_loss(predicted, target, beta=beta if kind == "smooth_l1" else 0.0, reduction="sum")


def normaliser(count: int, like: Tensor) -> Tensor:
    """What a summed loss is divided by so that it is a mean over the global batch.

    Under several processes this is the mean of their counts: gradients averaged over the processes are then those of
    one process that holds all images. At least 1 over the processes' number, so that nothing is divided by zero.
    """
    return global_sum(torch.tensor(float(count), device=like.device)).clamp(min=1) / world_size()
