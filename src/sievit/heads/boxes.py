"""Boxes as functions of tensors: encoding, matching, sampling, and the normalisers of their losses.

Letters: n boxes or anchors, k classes, g objects of an image. Boxes are xyxy pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from sievit.distributed import global_sum, world_size
from sievit.heads.config import BoxLoss, Weights

MAX_LOG_SCALE = math.log(1000 / 16)  # a regressor may not make a box more than 62.5 times as wide or high
ANCHORS_PER_RUN = 2048


def encode(boxes: Tensor, anchors: Tensor, weights: Weights) -> Tensor:
    """The offsets (n, 4) that turn `anchors` (n, 4) into `boxes` (n, 4)."""
    sizes = anchors[:, 2:] - anchors[:, :2]
    centers = anchors[:, :2] + sizes / 2
    target_sizes = boxes[:, 2:] - boxes[:, :2]
    target_centers = boxes[:, :2] + target_sizes / 2
    offsets = torch.cat([(target_centers - centers) / sizes, (target_sizes / sizes).log()], dim=1)
    return offsets * offsets.new_tensor(weights)


def decode(offsets: Tensor, anchors: Tensor, weights: Weights) -> Tensor:
    """The boxes (..., 4) that `offsets` (..., 4) make of `anchors` (..., 4)."""
    sizes = anchors[..., 2:] - anchors[..., :2]
    centers = anchors[..., :2] + sizes / 2
    offsets = offsets / offsets.new_tensor(weights)
    new_centers = centers + offsets[..., :2] * sizes
    half = offsets[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * sizes / 2
    return torch.cat([new_centers - half, new_centers + half], dim=-1)


def match(
    boxes: Tensor, anchors: Tensor, *, fg_iou: float, bg_iou: float, low_quality_iou: float | None
) -> tuple[Tensor, Tensor]:
    """Which object each anchor should find.

    Args:
        boxes: (g, 4) the objects.
        anchors: (n, 4).
        low_quality_iou: the best anchors of an object are positive from this overlap on; None: only from `fg_iou`.

    Returns:
        (n,) int: the object, 0 where there is none; (n,) int: 1 positive, 0 negative, -1 neither.
    """
    if len(boxes) == 0 or len(anchors) == 0:
        nothing = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        return nothing, nothing.clone()
    overlaps = _overlaps(boxes, anchors)
    best_of_object = boxes.new_zeros(len(boxes))
    matched, kind = [], []
    for objects, iou in overlaps:
        best, index = iou.max(dim=0)
        matched.append(objects[index])
        kind.append(torch.where(best >= fg_iou, 1, torch.where(best < bg_iou, 0, -1)))
        best_of_object[objects] = best_of_object[objects].maximum(iou.amax(dim=1))
    if low_quality_iou is not None:
        wanted = torch.where(best_of_object >= low_quality_iou, best_of_object, math.inf)
        wanted[best_of_object == 0] = math.inf  # an object that no anchor touches matches none
        for (objects, iou), part in zip(overlaps, kind, strict=True):
            part[(iou == wanted[objects, None]).any(dim=0)] = 1
    return torch.cat(matched), torch.cat(kind)


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


def sample(kind: Tensor, *, batch_size: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """A random choice of indices, positives and negatives, of `kind` (n,): > 0 positive, 0 negative, -1 neither."""
    positive, negative = torch.where(kind > 0)[0], torch.where(kind == 0)[0]
    num_positive = min(len(positive), int(batch_size * positive_fraction))
    num_negative = min(len(negative), batch_size - num_positive)
    positive = positive[torch.randperm(len(positive), device=kind.device)[:num_positive]]
    negative = negative[torch.randperm(len(negative), device=kind.device)[:num_negative]]
    return positive, negative


def box_loss(predicted: Tensor, target: Tensor, kind: BoxLoss, beta: float) -> Tensor:
    """The summed loss of box offsets."""
    if kind == "l1":
        return F.l1_loss(predicted, target, reduction="sum")
    return F.smooth_l1_loss(predicted, target, beta=beta, reduction="sum")


def normaliser(count: int, like: Tensor) -> Tensor:
    """What a summed loss is divided by so that it is a mean over the global batch.

    Under several processes this is the mean of their counts: gradients averaged over the processes are then those of
    one process that holds all images. At least 1 over the processes' number, so that nothing is divided by zero.
    """
    return global_sum(torch.tensor(float(count), device=like.device)).clamp(min=1) / world_size()
