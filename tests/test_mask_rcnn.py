"""Mask R-CNN: parity with torchvision's and mmdet's, and the cases in which there is nothing to find."""

from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models.detection import roi_heads as tv_roi_heads
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align

from sievit.config import ConfigError, from_json, to_json
from sievit.convert.mmdet_heads import mmdet_heads
from sievit.heads import MaskRCNN, MaskRCNNConfig
from sievit.heads.config import AnchorConfig, BoxConfig, MaskConfig, RoIConfig, RPNConfig
from sievit.heads.masks import crop_masks, paste_masks
from sievit.heads.pooling import box_levels, pool_by_bags, pool_by_kernel
from sievit.released.detectors import release_limits
from tiny import refused

IMAGE_SIZE = (96, 128)
SIZES = [(90, 128), (96, 100)]
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
TORCHVISION = MaskRCNNConfig(
    num_classes=3,
    anchors=AnchorConfig(strides=None, rounded=True),
    rpn=RPNConfig(low_quality_iou=0.0, loss="smooth_l1", post_nms_train=2000),
    roi=RoIConfig(aligned=False, sampling_ratio=2, level_rule="outside"),
    box=BoxConfig(loss="smooth_l1"),
    mask=MaskConfig(targets="soft", paste="torchvision"),
)
"""The constants of torchvision's own."""


def random_features(*, channels: int = 8, num_images: int = 2) -> dict[str, Tensor]:
    height, width = IMAGE_SIZE
    return {
        str(i): torch.randn(num_images, channels, height // s, width // s, requires_grad=True)
        for i, s in enumerate((4, 8, 16, 32))
    }


def random_targets(*, num_objects: tuple[int, ...] = (3, 2), num_classes: int = 3) -> list[dict[str, Tensor]]:
    targets = []
    for count, (height, width) in zip(num_objects, SIZES, strict=True):
        corners = torch.rand(count, 2) * torch.tensor([width - 40.0, height - 40.0])
        boxes = torch.cat([corners, corners + 8 + torch.rand(count, 2) * 30], dim=1)
        masks = (torch.rand(count, height, width) > 0.3).to(torch.uint8)
        labels = torch.randint(1, num_classes + 1, (count,))
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return targets


def small(config: MaskRCNNConfig, *, rpn: dict | None = None, box: dict | None = None) -> MaskRCNNConfig:
    """With narrow layers, and other constants of its stages."""
    return replace(
        config,
        fpn_channels=16,
        rpn=replace(config.rpn, **(rpn or {})),
        box=replace(config.box, fc=32, **(box or {})),
        mask=replace(config.mask, convs=(16, 16), deconv=16),
    )


def small_head(*, with_masks: bool = True, **changes: dict) -> MaskRCNN:
    return MaskRCNN(small(MaskRCNNConfig(num_classes=3, with_masks=with_masks), **changes), in_channels=8)


class StockMaskRCNN(torch.nn.Module):
    """torchvision's own FPN, RPN and RoIHeads, wired as `torchvision.models.detection.MaskRCNN` does."""

    def __init__(self, head: MaskRCNN) -> None:
        super().__init__()
        config, channels = head.config, head.config.fpn_channels
        names = ["0", "1", "2", "3"]
        self.fpn = head.fpn
        anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
        limits = {"training": 2000, "testing": 1000}
        self.rpn = RegionProposalNetwork(anchors, RPNHead(channels, 3), 0.7, 0.3, 256, 0.5, limits, limits, 0.7)
        self.roi_heads = tv_roi_heads.RoIHeads(
            MultiScaleRoIAlign(names, 7, 2),
            TwoMLPHead(channels * 49, config.box.fc),
            FastRCNNPredictor(config.box.fc, config.num_classes + 1),
            *(0.5, 0.5, 512, 0.25, None, config.box.min_score, 0.5, 100),
            MultiScaleRoIAlign(names, 14, 2),
            MaskRCNNHeads(channels, config.mask.convs, 1),
            MaskRCNNPredictor(config.mask.convs[-1], config.mask.deconv, config.num_classes + 1),
        )
        self.load_state_dict(head.state_dict())

    def forward(self, features, targets=None):
        maps = self.fpn(OrderedDict(features))
        images = ImageList(torch.zeros(2, 3, *IMAGE_SIZE), SIZES)
        proposals, losses = self.rpn(images, maps, targets)
        detections, more = self.roi_heads(maps, proposals, SIZES, targets)
        return detections, {**losses, **more}


@pytest.fixture
def pair() -> tuple[MaskRCNN, StockMaskRCNN]:
    # scores of random weights are near 1/4: the lower limit lets detections through
    config = small(TORCHVISION, box={"min_score": 0.2})
    head = MaskRCNN(config, in_channels=8)
    return head, StockMaskRCNN(head)


def test_detections_equal_torchvision(pair) -> None:
    head, stock = pair
    features = random_features()
    with torch.inference_mode():
        detections, losses = head(features, IMAGE_SIZE, SIZES)
        expected, _ = stock.eval()(features)
    assert losses == {}
    for ours, theirs in zip(detections, expected, strict=True):
        assert len(ours["boxes"]) > 20
        for name in ("boxes", "labels", "scores", "masks"):
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-5)


