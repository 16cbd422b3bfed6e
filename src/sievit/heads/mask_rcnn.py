"""Mask R-CNN on four feature maps: torchvision's layers and parameter names, every constant of the papers an argument.

Letters: b images, c channels, d detections, g objects of an image. Boxes are xyxy pixels of the network's input.
"""

import torch
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from sievit.config import ConfigError
from sievit.heads.config import MaskRCNNConfig
from sievit.heads.roi_heads import RoIHeads
from sievit.heads.rpn import RegionProposals

FEATURES = ("0", "1", "2", "3")


class MaskRCNN(nn.Module):
    """FPN with five outputs, region proposals, box and mask branch (He et al. 2017, arXiv 1703.06870)."""

    def __init__(self, config: MaskRCNNConfig, *, in_channels: int) -> None:
        super().__init__()
        self.config = config
        self.fpn = FeaturePyramidNetwork([in_channels] * 4, config.fpn_channels, extra_blocks=LastLevelMaxPool())
        self.rpn = RegionProposals(config)
        self.roi_heads = RoIHeads(config)

    def forward(
        self,
        features: dict[str, Tensor],
        image_size: tuple[int, int],
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Losses when `targets` are given, detections when not; the module's mode changes nothing.

        Args:
            features: "0".."3", (b, c, h, w) at strides 4, 8, 16, 32.
            image_size: (height, width) of the padded batch.
            sizes: (height, width) of each image's content; detections are clipped to it.
            targets: per image `boxes` (g, 4) float, `labels` (g,) int64 1..num_classes, and with a mask branch `masks`
                (g, h, w) uint8 or bool; objects whose `iscrowd` is set are left out.

        Returns:
            Per image `boxes` (d, 4), `labels` (d,), `scores` (d,) best first, and with a mask branch `masks`
            (d, 1, 28, 28), probabilities inside the box; the losses by torchvision's names.

        Raises:
            ConfigError: a target without masks where there is a mask branch, an unknown label, a box without area.
        """
        if targets is not None:
            targets = [self._checked(target, i) for i, target in enumerate(targets)]
        maps = self.pyramid(features)
        proposals, rpn_losses = self.rpn(maps, image_size, sizes, targets)
        detections, losses = self.roi_heads(maps[: len(FEATURES)], proposals, sizes, targets)
        return detections, {**rpn_losses, **losses}

    def pyramid(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The FPN's maps (b, fpn_channels, h, w) at strides 4, 8, 16, 32, 64."""
        maps = {name: features[name].contiguous(memory_format=torch.channels_last) for name in FEATURES}
        return list(self.fpn(maps).values())

    def _checked(self, target: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """The target without its crowds."""
        names = ["boxes", "labels", *(["masks"] if self.config.with_masks else [])]
        for name in names:
            if name not in target:
                way_out = "; train with with_masks=False on boxes alone" if name == "masks" else ""
                raise ConfigError(f"target {index} of the batch has no {name!r}{way_out}")
        if "iscrowd" in target:
            keep = target["iscrowd"] == 0
            target = {name: target[name][keep] for name in names}
        labels, boxes = target["labels"], target["boxes"]
        if len(labels) == 0:
            return target
        if labels.min() < 1 or labels.max() > self.config.num_classes:
            raise ConfigError(
                f"target {index} of the batch has labels {labels.min():d}..{labels.max():d}; "
                f"this model's are 1..{self.config.num_classes}"
            )
        if not (boxes[:, 2:] > boxes[:, :2]).all():
            raise ConfigError(f"target {index} of the batch has a box without area; boxes are (x1, y1, x2, y2) pixels")
        return target
