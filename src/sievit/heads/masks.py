"""Instance masks between the image and the small square that the network predicts.

Letters: n boxes, g objects, m cells per side of the square, (h, w) pixels of the image. Boxes are xyxy pixels.
"""

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from sievit.heads.config import MaskRCNNConfig


def crop_masks(masks: Tensor, matched: Tensor, boxes: Tensor, size: int, *, aligned: bool) -> Tensor:
    """The part of the object's mask inside each box, as (n, m, m) mean coverage.

    The same numbers as `roi_align` of the whole masks, but only the surroundings of the boxes are made float: an image
    with hundreds of objects would else need gigabytes.

    Args:
        masks: (g, h, w) uint8 or bool.
        matched: (n,) int, the object of each box.
        boxes: (n, 4) float32.
    """
    height, width = masks.shape[-2:]
    out = boxes.new_zeros(len(boxes), size, size)
    order = matched.argsort(stable=True)
    objects, counts = matched[order].unique_consecutive(return_counts=True)
    groups = order.split(counts.tolist())
    for index, group in zip(objects.tolist(), groups, strict=True):
        rois = boxes[group]
        left, top = (rois[:, :2].amin(0).floor() - 2).clamp(min=0).int().tolist()
        right, bottom = (rois[:, 2:].amax(0).ceil() + 2).int().tolist()
        left, top = min(left, width - 1), min(top, height - 1)
        crop = masks[index, top : max(bottom, top + 1), left : max(right, left + 1)]
        rois = rois - rois.new_tensor([left, top, left, top])
        rois = torch.cat([rois.new_zeros(len(rois), 1), rois], dim=1)
        out[group] = roi_align(crop[None, None].to(rois.dtype), rois, size, 1.0, aligned=aligned)[:, 0]
    return out


def paste_masks(probs: Tensor, boxes: Tensor, size: tuple[int, int], config: MaskRCNNConfig) -> Tensor:
    """The masks on the pixels of the image, (n, 1, h, w) bool.

    Args:
        probs: (n, 1, m, m) probabilities inside `boxes` (n, 4), in pixels of the image.
        size: (h, w).
    """
    if config.mask.paste == "torchvision" and len(boxes):
        return paste_masks_in_image(probs, boxes, size) >= config.mask.threshold
    out = torch.zeros(len(boxes), 1, *size, dtype=torch.bool, device=boxes.device)
    with torch.autocast(boxes.device.type, enabled=False):
        for mask, prob, box in zip(out, probs.float(), boxes.tolist(), strict=True):
            columns, left = _lookup(box[0], box[2], prob.shape[-1], size[1], prob)
            rows, top = _lookup(box[1], box[3], prob.shape[-2], size[0], prob)
            pasted = rows @ prob[0] @ columns.T
            mask[0, top : top + len(rows), left : left + len(columns)] = pasted >= config.mask.threshold
    return out


def _lookup(low: float, high: float, cells: int, limit: int, like: Tensor) -> tuple[Tensor, int]:
    """The weights (pixels, cells) of bilinear interpolation at the pixels around a box, and the first pixel."""
    cell = max(high - low, 1e-6) / cells
    first = min(max(int(low - cell), 0), limit)
    last = max(min(int(high + cell) + 1, limit), first)
    pixels = torch.arange(first, last, device=like.device, dtype=torch.float32)
    positions = (pixels + 0.5 - low) / cell - 0.5
    grid = torch.arange(cells, device=like.device, dtype=torch.float32)
    return (1 - (positions[:, None] - grid).abs()).clamp(min=0), first
