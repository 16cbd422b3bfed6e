"""From proposals to classes, refined boxes and masks, with torchvision's layers and names.

Letters: b images, r boxes of the whole batch, c channels, k classes with the background at 0. Boxes are xyxy pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes
from torchvision.ops._utils import convert_boxes_to_roi_format

from sievit.heads import boxes as box_ops
from sievit.heads.config import MaskRCNNConfig
from sievit.heads.masks import crop_masks
from sievit.heads.pooling import pool_boxes


@dataclass(frozen=True, slots=True)
class Sampled:
    """The boxes that one image trains on.

    Attributes:
        boxes: (n, 4); labels: (n,) int, 0 for the background; matched: (n,) int, the object of each box.
        offsets: (n, 4), the target of the box regressor.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    offsets: Tensor


class RoIHeads(nn.Module):
    """Box and mask branch."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.config = config
        channels, num_outputs = config.fpn_channels, config.num_classes + 1
        self.box_head = TwoMLPHead(channels * config.box.pool**2, config.box.fc)
        self.box_predictor = FastRCNNPredictor(config.box.fc, num_outputs)
        if config.with_masks:
            self.mask_head = MaskRCNNHeads(channels, config.mask.convs, 1)
            self.mask_predictor = MaskRCNNPredictor(config.mask.convs[-1], config.mask.deconv, num_outputs)

    def forward(
        self,
        features: list[Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections (without targets) or losses (with them); see `MaskRCNN.forward`."""
        if targets is not None:
            return [], self.losses(features, proposals, targets)
        logits, offsets = self.box_branch(features, proposals)
        detections = self.detect(logits, offsets, proposals, sizes)
        if self.config.with_masks:
            boxes = [detection["boxes"] for detection in detections]
            labels = torch.cat([detection["labels"] for detection in detections])
            mask_logits = self.mask_branch(features, boxes)
            probs = mask_logits[torch.arange(len(labels), device=labels.device), labels].sigmoid()[:, None]
            for detection, masks in zip(detections, probs.split([len(b) for b in boxes]), strict=True):
                detection["masks"] = masks
        return detections, {}

    def box_branch(self, features: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (r, k) and box offsets (r, k, 4) of boxes given per image, float32."""
        pooled = pool_boxes(features, convert_boxes_to_roi_format(boxes), self.config.box.pool, self.config.roi)
        logits, offsets = self.box_predictor(self.box_head(pooled))
        return logits.float(), offsets.float().unflatten(1, (-1, 4))

    def mask_branch(self, features: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """Mask logits (r, k, m, m) of boxes given per image, float32."""
        pooled = pool_boxes(features, convert_boxes_to_roi_format(boxes), self.config.mask.pool, self.config.roi)
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        return self.mask_predictor(self.mask_head(pooled)).float()

    @torch.no_grad()
    def detect(
        self, logits: Tensor, offsets: Tensor, proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Per image `boxes` (d, 4), `labels` (d,), `scores` (d,): clipped, NMS within each class, best first."""
        config, counts = self.config.box, [len(p) for p in proposals]
        coder = BoxCoder(config.weights)
        batch = zip(logits.softmax(1).split(counts), offsets.split(counts), proposals, sizes, strict=True)
        detections = []
        for probs, offset, proposal, size in batch:
            row, label = torch.where(probs[:, 1:] > config.min_score)
            label = label + 1
            scores = probs[row, label]
            boxes = coder.decode_single(offset[row, label], proposal[row])
            boxes = clip_boxes_to_image(boxes, size)
            keep = remove_small_boxes(boxes, config.min_size)
            boxes, label, scores = boxes[keep], label[keep], scores[keep]
            keep = batched_nms(boxes, scores, label, config.nms_iou)[: config.max_detections]
            detections.append({"boxes": boxes[keep], "labels": label[keep], "scores": scores[keep]})
        return detections

    def losses(
        self, features: list[Tensor], proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Class, box and mask losses of a random choice of proposals and the objects themselves."""
        config = self.config
        sampled = [self.sample(p, target) for p, target in zip(proposals, targets, strict=True)]
        logits, offsets = self.box_branch(features, [s.boxes for s in sampled])
        labels = torch.cat([s.labels for s in sampled])
        positive = torch.where(labels > 0)[0]
        count = box_ops.normaliser(len(labels), like=logits)
        goals = torch.cat([s.offsets for s in sampled])[positive]
        predicted = offsets[positive, labels[positive]]
        losses = {
            "loss_classifier": F.cross_entropy(logits, labels, reduction="sum") / count,
            "loss_box_reg": box_ops.box_loss(predicted, goals, config.box.loss, config.smooth_l1_beta) / count,
        }
        if config.with_masks:
            losses["loss_mask"] = self.mask_loss(features, sampled, targets)
        return losses

    @torch.no_grad()
    def sample(self, proposals: Tensor, target: dict[str, Tensor]) -> Sampled:
        """Choose among the proposals (n, 4) and the objects of one image."""
        config, objects = self.config.box, target["boxes"].float().view(-1, 4)
        boxes = torch.cat([proposals, objects])
        matched, labels = box_ops.match(objects, boxes, config)
        positive, negative = box_ops.sample(labels, config)
        sampled = positive | negative
        boxes, matched, labels = boxes[sampled], matched[sampled], labels[sampled]
        if len(objects) == 0:
            return Sampled(boxes=boxes, labels=labels, matched=matched, offsets=torch.zeros_like(boxes))
        labels = torch.where(labels > 0, target["labels"][matched], 0)
        offsets = BoxCoder(config.weights).encode_single(objects[matched], boxes)
        return Sampled(boxes=boxes, labels=labels, matched=matched, offsets=offsets)

    def mask_loss(self, features: list[Tensor], sampled: list[Sampled], targets: list[dict[str, Tensor]]) -> Tensor:
        """The mean cross-entropy of the positives' masks, in the channel of their class."""
        config = self.config
        positives = [torch.where(s.labels > 0)[0] for s in sampled]
        boxes = [s.boxes[p] for s, p in zip(sampled, positives, strict=True)]
        labels = torch.cat([s.labels[p] for s, p in zip(sampled, positives, strict=True)])
        logits = self.mask_branch(features, boxes)  # (r, k, m, m)
        count = box_ops.normaliser(len(labels) * logits.shape[-1] ** 2, like=logits)
        goals = [
            crop_masks(target["masks"], s.matched[p], box, logits.shape[-1], aligned=config.roi.aligned)
            for target, s, p, box in zip(targets, sampled, positives, boxes, strict=True)
            if len(p)
        ]
        if not goals:
            return logits.sum() * 0
        goal = torch.cat(goals)
        if config.mask.targets == "binary":
            goal = (goal >= 0.5).to(goal.dtype)
        logits = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(logits, goal, reduction="sum") / count
