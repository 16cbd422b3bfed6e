"""The detector: images in, torchvision's dictionaries out.

Letters: b images, (h, w) an image's pixels, d detections, g objects. Boxes are xyxy pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from sievit.config import ConfigError, Label, variant
from sievit.heads.mask_rcnn import MaskRCNN, MaskRCNNConfig
from sievit.heads.masks import paste_masks
from sievit.measure.flops import count_macs
from sievit.models.backbone import Backbone, backbone_gflops, build_backbone
from sievit.models.base import Answer, Model, TimedPart, dense_trace, register_model
from sievit.models.found import Detections
from sievit.models.inputs import ModelConfig, Size, batched, padded_size
from sievit.models.programs import DetectorProgram
from sievit.necks import NeckConfig
from sievit.policies import Policy
from sievit.tokens import Trace
from sievit.vit.execution import Execution


@variant("detector")
@dataclass(frozen=True)
class DetectorConfig(ModelConfig):
    """All of a detector; enough to rebuild it.

    Attributes:
        classes: names; label i + 1 is `classes[i]`.
        category_ids: the ids that a COCO file gives these classes.
        padding: what fills an image up to the batch's size: "hidden" are no tokens and convolutions meet zeros there,
            so that an image has the same features in any batch; "seen" is computed like the image itself, and
            positions are resized to all of it, as the papers' code does: for weights that were trained with that.
    """

    neck: NeckConfig
    head: MaskRCNNConfig
    category_ids: tuple[Label, ...]
    padding: Literal["hidden", "seen"] = "hidden"

    result: ClassVar[str] = "boxes, labels, scores, masks"
    hub_task: ClassVar[str] = "object-detection"
    figures: ClassVar[Mapping[str, str]] = {
        f"{kind}_ap{level}": f"{kind} AP{level}" for kind in ("box", "mask") for level in ("", "50", "75")
    }

    @property
    def hub_tags(self) -> tuple[str, ...]:
        return ("instance-segmentation",) if self.head.with_masks else ()

    def __post_init__(self) -> None:
        if len(self.classes) != self.head.num_classes or len(self.category_ids) != self.head.num_classes:
            raise ConfigError(
                f"head.num_classes is {self.head.num_classes}, but there are {len(self.classes)} classes and "
                f"{len(self.category_ids)} category_ids; give one of each per class"
            )


@dataclass(frozen=True, kw_only=True)
class Output(Answer[dict[str, Tensor]]):
    """What a pass of the detector returns; `results` are `detections`."""

    @property
    def detections(self) -> list[dict[str, Tensor]]:
        """Per image `boxes` (d, 4), `labels` (d,), `scores` (d,) best first, and with a mask branch `masks`
        (d, 1, h, w) bool, all on the pixels of the image that was given; empty when targets were given. Each has
        `to_supervision`."""
        return self.results

    def found(self) -> dict[str, int]:
        return {"detections": sum(len(found["boxes"]) for found in self.results)}


@register_model(DetectorConfig)
class Detector(Model[dict[str, Tensor]]):
    """A backbone and Mask R-CNN."""

    kind = "detector"
    program = DetectorProgram
    optional = ("head.roi_heads.mask_",)
    config: DetectorConfig

    def __init__(self, config: DetectorConfig, *, backbone: Backbone, head: MaskRCNN) -> None:
        super().__init__()
        self.config = config
        self.backbone: Backbone = backbone
        self.head = head

    @classmethod
    def from_config(cls, config: DetectorConfig) -> Self:
        """The detector that `config` describes, with random weights."""
        backbone = build_backbone(config.neck, config.vit, config.policy)
        return cls(config, backbone=backbone, head=MaskRCNN(config.head, in_channels=backbone.out_channels))

    @property
    def network(self) -> Backbone:
        return self.backbone

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution | None = None,
        teacher: Trace | None = None,
    ) -> Output:
        """See `Model.forward`.

        Args:
            targets: per image `boxes` (g, 4), `labels` (g,), and `masks` (g, h, w) for a mask branch.
        """
        given = [(image.shape[-2], image.shape[-1]) for image in images]
        sizes = given if targets is not None else [self.config.input.test_size(size) for size in given]
        batch = batched(images, sizes, self.config.input, self.device)
        image_size = (batch.shape[-2], batch.shape[-1])
        if targets is not None:
            execution = execution or Execution()
            targets = [{name: x.to(self.device) for name, x in t.items() if isinstance(x, Tensor)} for t in targets]
        elif execution is None:
            execution = self.config.execution
        detections, losses, trace = self.run(batch, sizes, targets, policy=policy, execution=execution)
        if targets is not None:
            chosen = self.policy if policy is None else policy
            losses = {**losses, **chosen.loss(trace, teacher=teacher, targets=targets)}
        detections = [self._on_image(d, *pair) for d, *pair in zip(detections, sizes, given, strict=targets is None)]
        return Output.whole(trace, sizes, image_size, results=detections, losses=losses)

    def run(
        self,
        batch: Tensor,
        sizes: list[Size],
        targets: list[dict[str, Tensor]] | None,
        *,
        policy: Policy | None,
        execution: Execution,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], Trace]:
        """Backbone and head: detections and losses of `MaskRCNN.forward`, and the trace."""
        own = sizes if self.config.padding == "hidden" else None
        with execution.autocast(self.device):
            features, trace = execution.run(self.backbone, batch, own, policy=policy)
            return *self.head(features, (batch.shape[-2], batch.shape[-1]), sizes, targets), trace

    def _on_image(self, detection: dict[str, Tensor], size: Size, given: Size) -> Detections:
        """The detection on the pixels of the image that was given, instead of those that the network saw."""
        ratio = detection["boxes"].new_tensor([given[1] / size[1], given[0] / size[0]] * 2)
        limit = ratio.new_tensor([given[1], given[0]] * 2)
        boxes = (detection["boxes"] * ratio).minimum(limit)
        moved = {**detection, "boxes": boxes}
        if "masks" in detection:
            moved["masks"] = paste_masks(detection["masks"], boxes, given, self.config.head)
        return Detections(moved, self.config.classes)

    def to_supervision(self, result: dict[str, Tensor]) -> Any:
        return Detections(result, self.config.classes).to_supervision()

    def count(self, answer: Answer[dict[str, Tensor]]) -> dict[str, Tensor]:
        """See `Model.count`; further parts are `neck`, `fpn`, `rpn`, `box` (at the limit of proposals per image) and
        `mask` (on the detections that there are). The sampling of deformable attention is counted, which the papers'
        tools leave out."""
        seen = self.config.padding == "seen"
        sizes = [answer.image_size if seen else self._padded(size) for size in answer.sizes]
        parts = backbone_gflops(self.backbone, answer.trace, sizes)
        heads = [self._head_macs(size, len(found["boxes"])) for size, found in zip(sizes, answer.results, strict=True)]
        device = parts["blocks"].device
        for name in heads[0]:
            parts[name] = torch.tensor([macs[name] for macs in heads], dtype=torch.float64, device=device) / 1e9
        return parts

    def _padded(self, size: Size) -> Size:
        """What an image of `size` is padded to when it is alone."""
        return padded_size(size, math.lcm(self.config.input.size_divisor, self.backbone.size_divisor))

    def _head_macs(self, size: Size, detections: int) -> dict[str, float]:
        """Multiply-adds of FPN, proposals, box branch and mask branch."""
        head, config, roi = self.head, self.head.config, self.head.roi_heads
        levels = [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32, 64)]  # a pixel more for half a one
        maps = {str(i): _meta(self.backbone.out_channels, *level) for i, level in enumerate(levels[:4])}
        pooled = _meta(config.fpn_channels, config.box.pool, config.box.pool)
        box = count_macs(roi.box_head, pooled) + count_macs(roi.box_predictor, _meta(config.box.fc))
        mask = 0.0
        if config.with_masks:
            mask = count_macs(roi.mask_head, _meta(config.fpn_channels, config.mask.pool, config.mask.pool))
            mask += count_macs(roi.mask_predictor, _meta(config.mask.convs[-1], config.mask.pool, config.mask.pool))
        return {
            "fpn": count_macs(head.fpn, maps),
            "rpn": count_macs(head.rpn.head, [_meta(config.fpn_channels, *level) for level in levels]),
            "box": config.rpn.post_nms_test * box,
            "mask": detections * mask,
        }

    def dense_answer(self, size: Size) -> Output:
        padded, vit = self._padded(size), self.vit.config
        rows, cols = (torch.arange(0, edge, vit.stride) for edge in padded)
        there = (rows[:, None] < size[0]) & (cols < size[1]) if self.config.padding == "hidden" else None
        trace = dense_trace(self.policy, (len(rows), len(cols)), vit, valid=there)
        found = {"boxes": torch.zeros(self.config.head.box.max_detections, 4)}
        return Output.whole(trace, [size], padded, results=[found])

    def timed_parts(self) -> list[TimedPart]:
        backbone, head, roi = self.backbone, self.head, self.head.roi_heads
        parts: list[TimedPart] = [
            (backbone.vit, "embed", "patch embedding"),
            (backbone.vit, "run_blocks", "blocks, gates"),
            *backbone.timed_parts(),
            (backbone, "forward", "neck: rest"),
            (head, "pyramid", "FPN"),
            (head.rpn.head, "forward", "RPN layers"),
            (head.rpn, "forward", "RPN proposals"),
            (roi, "box_branch", "box pooling"),
            (roi.box_head, "forward", "box layers"),
            (roi.box_predictor, "forward", "box layers"),
            (roi, "detect", "box NMS"),
        ]
        if head.config.with_masks:
            parts += [
                (roi, "mask_branch", "mask pooling"),
                (roi.mask_head, "forward", "mask layers"),
                (roi.mask_predictor, "forward", "mask layers"),
            ]
        return [*parts, (self, "_on_image", "mask pasting"), (self, "forward", "rest")]

    def counted_parts(self) -> dict[str, tuple[str, ...]]:
        names = {"patch embedding": ("patch_embed",), "blocks, gates": ("blocks", "policy"), "neck": ("neck",)}
        names |= {"FPN": ("fpn",), "RPN layers": ("rpn",), "box layers": ("box",)}
        return {**names, "mask layers": ("mask",)} if self.config.head.with_masks else names


def _meta(*shape: int) -> Tensor:
    """(1, *shape) on the meta device."""
    return torch.empty(1, *shape, device="meta")
