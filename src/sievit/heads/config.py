"""The constants of Mask R-CNN. Defaults are the SViT paper's.

Lengths are pixels of the network's input, boxes are xyxy.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sievit.config import Config, ConfigError, Count, Natural, NonNegative, Positive, Share

BoxLoss = Literal["l1", "smooth_l1"]
Weights = tuple[Positive, Positive, Positive, Positive]


@dataclass(frozen=True, kw_only=True)
class AnchorConfig(Config):
    """The boxes that proposals start from.

    Attributes:
        sizes: square root of their areas, per level (four maps and their pooled fifth).
        ratios: height / width.
        strides: per level; None: the padded image's size over the map's, as in torchvision.
        rounded: round their corners to whole pixels (torchvision does).
    """

    sizes: tuple[tuple[Positive, ...], ...] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    ratios: tuple[Positive, ...] = (0.5, 1.0, 2.0)
    strides: tuple[Count, ...] | None = (4, 8, 16, 32, 64)
    rounded: bool = False

    def __post_init__(self) -> None:
        if len(self.sizes) != 5:
            raise ConfigError(f"anchors.sizes has {len(self.sizes)} levels; give one tuple per map, 5")
        if len({len(sizes) for sizes in self.sizes}) != 1:
            raise ConfigError("anchors.sizes must hold the same number of sizes on every level: they share one head")
        if self.strides is not None and len(self.strides) != 5:
            raise ConfigError(f"anchors.strides has {len(self.strides)} levels; give 5, or None to infer them")

    def scaled(self, factor: float) -> "AnchorConfig":
        """The same with sizes that are so many times as large."""
        return replace(self, sizes=tuple(tuple(factor * size for size in sizes) for sizes in self.sizes))


@dataclass(frozen=True, kw_only=True)
class StageConfig(Config):
    """The fields that the proposals and the box branch share: both score and refine boxes.

    Attributes:
        fg_iou, bg_iou: overlap with an object from which a box is positive, and below which it is negative.
        batch_size: boxes sampled per image for the loss.
        positive_fraction: of them positive, at most.
        loss: of the encoded offsets.
        weights: multiply these (one over the standard deviations of mmdet).
        min_score, min_size: boxes below are dropped before NMS.
        nms_iou: of two boxes that overlap more, the one with the lower score is dropped.
    """

    fg_iou: Share
    bg_iou: Share
    batch_size: Count
    positive_fraction: Share
    loss: BoxLoss = "l1"
    weights: Weights
    min_score: Share
    min_size: NonNegative
    nms_iou: Share


@dataclass(frozen=True, kw_only=True)
class RPNConfig(StageConfig):
    """Region proposals.

    Attributes:
        convs: 3x3 convolutions before the predictions.
        low_quality_iou: an object's best anchors are positive when they overlap it this much (torchvision: 0).
        pre_nms_train, pre_nms_test: proposals per level before NMS.
        post_nms_train, post_nms_test: proposals per image after it.
    """

    convs: Count = 1
    fg_iou: Share = 0.7
    bg_iou: Share = 0.3
    low_quality_iou: Share = 0.3
    batch_size: Count = 256
    positive_fraction: Share = 0.5
    weights: Weights = (1.0, 1.0, 1.0, 1.0)
    pre_nms_train: Count = 2000
    pre_nms_test: Count = 1000
    post_nms_train: Count = 1000
    post_nms_test: Count = 1000
    min_score: Share = 0.0
    min_size: NonNegative = 1e-3
    nms_iou: Share = 0.7


@dataclass(frozen=True, kw_only=True)
class RoIConfig(Config):
    """How boxes are pooled from the maps.

    Attributes:
        aligned: RoIAlign with the half-pixel correction, for the targets of the mask branch too.
        sampling_ratio: samples per bin and axis; 0 takes as many as the bin has feature pixels.
        finest_size: boxes of up to twice this size are pooled from the finest map.
        level_rule: "inside": floor(log2(s / finest + 1e-6)), mmdet; "outside": floor(log2(s / finest) + 1e-6),
            torchvision.
    """

    aligned: bool = True
    sampling_ratio: Natural = 0
    finest_size: Positive = 56.0
    level_rule: Literal["inside", "outside"] = "inside"


@dataclass(frozen=True, kw_only=True)
class BoxConfig(StageConfig):
    """The box branch.

    Attributes:
        pool: cells per side of a pooled box.
        fc: width of the two fully connected layers.
        max_detections: per image.
    """

    pool: Count = 7
    fc: Count = 1024
    fg_iou: Share = 0.5
    bg_iou: Share = 0.5
    batch_size: Count = 512
    positive_fraction: Share = 0.25
    weights: Weights = (10.0, 10.0, 5.0, 5.0)
    min_score: Share = 0.05
    min_size: NonNegative = 1e-2
    nms_iou: Share = 0.5
    max_detections: Count = 100


@dataclass(frozen=True, kw_only=True)
class MaskConfig(Config):
    """The mask branch.

    Attributes:
        pool: cells per side of a pooled box; a mask has twice as many.
        convs: widths of the convolutions.
        deconv: width of the layer that doubles the resolution.
        targets: "binary": cut at 0.5; "soft": the mean coverage of each cell.
        paste: "aligned": each pixel's centre is looked up in the mask; "torchvision": the mask is resized to whole
            pixels.
        threshold: probability from which a pixel belongs to the object.
    """

    pool: Count = 14
    convs: tuple[Count, ...] = (256, 256, 256, 256)
    deconv: Count = 256
    targets: Literal["binary", "soft"] = "binary"
    paste: Literal["aligned", "torchvision"] = "aligned"
    threshold: Share = 0.5

    def __post_init__(self) -> None:
        if not self.convs:
            raise ConfigError("mask.convs is empty; give one width per layer, or with_masks=False")


@dataclass(frozen=True, kw_only=True)
class MaskRCNNConfig(Config):
    """Mask R-CNN with a feature pyramid.

    Attributes:
        num_classes: foreground classes; labels are 1..num_classes, 0 is the background.
        with_masks: build the mask branch; False trains on boxes alone.
        fpn_channels: width of the pyramid's maps.
        smooth_l1_beta: of the losses that are "smooth_l1".
    """

    num_classes: Count
    with_masks: bool = True
    fpn_channels: Count = 256
    smooth_l1_beta: NonNegative = 1 / 9
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig)
    box: BoxConfig = field(default_factory=BoxConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """JSON of the time when all fields stood in one list: `rpn_nms_iou` is `rpn.nms_iou` now."""
        groups = {"anchor": "anchors", "rpn": "rpn", "roi": "roi", "box": "box", "mask": "mask"}
        new: dict[str, Any] = {}
        for name, value in data.items():
            group, _, rest = ("anchor_rounded" if name == "round_anchors" else name).partition("_")
            if rest and group in groups:
                new.setdefault(groups[group], {})[rest.removeprefix("box_")] = value
            else:
                new[name] = value
        return new
