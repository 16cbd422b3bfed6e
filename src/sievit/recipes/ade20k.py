"""The papers' segmenters on ADE20K (`<data-root>/ade20k`: images and annotations, each with training and validation).

How they are trained, and DToP's three ways from them, is told in `segvit`.
"""

from dataclasses import replace
from pathlib import Path

from sievit.data.presets import preset
from sievit.data.semantic import SemanticAugmentConfig
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.heads import SemanticHeadConfig, SETRNaiveConfig
from sievit.recipes.segvit import TRAIN, VIT_B, VIT_L, Backbone, atm, dtop, labels_data, segmenter


def dense(
    backbone: Backbone,
    head: SemanticHeadConfig,
    *,
    crop: int,
    stride: int,
    aux_weight: float = 1.0,
    train: TrainConfig = TRAIN,
) -> Recipe:
    """A dense segmenter; `crop` and `stride` as of `segvit.segmenter`."""
    data = preset("ade20k")
    return Recipe(
        model=segmenter(
            backbone,
            head,
            crop=crop,
            stride=stride,
            short_edge=crop,
            long_edge=4 * crop,
            classes=data.classes,
            palette=data.palette,
            aux_weight=aux_weight,
        ),
        data=labels_data(data, Path("ade20k"), SemanticAugmentConfig.paper(crop)),
        train=replace(train, val_every=3),  # 3789 iterations
    )


def ade20k_segvit_b() -> Recipe:
    """Dense SegViT-B on ADE20K (49.6 mIoU at 109.9 GFLOPs in the paper)."""
    return dense(VIT_B, atm(384, 6), crop=512, stride=341)


def ade20k_segvit_b_dtop() -> Recipe:
    """DToP, 40k iterations from the dense SegViT-B (49.8 mIoU at 86.8 GFLOPs in the paper)."""
    return dtop(ade20k_segvit_b(), "ade20k_segvit_b", thresholds=(0.9,), steps=40_000)


def ade20k_segvit_l() -> Recipe:
    """Dense SegViT-L on ADE20K (53.3 mIoU at 617.0 GFLOPs in the paper)."""
    return dense(VIT_L, atm(512, 8), crop=640, stride=320)


def ade20k_segvit_l_dtop() -> Recipe:
    """DToP, 40k iterations from the dense SegViT-L (52.8 mIoU at 412.8 GFLOPs in the paper)."""
    return dtop(ade20k_segvit_l(), "ade20k_segvit_l", thresholds=(0.95, 0.95, 0.95), steps=40_000)


def ade20k_setr_b() -> Recipe:
    """Dense SETR-B with naive heads on ADE20K (47.0 mIoU at 107.7 GFLOPs in the paper)."""
    return dense(VIT_B, SETRNaiveConfig(), crop=512, stride=341, aux_weight=0.4)


def ade20k_setr_b_dtop() -> Recipe:
    """DToP, 40k iterations from the dense SETR-B (47.0 mIoU at 80.6 GFLOPs in the paper)."""
    return dtop(ade20k_setr_b(), "ade20k_setr_b", thresholds=(0.98,), steps=40_000)
