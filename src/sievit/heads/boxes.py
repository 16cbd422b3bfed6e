"""Boxes as functions of tensors: matching, sampling, losses and their normaliser. torchvision's `BoxCoder` encodes.

Letters: n boxes or anchors, k classes, g objects of an image. Boxes are xyxy pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import box_iou

from sievit.distributed import global_sum, world_size
from sievit.heads.config import BoxLoss, StageConfig


def match(
    boxes: Tensor, anchors: Tensor, config: StageConfig, *, low_quality_iou: float | None = None
) -> tuple[Tensor, Tensor]:
    """Which of the objects `boxes` (g, 4) each of the `anchors` (n, 4) is to predict.

    Args:
        low_quality_iou: the best anchors of an object are positive from this overlap on; None: only from `fg_iou`.

    Returns:
        (n,) int: the object, 0 where there is none; (n,) int: 1 positive, 0 negative, -1 neither.
    """
    if len(boxes) == 0:
        zeros = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        return zeros, zeros.clone()
    iou = box_iou(boxes, anchors)  # (g, n)
    best, matched = iou.max(dim=0)
    labels = torch.where(best >= config.fg_iou, 1, torch.where(best < config.bg_iou, 0, -1))
    if low_quality_iou is not None:
        most = iou.amax(dim=1, keepdim=True)  # an object that no anchor touches matches none
        labels[((iou == most) & (most >= low_quality_iou) & (most > 0)).any(dim=0)] = 1
    return matched, labels


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
