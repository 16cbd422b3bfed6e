"""Losses of semantic segmentation, as functions of tensors.

Letters: b images, k classes, (h, w) a grid of tokens, (H, W) pixels of the labels.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from sievit.config import Config, Count, NonNegative, Share
from sievit.distributed import global_sum, world_size


@dataclass(frozen=True)
class PixelLossConfig(Config):
    """The cross-entropy of the pixels.

    Attributes:
        balance: a class counts by its share of the batch's pixels to the power of minus this: 0 leaves frequent classes
            their weight, 1 gives all classes the same. Rare classes are then learnt in hundreds of steps.
        stride: of so many pixels along a side one is looked at.
    """

    balance: Share = 0.0
    stride: Count = 1


@dataclass(frozen=True)
class ATMLossConfig(Config):
    """The loss of SegViT's attention-to-mask heads (SegViT, section 3.2; the defaults are DToP's).

    Attributes:
        class_weight, mask_weight, dice_weight: of the three terms.
        no_object: weight of classes that are not in the image, in the classification.
        alpha, gamma: of the focal loss on the masks.
        pixel_weight, pixel: of a fourth term that SegViT does not have, the cross-entropy of the scores that decide,
            which are products of presence and mask.
        ignored: what pixels without a label are: left out, or `background` of every mask, as in the released code.
    """

    class_weight: NonNegative = 1.0
    mask_weight: NonNegative = 20.0
    dice_weight: NonNegative = 1.0
    no_object: NonNegative = 0.1
    alpha: Share = 0.25
    gamma: NonNegative = 2.0
    pixel_weight: NonNegative = 0.0
    pixel: PixelLossConfig = field(default_factory=PixelLossConfig)
    ignored: Literal["excluded", "background"] = "excluded"


def atm_loss(
    classes: Tensor, maps: Tensor, labels: Tensor, *, ignore_index: int = 255, config: ATMLossConfig | None = None
) -> dict[str, Tensor]:
    """Weighted losses by name: `class`, `mask` and `dice`, and `pixel` where it has a weight.

    Query k stands for class k. All its targets are "present" or "not"; the masks of the classes that are present are
    compared pixel by pixel (focal) and as a whole (dice), and averaged over the masks of the batch, of all processes.

    Args:
        classes: (b, k, 2) logits, index 0 "present".
        maps: (b, k, h, w) logits, resized to the labels bilinearly.
        labels: (b, H, W) int64, values 0..k-1 or `ignore_index`.
    """
    config = config or ATMLossConfig()
    known = labels != ignore_index
    present = presence(labels, classes.shape[1], ignore_index=ignore_index)  # (b, k)
    weights = torch.where(present, 1.0, config.no_object).to(classes.dtype)
    each = F.cross_entropy(classes.flatten(0, 1).float(), (~present).long().flatten(), reduction="none")
    share = global_sum(weights.sum()) / world_size()
    losses = {"class": config.class_weight * (each * weights.flatten()).sum() / share}

    image, cls = present.nonzero(as_tuple=True)  # (m,) masks
    masks = global_sum(present.sum().float()) / world_size()
    chosen = maps[image, cls][:, None].float()  # (m, 1, h, w)
    logits = F.interpolate(chosen, labels.shape[1:], mode="bilinear", align_corners=False).flatten(1)  # (m, H*W)
    target = (labels[image] == cls[:, None, None]).flatten(1).to(logits.dtype)
    counted = torch.ones_like(target) if config.ignored == "background" else known[image].flatten(1).to(logits.dtype)
    per_mask = torch.stack([focal(logits, target, counted, config.alpha, config.gamma), dice(logits, target, counted)])
    mask, dices = per_mask.sum(1) / masks.clamp(min=1)
    losses |= {"mask": config.mask_weight * mask, "dice": config.dice_weight * dices}
    if config.pixel_weight:
        scores = F.log_softmax(classes.float(), -1)[..., :1, None] + F.logsigmoid(maps.float())
        pixels = pixel_loss(scores, labels, ignore_index=ignore_index, config=config.pixel)
        losses["pixel"] = config.pixel_weight * pixels
    return losses


def balanced(labels: Tensor, num_classes: int, *, ignore_index: int, power: float) -> Tensor:
    """(k,) a weight for each class, its share of the labelled pixels of the batch, of all processes, to the power of
    minus `power`, so that the mean weight of a pixel is 1."""
    known = labels[labels != ignore_index]
    counts = global_sum(torch.bincount(known, minlength=num_classes).double())
    shares = counts / counts.sum().clamp(min=1)
    weights = torch.where(counts > 0, shares.clamp(min=1e-12) ** -power, 0.0)
    return (weights / (weights * shares).sum().clamp(min=1e-12)).float()


def presence(labels: Tensor, num_classes: int, *, ignore_index: int) -> Tensor:
    """(b, k) bool: which classes the labels (b, H, W) hold."""
    flat = labels.flatten(1)
    known = flat != ignore_index
    counts = torch.zeros(len(flat), num_classes, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(1, flat.where(known, 0), known.long()) > 0


def focal(logits: Tensor, target: Tensor, counted: Tensor, alpha: float, gamma: float) -> Tensor:
    """(m,): focal loss per mask, the mean over its counted pixels; all arguments (m, pixels) (arXiv 1708.02002)."""
    each = sigmoid_focal_loss(logits, target, alpha, gamma)
    return (each * counted).sum(1) / counted.sum(1).clamp(min=1)


def dice(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """(m,): one minus the Dice coefficient of each mask, smoothed by one; all arguments (m, pixels) (V-Net, eq. 3)."""
    p, target = logits.sigmoid() * counted, target * counted
    return 1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)


def pixel_loss(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, config: PixelLossConfig | None = None
) -> Tensor:
    """Cross-entropy, the mean over the labelled pixels of the batch, of all processes.

    Args:
        logits: (b, k, h, w), resized to the labels bilinearly.
        labels: (b, H, W) int64, values 0..k-1 or `ignore_index`.
    """
    config = config or PixelLossConfig()
    labels = labels[:, config.stride // 2 :: config.stride, config.stride // 2 :: config.stride]
    weights = None
    if config.balance:
        weights = balanced(labels, logits.shape[1], ignore_index=ignore_index, power=config.balance)
    resized = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(resized, labels, weights, ignore_index=ignore_index, reduction="sum")
    known = global_sum((labels != ignore_index).sum().float()) / world_size()
    return total / known.clamp(min=1)
