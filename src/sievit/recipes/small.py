"""Small models that train from scratch on a CPU: a detector of 5.4 million weights, a segmenter of 3.2 million."""

from dataclasses import replace
from pathlib import Path

from sievit.engine.recipe import Recipe, TrainConfig
from sievit.heads import ATMConfig, MaskRCNNConfig
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import DToPConfig, KeepAllConfig, SViTConfig
from sievit.vit import ViTConfig


def small_model(
    *, classes: tuple[str, ...], test_size: tuple[int, int], anchors: tuple[float, ...], max_detections: int
) -> DetectorConfig:
    """A ViT of width 128 and depth 12 with a narrow adapter and Mask R-CNN.

    Args:
        test_size: short edge of test images in pixels, and limit of the long one.
        anchors: size of the anchors per level, in pixels.
        max_detections: per image.
    """
    return DetectorConfig(
        vit=ViTConfig(grid=(20, 20), embed_dim=128, num_heads=4),
        neck=AdapterConfig(conv_inplane=32, deform_num_heads=4, deform_ratio=0.5),
        policy=KeepAllConfig(),
        head=MaskRCNNConfig(
            num_classes=len(classes),
            fpn_channels=96,
            box_fc=256,
            mask_convs=(96, 96, 96, 96),
            mask_deconv=96,
            anchor_sizes=tuple((size,) for size in anchors),
            roi_sampling_ratio=2,
            rpn_pre_nms_train=1000,
            rpn_pre_nms_test=500,
            rpn_post_nms_train=500,
            rpn_post_nms_test=300,
            box_batch_size=96,
            box_max_detections=max_detections,
        ),
        input=InputConfig(min_size=test_size[0], max_size=test_size[1]),
        classes=classes,
        category_ids=tuple(range(1, len(classes) + 1)),
    )


def small_training(*, epochs: int, val_every: int, val_images: int) -> TrainConfig:
    """From scratch, on one CPU core an image or two a second."""
    return TrainConfig(
        epochs=epochs,
        batch_size=4,
        lr=1e-3,
        weight_decay=0.05,
        warmup_steps=100,
        schedule="cosine",
        clip_norm=5.0,
        ema=0.995,
        precision="bf16-mixed",
        val_every=val_every,
        val_images=val_images,
        workers=0,
    )


def small_segmenter(
    *,
    classes: tuple[str, ...],
    palette: tuple[tuple[int, int, int], ...],
    test_size: tuple[int, int],
    embed_dim: int = 128,
) -> SegmenterConfig:
    """SegViT on a ViT of patch 8 and depth 12, with heads behind the blocks 5, 7 and 11.

    Args:
        test_size: short edge of test images in pixels, and limit of the long one.
    """
    return SegmenterConfig(
        vit=ViTConfig(grid=(24, 24), patch_size=8, embed_dim=embed_dim, num_heads=2),
        policy=KeepAllConfig(),
        head=ATMConfig(channels=64, num_heads=2),
        out_indices=(5, 7, 11),
        crop=(192, 192),
        stride=(160, 160),
        input=InputConfig(min_size=test_size[0], max_size=test_size[1], size_divisor=8),
        classes=classes,
        palette=palette,
    )


def small_semantic_training(*, epochs: int, val_every: int, val_images: int) -> TrainConfig:
    """From scratch, on one CPU core five images a second."""
    return replace(
        small_training(epochs=epochs, val_every=val_every, val_images=val_images), batch_size=8, channels_last=False
    )


def small_dtop(dense: Recipe, *, start: Path, epochs: int) -> Recipe:
    """DToP from a dense run, with a threshold of 0.95."""
    return replace(
        dense,
        model=replace(dense.model, policy=DToPConfig(thresholds=(0.95,))),
        train=replace(dense.train, init_from=start, epochs=epochs, lr=3e-4, val_every=epochs),
    )


def small_dtop_retrained(dense: Recipe) -> Recipe:
    """DToP from scratch, for as long as the dense model."""
    return replace(dense, model=replace(dense.model, policy=DToPConfig(thresholds=(0.95,))))


def small_sparse(dense: Recipe, *, start: Path, epochs: int) -> Recipe:
    """SViT from a dense run. Its gates draw no noise: in so few steps noisy ones stay undecided (see docs/lab.md)."""
    return replace(
        dense,
        model=replace(dense.model, policy=SViTConfig(noise=0.0)),
        train=replace(dense.train, init_from=start, epochs=epochs, lr=3e-4, policy_lr=3.0, val_every=epochs),
    )