def test_losses_and_gradients_equal_torchvision(pair) -> None:
    head, stock = pair
    features, targets = random_features(), random_targets()
    torch.manual_seed(1)
    losses = head(features, IMAGE_SIZE, SIZES, targets)[1]
    torch.manual_seed(1)
    expected = stock.train()(features, targets)[1]
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    inputs = [*features.values(), *head.rpn.parameters(), *head.roi_heads.parameters()]
    others = [*features.values(), *stock.rpn.parameters(), *stock.roi_heads.parameters()]
    ours = torch.autograd.grad(sum(losses.values()), inputs)
    theirs = torch.autograd.grad(sum(expected.values()), others)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def released(golden_svit: Path) -> MaskRCNN:
    constants = MaskRCNNConfig(num_classes=5, rpn=RPNConfig(pre_nms_test=300, post_nms_test=120))
    return mmdet_heads(load_file(golden_svit / "heads_small.weights_fp16.safetensors"), constants=constants)


@pytest.mark.parametrize("name", ["heads_small", "detector_small_e2e"])
def test_the_released_head(golden_svit, released, name) -> None:
    want = load_file(golden_svit / f"{name}.safetensors")
    source = "fpn_in" if "fpn_in0" in want else "backbone_feat"
    features = {str(i): want[f"{source}{i}"] for i in range(4)}
    padded, content = (128, 192), (120, 180)
    with torch.inference_mode():
        maps = released.pyramid(features)
        proposals = released.rpn(maps, padded, [content], None)[0]
        detected = released(features, padded, [content])[0][0]
        labels = detected["labels"]
        logits = released.roi_heads.mask_branch(maps[:4], [detected["boxes"]])
        masks = paste_masks(detected["masks"], detected["boxes"] / 1.5, (80, 120), released.config)
    torch.testing.assert_close(proposals[0], want["proposals"][:, :4], atol=1e-2, rtol=0)
    assert torch.equal(box_levels(proposals[0], released.config.roi, 4), want["proposal_levels"])
    torch.testing.assert_close(detected["boxes"], want["det_bboxes_netscale"][:, :4], atol=1e-2, rtol=0)
    torch.testing.assert_close(detected["scores"], want["det_bboxes_netscale"][:, 4], atol=1e-4, rtol=0)
    assert torch.equal(labels - 1, want["det_labels_netscale"])
    torch.testing.assert_close(logits[torch.arange(len(labels)), labels], want["mask_logits"], atol=1e-2, rtol=0)
    assert (masks[:, 0] != want["masks"].bool()).float().mean() <= 1e-4
    for i, level in enumerate(maps):
        if f"fpn_out{i}" in want:
            torch.testing.assert_close(level, want[f"fpn_out{i}"], atol=1e-4, rtol=1e-4)
    if "anchors0" in want:
        anchors = released.rpn.anchors([(m.shape[2], m.shape[3]) for m in maps], padded, torch.device("cpu"))
        for i, level in enumerate(anchors):
            assert torch.equal(level, want[f"anchors{i}"])


