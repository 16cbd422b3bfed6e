"""The constants of Mask R-CNN. Defaults are the SViT paper's; `torchvision_config` has torchvision's."""

from dataclasses import dataclass
from typing import Any, Literal

from sievit.config import ConfigError

BoxLoss = Literal["l1", "smooth_l1"]
Weights = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class MaskRCNNConfig:
    """Everything that Mask R-CNN can be told. Lengths are pixels of the network's input, boxes are xyxy.

    Attributes:
        num_classes: foreground classes; labels are 1..num_classes, 0 is the background.
        with_masks: build the mask branch; False trains on boxes alone.
        fpn_channels, box_fc, mask_convs, mask_deconv, rpn_convs: widths and depths.
        anchor_sizes: square root of the anchors' areas, per level (four maps and their pooled fifth).
        anchor_ratios: height / width.
        anchor_strides: per level; None takes the padded image's size over the map's, as torchvision does, which is not
            a power of two on the last level of some sizes.
        round_anchors: round the anchors' corners to whole pixels (torchvision does).
        rpn_low_quality_iou: an object's best anchors are positive when they overlap it this much (torchvision: 0).
        rpn_box_weights, box_weights: multiply the encoded box offsets (one over the standard deviations of mmdet).
        *_box_loss: with `smooth_l1_beta` where smooth. *_batch_size: anchors or boxes sampled per image.
        rpn_pre_nms_*: proposals per level before NMS; rpn_post_nms_*: per image after it.
        rpn_min_score, rpn_min_size, box_min_size: candidates below are dropped before NMS.
        roi_aligned: RoIAlign with the half-pixel correction, for the targets of the mask branch too.
        roi_sampling_ratio: samples per bin and axis; 0 takes as many as the bin has feature pixels.
        roi_finest_size: boxes of up to twice this size are pooled from the finest map.
        roi_level_rule: "inside": floor(log2(s / finest + 1e-6)), mmdet; "outside": floor(log2(s / finest) + 1e-6),
            torchvision.
        mask_targets: "binary": cut at 0.5; "soft": the mean coverage of each cell.
        mask_paste: "aligned": each pixel's centre is looked up in the mask; "torchvision": the mask is resized to whole
            pixels.
        mask_threshold: probability from which a pixel belongs to the object.
    """

    num_classes: int
    with_masks: bool = True
    fpn_channels: int = 256
    box_fc: int = 1024
    mask_convs: tuple[int, ...] = (256, 256, 256, 256)
    mask_deconv: int = 256
    smooth_l1_beta: float = 1 / 9

    anchor_sizes: tuple[tuple[float, ...], ...] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchor_strides: tuple[int, ...] | None = (4, 8, 16, 32, 64)
    round_anchors: bool = False

    rpn_convs: int = 1
    rpn_fg_iou: float = 0.7
    rpn_bg_iou: float = 0.3
    rpn_low_quality_iou: float = 0.3
    rpn_batch_size: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_box_loss: BoxLoss = "l1"
    rpn_box_weights: Weights = (1.0, 1.0, 1.0, 1.0)
    rpn_pre_nms_train: int = 2000
    rpn_pre_nms_test: int = 1000
    rpn_post_nms_train: int = 1000
    rpn_post_nms_test: int = 1000
    rpn_nms_iou: float = 0.7
    rpn_min_score: float = 0.0
    rpn_min_size: float = 1e-3

    roi_aligned: bool = True
    roi_sampling_ratio: int = 0
    roi_finest_size: float = 56.0
    roi_level_rule: Literal["inside", "outside"] = "inside"

    box_pool: int = 7
    box_fg_iou: float = 0.5
    box_bg_iou: float = 0.5
    box_batch_size: int = 512
    box_positive_fraction: float = 0.25
    box_loss: BoxLoss = "l1"
    box_weights: Weights = (10.0, 10.0, 5.0, 5.0)
    box_min_score: float = 0.05
    box_min_size: float = 1e-2
    box_nms_iou: float = 0.5
    box_max_detections: int = 100

    mask_pool: int = 14
    mask_targets: Literal["binary", "soft"] = "binary"
    mask_paste: Literal["aligned", "torchvision"] = "aligned"
    mask_threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ConfigError(f"num_classes is {self.num_classes}; a detector needs at least one class")
        if len(self.anchor_sizes) != 5:
            raise ConfigError(f"anchor_sizes has {len(self.anchor_sizes)} levels; give one tuple per map, 5")
        if len({len(sizes) for sizes in self.anchor_sizes}) != 1:
            raise ConfigError("anchor_sizes must hold the same number of sizes on every level: they share one head")
        if self.anchor_strides is not None and len(self.anchor_strides) != 5:
            raise ConfigError(f"anchor_strides has {len(self.anchor_strides)} levels; give 5, or None to infer them")
        if self.with_masks and not self.mask_convs:
            raise ConfigError("mask_convs is empty; give one width per layer, or with_masks=False")


def torchvision_config(*, num_classes: int, **changes: Any) -> MaskRCNNConfig:
    """The constants of `torchvision.models.detection.MaskRCNN`, with `changes` on top."""
    values: dict[str, Any] = {
        "anchor_strides": None,
        "round_anchors": True,
        "rpn_low_quality_iou": 0.0,
        "rpn_box_loss": "smooth_l1",
        "rpn_post_nms_train": 2000,
        "roi_aligned": False,
        "roi_sampling_ratio": 2,
        "roi_level_rule": "outside",
        "box_loss": "smooth_l1",
        "mask_targets": "soft",
        "mask_paste": "torchvision",
    }
    return MaskRCNNConfig(num_classes=num_classes, **{**values, **changes})
