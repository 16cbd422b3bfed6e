"""Mask R-CNN's inference as one program: no branch, and all images of a batch have equally many boxes.

Boxes that are none stand behind the others of their image; where counts are not fixed there are as many columns as the
image with the most boxes needs. The layers are those of `MaskRCNN`, and so are the numbers.

Letters: b images, n boxes of each, k classes without the background, m cells per side. Boxes are xyxy pixels.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import nms

from sievit.heads.config import BoxConfig, RPNConfig
from sievit.heads.mask_rcnn import MaskRCNN
from sievit.heads.pooling import pool_by_kernel

NONE = -1.0
"""The score of a box that is none."""


class Found(NamedTuple):
    """`boxes` (b, n, 4); `labels` (b, n) int64 and `scores` (b, n), best first, 0 for none; `masks` (b, n, m, m)
    probabilities inside the box, of heads with a mask branch."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None


@library.custom_op("sievit::nms", mutates_args=())
def nms_mask(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """(g, n) bool: of the boxes (g, n, 4) of each group those that stay; scores (g, n) below zero are of none."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for of_group, box, score in zip(keep, boxes, scores, strict=True):
        real = (score >= 0).nonzero().squeeze(1)
        of_group[real[nms(box[real], score[real], iou)]] = True
    return keep


@nms_mask.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def find(head: MaskRCNN, features: dict[str, Tensor], canvas: tuple[int, int], sizes: Tensor, *, fixed: bool) -> Found:
    """The detections of a batch.

    Args:
        features: as of `MaskRCNN.forward`.
        canvas: (height, width) of the padded batch.
        sizes: (b, 2) int64, (height, width) of each image's content; detections are clipped to it.
        fixed: no count depends on what is found.
    """
    config = head.config
    limits = sizes.flip(1).repeat(1, 2).float()[:, None]  # (b, 1, 4)
    maps = head.pyramid(features)
    proposals, real = _proposals(head, maps, canvas, limits)
    if not fixed:
        proposals, real = _fitted(real, proposals, real)
    pooled = _pooled(head, maps[:4], proposals, config.box.pool, fixed=fixed)
    logits, offsets = head.roi_heads.box_predictor(head.roi_heads.box_head(pooled))
    boxes, scores, labels = _refined(config.box, proposals, real, logits, offsets, limits)
    if not fixed:
        boxes, scores, labels = _fitted(labels > 0, boxes, scores, labels)
    if not config.with_masks:
        return Found(boxes, labels, scores, None)
    pooled = _pooled(head, maps[:4], boxes, config.mask.pool, fixed=fixed)
    masks = head.roi_heads.mask_predictor(head.roi_heads.mask_head(pooled))
    own = labels.flatten()[:, None, None, None].expand(-1, 1, masks.shape[2], masks.shape[3])
    masks = masks.gather(1, own)[:, 0].sigmoid()
    return Found(boxes, labels, scores, masks.unflatten(0, labels.shape))


def _proposals(head: MaskRCNN, maps: list[Tensor], canvas: tuple[int, int], limits: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (b, n, 4), best first, and which of them are proposals (b, n)."""
    config, coder, most = head.config.rpn, BoxCoder(head.config.rpn.weights), head.config.rpn.pre_nms_test
    logits, offsets = head.rpn.head(maps)
    anchors = head.rpn.anchors([(x.shape[2], x.shape[3]) for x in maps], canvas, maps[0].device)
    boxes, scores = [], []
    for logit, offset, anchor in zip(logits, offsets, anchors, strict=True):
        logit = logit.permute(0, 2, 3, 1).flatten(1)
        offset = offset.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
        score, index = _best(logit.sigmoid(), logit, most)
        rows = index[..., None].expand(-1, -1, 4)
        decoded = coder.decode_single(offset.gather(1, rows).flatten(0, 1), anchor[index].flatten(0, 1))
        box = decoded.unflatten(0, index.shape).minimum(limits).clamp(min=0)
        boxes.append(box)
        scores.append(_valid(box, score, config, score >= config.min_score))
    box, score = torch.stack(boxes, 1), torch.stack(scores, 1)  # (b, levels, n, 4), (b, levels, n)
    score = score.where(nms_mask(box.flatten(0, 1), score.flatten(0, 1), config.nms_iou).view_as(score), NONE)
    score, index = _best(score.flatten(1), score.flatten(1), config.post_nms_test)
    return box.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 4)), score >= 0


def _refined(
    config: BoxConfig, proposals: Tensor, real: Tensor, logits: Tensor, offsets: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (b, n, 4), scores and labels (b, n) of the detections, best first; both are zero where there is none."""
    shape = real.shape
    probs = logits.softmax(1)[:, 1:].unflatten(0, shape)  # (b, p, k)
    decoded = BoxCoder(config.weights).decode_single(offsets[:, 4:], proposals.flatten(0, 1))
    box = decoded.unflatten(0, shape).unflatten(2, (-1, 4)).transpose(1, 2)  # (b, k, p, 4)
    box = box.minimum(limits[:, None]).clamp(min=0)
    score = probs.transpose(1, 2)  # (b, k, p)
    score = _valid(box, score, config, real[:, None] & (score > config.min_score))
    score = score.where(nms_mask(box.flatten(0, 1), score.flatten(0, 1), config.nms_iou).view_as(score), NONE)
    label = torch.arange(1, score.shape[1] + 1, device=score.device)[:, None].expand_as(score).flatten(1)
    score, index = _best(score.flatten(1), score.flatten(1), config.max_detections)
    boxes = box.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 4))
    there = score >= 0
    return boxes * there[..., None], score.clamp(min=0), label.gather(1, index) * there


def _best(values: Tensor, order: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Of values (b, n) the `number` first ones by `order` (b, n), and their places; `NONE` where there are fewer."""
    _, index = F.pad(order, (0, number), value=-torch.inf).topk(number, dim=1)
    there = index < values.shape[1]
    index = index * there
    return values.gather(1, index).where(there, NONE), index


def _valid(boxes: Tensor, scores: Tensor, config: RPNConfig | BoxConfig, there: Tensor) -> Tensor:
    """The scores (...), `NONE` where there is no box (..., 4) or where it is too small."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return scores.where(there & (sides >= config.min_size).all(-1), NONE)


def _fitted(real: Tensor, *tables: Tensor) -> list[Tensor]:
    """The first columns of tables (b, n, ...), as many as the image with the most real (b, n) boxes has; at least 2."""
    size: Any = real.sum(1).max().clamp(min=2).item()  # programs are made for no shape of 0 or 1
    torch._check(size >= 2)
    torch._check(size <= real.shape[1])
    return [table[:, :size] for table in tables]


def _pooled(head: MaskRCNN, maps: list[Tensor], boxes: Tensor, cells: int, *, fixed: bool) -> Tensor:
    """(b * n, c, cells, cells): RoIAlign of boxes (b, n, 4), each on the map of its level."""
    images = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand(boxes.shape[:2]).flatten()
    rois = torch.cat([images[:, None].to(boxes.dtype), boxes.flatten(0, 1)], dim=1)
    return pool_by_kernel(maps, rois, cells, head.config.roi, fixed=fixed)
