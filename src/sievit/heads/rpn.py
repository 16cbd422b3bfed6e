"""The region proposal network: torchvision's head and anchors, with every constant an argument.

Letters: b images, n anchors of all levels, a anchors per pixel. Boxes are xyxy pixels of the network's input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

from sievit.heads import boxes as box_ops
from sievit.heads.config import AnchorConfig, MaskRCNNConfig


def base_anchors(sizes: tuple[float, ...], ratios: tuple[float, ...]) -> Tensor:
    """(a, 4): the anchors around the origin as torchvision's, but not rounded to whole pixels."""
    root, size = torch.tensor(ratios).sqrt()[:, None], torch.tensor(sizes)
    half = torch.stack([(1 / root * size).flatten(), (root * size).flatten()], dim=1) / 2
    return torch.cat([-half, half], dim=1)


def best_overlaps(config: AnchorConfig, boxes: Tensor) -> Tensor:
    """(k,): the overlap (IoU) of each box (k, 4) xyxy with the anchor that fits it best, if that one stood upon it.

    No anchor on its grid overlaps it more.
    """
    anchors = base_anchors(tuple(size for sizes in config.sizes for size in sizes), config.ratios)
    centred = boxes - (boxes[:, :2] + boxes[:, 2:]).repeat(1, 2) / 2
    return box_iou(centred, anchors).amax(1)


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
        """Proposals (<= post_nms, 4) float32 per image, best first, without gradient; with `targets` losses by name.

        Args:
            features: per level (b, c, h, w); the rest as of `MaskRCNN.forward`.
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
        """Per level (h*w*a, 4) float32: row-major over the pixels, then the base anchors."""
        config = self.config.anchors
        generator = AnchorGenerator(config.sizes, (config.ratios,) * len(config.sizes))
        if not config.rounded:
            generator.cell_anchors = [base_anchors(sizes, config.ratios) for sizes in config.sizes]
        generator.cell_anchors = [anchors.to(device) for anchors in generator.cell_anchors]
        inferred = [(image_size[0] // height, image_size[1] // width) for height, width in grids]
        strides = inferred if config.strides is None else [(stride, stride) for stride in config.strides]
        return generator.grid_anchors(list(map(list, grids)), [list(map(torch.tensor, stride)) for stride in strides])

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
        config, coder = self.config.rpn, BoxCoder(self.config.rpn.weights)
        pre_nms = config.pre_nms_train if training else config.pre_nms_test
        post_nms = config.post_nms_train if training else config.post_nms_test
        boxes, scores, levels = [], [], []
        for level, (logit, offset, anchor) in enumerate(zip(logits, offsets, anchors, strict=True)):
            logit, index = logit.topk(min(pre_nms, logit.shape[1]), dim=1)  # (b, m)
            offset = offset.gather(1, index[..., None].expand(-1, -1, 4))
            decoded = coder.decode_single(offset.flatten(0, 1), anchor[index.flatten()])
            boxes.append(decoded.view_as(offset))
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
        config, coder = self.config.rpn, BoxCoder(self.config.rpn.weights)
        positives, samples, goals = [], [], []
        for target in targets:
            objects = target["boxes"].float().view(-1, 4)
            matched, labels = box_ops.match(objects, anchors, config, low_quality_iou=config.low_quality_iou)
            positive, negative = box_ops.sample(labels, config)
            goals.append(coder.encode_single(objects[matched[positive]], anchors[positive]))
            positives.append(positive)
            samples.append(positive | negative)
        positive, sampled = torch.cat(positives), torch.cat(samples)
        scores = logits.flatten()[sampled]
        count = box_ops.normaliser(len(scores), like=scores)
        objectness = F.binary_cross_entropy_with_logits(scores, positive[sampled].to(scores.dtype), reduction="sum")
        predicted = offsets.reshape(-1, 4)[positive]
        regression = box_ops.box_loss(predicted, torch.cat(goals), config.loss, self.config.smooth_l1_beta)
        return {"loss_objectness": objectness / count, "loss_rpn_box_reg": regression / count}
