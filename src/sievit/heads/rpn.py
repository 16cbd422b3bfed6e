"""The region proposal network: torchvision's head and anchors, with every constant an argument.

Letters: b images, n anchors of all levels, a anchors per place. Boxes are xyxy pixels of the network's input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from sievit.heads import boxes as box_ops
from sievit.heads.config import MaskRCNNConfig


def base_anchors(sizes: tuple[float, ...], ratios: tuple[float, ...], *, rounded: bool) -> Tensor:
    """(a, 4): the anchors around the origin, ratios outside, sizes inside; ratio = height / width."""
    size = torch.tensor(sizes, dtype=torch.float32)
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()
    widths = (1 / root)[:, None] * size[None, :]
    heights = root[:, None] * size[None, :]
    half = torch.stack([widths.flatten(), heights.flatten()], dim=1) / 2
    anchors = torch.cat([-half, half], dim=1)
    return anchors.round() if rounded else anchors


class RegionProposals(nn.Module):
    """Scores anchors, and turns the best of them into proposals."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.config = config
        num_anchors = len(config.anchors.sizes[0]) * len(config.anchors.ratios)
        self.head = RPNHead(config.fpn_channels, num_anchors, conv_depth=config.rpn.convs)

    def forward(
        self,
        features: list[Tensor],
        image_size: tuple[int, int],
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Propose boxes.

        Args:
            features: per level (b, c, h, w).
            image_size: (height, width) of the padded batch.
            sizes: (height, width) of each image's content; proposals are clipped to it.
            targets: dicts with `boxes` (g, 4); the losses are computed when given.

        Returns:
            Proposals (<= post_nms, 4) float32 per image, best first, without gradient; the losses by name.
        """
        logits, offsets = self.head(features)
        logits = [x.permute(0, 2, 3, 1).flatten(1).float() for x in logits]  # (b, h*w*a)
        offsets = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4).float() for x in offsets]  # (b, h*w*a, 4)
        anchors = self.anchors([(x.shape[-2], x.shape[-1]) for x in features], image_size, features[0].device)
        proposals = self.propose(logits, offsets, anchors, sizes, training=targets is not None)
        if targets is None:
            return proposals, {}
        return proposals, self.losses(torch.cat(logits, 1), torch.cat(offsets, 1), torch.cat(anchors), targets)

    def anchors(self, grids: list[tuple[int, int]], image_size: tuple[int, int], device: torch.device) -> list[Tensor]:
        """Per level (h*w*a, 4) float32: row-major over the places, then the base anchors."""
        config, anchors = self.config, []
        for level, (height, width) in enumerate(grids):
            base = base_anchors(config.anchors.sizes[level], config.anchors.ratios, rounded=config.anchors.rounded)
            if config.anchors.strides is None:
                stride_y, stride_x = image_size[0] // height, image_size[1] // width
            else:
                stride_y = stride_x = config.anchors.strides[level]
            y = torch.arange(height, device=device, dtype=torch.float32) * stride_y
            x = torch.arange(width, device=device, dtype=torch.float32) * stride_x
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
            anchors.append((shifts + base.to(device)).view(-1, 4))
        return anchors

    @torch.no_grad()
    def propose(
        self,
        logits: list[Tensor],
        offsets: list[Tensor],
        anchors: list[Tensor],
        sizes: list[tuple[int, int]],
        *,
        training: bool,
    ) -> list[Tensor]:
        """The best boxes of each image after NMS within each level; arguments per level, as `forward` makes them."""
        config = self.config.rpn
        pre_nms = config.pre_nms_train if training else config.pre_nms_test
        post_nms = config.post_nms_train if training else config.post_nms_test
        boxes, scores, levels = [], [], []
        for level, (logit, offset, anchor) in enumerate(zip(logits, offsets, anchors, strict=True)):
            logit, index = logit.topk(min(pre_nms, logit.shape[1]), dim=1)  # (b, m)
            offset = offset.gather(1, index[..., None].expand(-1, -1, 4))
            boxes.append(box_ops.decode(offset, anchor[index], config.weights))
            scores.append(logit.sigmoid())
            levels.append(torch.full_like(index, level))
        batch = zip(torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1), sizes, strict=True)
        proposals = []
        for box, score, level, size in batch:
            box = clip_boxes_to_image(box, size)
            keep = remove_small_boxes(box, config.min_size)
            keep = keep[score[keep] >= config.min_score]
            box, score, level = box[keep], score[keep], level[keep]
            proposals.append(box[batched_nms(box, score, level, config.nms_iou)[:post_nms]])
        return proposals

    def losses(
        self, logits: Tensor, offsets: Tensor, anchors: Tensor, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Objectness and box losses: logits (b, n), offsets (b, n, 4), anchors (n, 4)."""
        config = self.config.rpn
        matches = [self.assign(target["boxes"], anchors) for target in targets]
        positives, negatives, goals = [], [], []
        for i, (matched, kind) in enumerate(matches):
            positive, negative = box_ops.sample(
                kind, batch_size=config.batch_size, positive_fraction=config.positive_fraction
            )
            boxes = targets[i]["boxes"].float().view(-1, 4)
            goals.append(box_ops.encode(boxes[matched[positive]], anchors[positive], config.weights))
            positives.append(positive + i * len(anchors))
            negatives.append(negative + i * len(anchors))
        positive, negative = torch.cat(positives), torch.cat(negatives)
        chosen = logits.flatten()[torch.cat([positive, negative])]
        wanted = (torch.arange(len(chosen), device=chosen.device) < len(positive)).to(chosen.dtype)
        count = box_ops.normaliser(len(chosen), like=chosen)
        objectness = F.binary_cross_entropy_with_logits(chosen, wanted, reduction="sum")
        predicted = offsets.reshape(-1, 4)[positive]
        regression = box_ops.box_loss(predicted, torch.cat(goals), config.loss, self.config.smooth_l1_beta)
        return {"loss_objectness": objectness / count, "loss_rpn_box_reg": regression / count}

    def assign(self, boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Which object (n,) each anchor should find, and whether it is positive 1, negative 0 or neither -1."""
        config = self.config.rpn
        return box_ops.match(
            boxes.float(),
            anchors,
            fg_iou=config.fg_iou,
            bg_iou=config.bg_iou,
            low_quality_iou=config.low_quality_iou,
        )