def test_mask_pasting_against_the_release_and_of_nothing(golden_svit) -> None:
    want = load_file(golden_svit / "det_units.safetensors")
    pasted = paste_masks(want["paste/probs"], want["paste/boxes"], (80, 120), MaskRCNNConfig(num_classes=1))
    assert (pasted[:, 0] != (want["paste/full"] >= 0.5)).sum() <= 1
    flat = torch.tensor([[5.0, 5, 5, 9], [3, 3, 3, 3]])  # mmdet keeps them, so converted models do
    drawn = paste_masks(torch.rand(2, 1, 28, 28), flat, (12, 14), release_limits(MaskRCNNConfig(num_classes=1)))
    assert drawn.shape == (2, 1, 12, 14)

    for paste in ("aligned", "torchvision"):
        config = MaskRCNNConfig(num_classes=1, mask=MaskConfig(paste=paste))
        pasted = paste_masks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (20, 30), config)
        assert pasted.shape == (0, 1, 20, 30)
        assert pasted.dtype == torch.bool


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooling_by_bags_equals_the_kernel(random_rois, aligned, sampling_ratio) -> None:
    maps, rois = random_rois
    config = RoIConfig(sampling_ratio=sampling_ratio, aligned=aligned, finest_size=8.0)
    assert box_levels(rois[:, 1:], config, 4).unique().tolist() == [0, 1, 2, 3]
    pooled, gradients = [], []
    for pool in (pool_by_bags, pool_by_kernel, partial(pool_by_kernel, fixed=True)):
        out = pool(maps, rois, 7, config)
        pooled.append(out)
        gradients.append(torch.autograd.grad((out * torch.linspace(-1, 1, 49).view(7, 7)).sum(), maps))
    for out in pooled[1:]:
        torch.testing.assert_close(pooled[0], out, atol=1e-5, rtol=1e-5)
    for a, *others in zip(*gradients, strict=True):
        for b in others:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.fixture
def random_rois() -> tuple[list[Tensor], Tensor]:
    maps = list(random_features().values())
    corners = torch.rand(60, 2) * 140 - 10  # some boxes stick out, some lie outside
    boxes = torch.cat([corners, corners + torch.rand(60, 2) ** 3 * 150], dim=1)
    boxes[0, 2:] = boxes[0, :2]
    images = torch.arange(60)[:, None] % 2
    return maps, torch.cat([images, boxes], dim=1)


@pytest.mark.parametrize("aligned", [True, False])
def test_mask_crops_equal_those_of_whole_masks(aligned) -> None:
    masks = torch.rand(4, 50, 70) > 0.5
    corners = torch.rand(20, 2) * torch.tensor([60.0, 40.0]) - 4
    boxes = torch.cat([corners, corners + 1 + torch.rand(20, 2) * 30], dim=1)
    matched = torch.randint(0, 4, (20,))
    rois = torch.cat([matched[:, None].float(), boxes], dim=1)
    expected = roi_align(masks[:, None].float(), rois, 28, 1.0, aligned=aligned)[:, 0]
    torch.testing.assert_close(crop_masks(masks, matched, boxes, 28, aligned=aligned), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_objects", [(0, 0), (0, 2)])
@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_images_without_objects_reach_every_parameter(num_objects, with_masks, autocast) -> None:
    head = small_head(with_masks=with_masks)
    targets = random_targets(num_objects=num_objects)
    if not with_masks:
        targets = [{name: t[name] for name in ("boxes", "labels")} for t in targets]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = head(random_features(), IMAGE_SIZE, SIZES, targets)[1]
    assert ("loss_mask" in losses) == with_masks
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_no_proposals_and_no_detections() -> None:
    head = small_head(rpn={"min_size": 1e6})  # nothing is large enough
    with torch.inference_mode():
        detections, _ = head(random_features(), IMAGE_SIZE, SIZES)
    for detection in detections:
        shapes = {name: tuple(value.shape) for name, value in detection.items()}
        assert shapes == {"boxes": (0, 4), "labels": (0,), "scores": (0,), "masks": (0, 1, 28, 28)}
    losses = head(random_features(), IMAGE_SIZE, SIZES, random_targets(num_objects=(0, 0)))[1]
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_half_precision_changes_little() -> None:
    head, features = small_head(box={"min_score": 0.0}), random_features()
    targets = random_targets()
    torch.manual_seed(1)
    expected = head(features, IMAGE_SIZE, SIZES, targets)[1]
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        losses = head(features, IMAGE_SIZE, SIZES, targets)[1]
        detections = head(features, IMAGE_SIZE, SIZES)[0]
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], atol=0.05, rtol=0.05)
    assert detections[0]["boxes"].dtype == torch.float32


