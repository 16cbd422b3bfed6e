"""The detector: images in, torchvision's dictionaries out.

Letters: b images, (h, w) an image's pixels, d detections, g objects. Boxes are xyxy pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from sievit.config import ConfigError, variant
from sievit.heads.mask_rcnn import MaskRCNN, MaskRCNNConfig
from sievit.heads.masks import paste_masks
from sievit.hub import Pretrained
from sievit.models.backbone import Backbone, build_backbone
from sievit.models.inputs import ModelConfig, Size, batched, in_batches
from sievit.necks import NeckConfig
from sievit.policies import Policy
from sievit.tokens import Trace
from sievit.vit import ViT
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
    category_ids: tuple[int, ...]
    padding: Literal["hidden", "seen"] = "hidden"

    def __post_init__(self) -> None:
        if len(self.classes) != self.head.num_classes or len(self.category_ids) != self.head.num_classes:
            raise ConfigError(
                f"head.num_classes is {self.head.num_classes}, but there are {len(self.classes)} classes and "
                f"{len(self.category_ids)} category_ids; give one of each per class"
            )


@dataclass(frozen=True)
class Output:
    """What a pass of the detector returns.

    Attributes:
        detections: per image `boxes` (d, 4), `labels` (d,), `scores` (d,) best first, and with a mask branch `masks`
            (d, 1, h, w) bool, all on the pixels of the image that was given; empty when targets were given.
        losses: by name, weighted; empty without targets.
        trace: which tokens took part in which block.
        sizes: per image the (height, width) that the network saw; `image_size`: that of the padded batch.
    """

    detections: list[dict[str, Tensor]]
    losses: dict[str, Tensor]
    trace: Trace
    sizes: list[Size]
    image_size: Size


class Detector(Pretrained):
    """A backbone and Mask R-CNN."""

    kind = "detector"

    def __init__(self, config: DetectorConfig, *, backbone: Backbone, head: MaskRCNN) -> None:
        super().__init__()
        self.config: DetectorConfig = config
        self.backbone: Backbone = backbone
        self.head = head

    @classmethod
    def from_config(cls, config: DetectorConfig) -> Self:
        """The detector that `config` describes, with random weights."""
        backbone = build_backbone(config.neck, config.vit, config.policy)
        return cls(config, backbone=backbone, head=MaskRCNN(config.head, in_channels=backbone.out_channels))

    @property
    def policy(self) -> Policy:
        """Decides which tokens take part."""
        return self.backbone.policy

    @property
    def vit(self) -> ViT:
        """The plain ViT inside."""
        return self.backbone.vit

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution | None = None,
    ) -> Output:
        """Losses when `targets` are given, detections when not.

        Args:
            images: (3, h, w) RGB, float in 0..1 or uint8, of any sizes. With targets they are used at their size,
                without they are resized to the test size.
            targets: per image `boxes` (g, 4), `labels` (g,), and `masks` (g, h, w) for a mask branch.
            policy: takes the place of the model's own.
            execution: how the pass is run, in place of the model's own; by default losses run as `Execution()`.
        """
        given = [(image.shape[-2], image.shape[-1]) for image in images]
        sizes = given if targets is not None else [self.config.input.test_size(size) for size in given]
        batch = batched(images, sizes, self.config.input, self.device)
        image_size = (batch.shape[-2], batch.shape[-1])
        own = sizes if self.config.padding == "hidden" else None
        if targets is not None:
            execution = execution or Execution()
            targets = [{name: x.to(self.device) for name, x in t.items() if isinstance(x, Tensor)} for t in targets]
        elif execution is None:
            execution = self.config.execution
        with execution.autocast(self.device):
            features, trace = execution.run(self.backbone, batch, own, policy=policy)
            detections, losses = self.head(features, image_size, sizes, targets)
        if targets is not None:
            chosen = self.policy if policy is None else policy
            losses = {**losses, **chosen.loss(trace)}
        detections = [self._on_image(d, *pair) for d, *pair in zip(detections, sizes, given, strict=targets is None)]
        return Output(detections=detections, losses=losses, trace=trace, sizes=sizes, image_size=image_size)

    def _on_image(self, detection: dict[str, Tensor], size: Size, given: Size) -> dict[str, Tensor]:
        """The detection on the pixels of the image that was given, instead of those that the network saw."""
        ratio = detection["boxes"].new_tensor([given[1] / size[1], given[0] / size[0]] * 2)
        limit = ratio.new_tensor([given[1], given[0]] * 2)
        boxes = (detection["boxes"] * ratio).minimum(limit)
        moved = {**detection, "boxes": boxes}
        if "masks" in detection:
            moved["masks"] = paste_masks(detection["masks"], boxes, given, self.config.head)
        return moved

    @torch.no_grad()
    def predict(
        self, images: Sequence[Any], *, batch_size: int = 1, policy: Policy | None = None
    ) -> list[dict[str, Tensor]]:
        """Detect objects; the model is in evaluation mode meanwhile.

        Args:
            images: paths, PIL images, arrays (h, w, 3) or (h, w) of uint8, tensors (3, h, w) of uint8 or float in 0..1;
                RGB.
            batch_size: images that go through the network together.

        Returns:
            Per image `boxes` (d, 4), `labels` (d,), `scores` (d,), `masks` (d, 1, h, w) bool, on its own pixels.

        Raises:
            ConfigError: not a list of images, or a file that cannot be read.
        """
        training = self.training
        self.eval()
        try:
            detections = []
            for tensors in in_batches(images, batch_size):
                detections += self(tensors, policy=policy).detections
        finally:
            self.train(training)
        return detections