def test_crowds_are_no_objects() -> None:
    head, features, targets = small_head(), random_features(), random_targets(num_objects=(1, 0))
    doubled = [
        {k: torch.cat([v, v]) for k, v in t.items()} | {"iscrowd": torch.arange(2 * len(v))}
        for t in targets
        for v in [t["labels"]]
    ]
    torch.manual_seed(1)
    expected = head(features, IMAGE_SIZE, SIZES, targets)[1]
    torch.manual_seed(1)
    losses = head(features, IMAGE_SIZE, SIZES, doubled)[1]
    assert all(torch.equal(losses[name], expected[name]) for name in losses)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": None}, "no 'masks'; train with with_masks=False"),
        ({"labels": torch.tensor([1, 2, 4])}, r"labels 1\.\.4; this model's are 1\.\.3"),
        ({"labels": torch.tensor([0, 2, 3])}, r"labels 0\.\.3"),
        ({"boxes": torch.tensor([[5.0, 5, 9, 9], [3, 3, 3, 8], [1, 1, 2, 2]])}, "target 0 .* without area"),
    ],
)
def test_targets_that_cannot_be(change, message) -> None:
    targets = random_targets()
    targets[0] = {k: v for k, v in {**targets[0], **change}.items() if v is not None}
    refused(message, small_head(), random_features(), IMAGE_SIZE, SIZES, targets)


def test_config_through_json() -> None:
    for config in (MaskRCNNConfig(num_classes=3), replace(TORCHVISION, num_classes=80, with_masks=False)):
        assert from_json(MaskRCNNConfig, to_json(config)) == config
    with pytest.raises(ConfigError, match=r"anchors\.sizes has 2 levels"):
        MaskRCNNConfig(num_classes=1, anchors=AnchorConfig(sizes=((8.0,), (16.0,))))


def test_config_of_an_older_file() -> None:
    """All fields stood in one list then."""
    flat: dict[str, Any] = {
        "num_classes": 3,
        "with_masks": False,
        "fpn_channels": 16,
        "smooth_l1_beta": 0.2,
        "anchor_ratios": [1.0],
    }
    flat |= {"round_anchors": True, "rpn_nms_iou": 0.6, "rpn_box_loss": "smooth_l1", "rpn_box_weights": [1, 2, 3, 4]}
    flat |= {"roi_level_rule": "outside", "box_fc": 8, "box_loss": "smooth_l1", "box_weights": [5, 6, 7, 8]}
    flat |= {"box_nms_iou": 0.4, "mask_convs": [8, 8], "mask_threshold": 0.3}
    config = from_json(MaskRCNNConfig, flat)
    assert config == MaskRCNNConfig(
        num_classes=3,
        with_masks=False,
        fpn_channels=16,
        smooth_l1_beta=0.2,
        anchors=AnchorConfig(ratios=(1.0,), rounded=True),
        rpn=RPNConfig(nms_iou=0.6, loss="smooth_l1", weights=(1, 2, 3, 4)),
        roi=RoIConfig(level_rule="outside"),
        box=BoxConfig(fc=8, loss="smooth_l1", weights=(5, 6, 7, 8), nms_iou=0.4),
        mask=MaskConfig(convs=(8, 8), threshold=0.3),
    )
    with pytest.raises(ConfigError, match=r"config\.box: unknown field 'nms_iuo'; did you mean 'nms_iou'"):
        from_json(MaskRCNNConfig, {"num_classes": 1, "box_nms_iuo": 0.5})
