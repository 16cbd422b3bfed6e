"""SegViT and DToP on Pascal Context's 59 classes (`<data-root>/pascal_context`: JPEGImages, SegmentationClassContext,
ImageSets).

How they are trained, and DToP's three ways from them, is told in `segvit`.
"""

from dataclasses import replace
from pathlib import Path

from sievit.data.presets import preset
from sievit.data.semantic import SemanticAugmentConfig
from sievit.engine.recipe import Recipe
from sievit.recipes.segvit import TRAIN, VIT_L, atm, dtop, labels_data, segmenter


def pascal_context_segvit_l() -> Recipe:
    """Dense SegViT-L on Pascal Context (63.0 mIoU at 315.4 GFLOPs in the paper)."""
    data = preset("pascal_context59")
    return Recipe(
        model=segmenter(
            VIT_L,
            atm(512, 16),
            crop=480,
            stride=320,
            short_edge=520,
            long_edge=2048,
            classes=data.classes,
            palette=data.palette,
        ),
        data=labels_data(data, Path("pascal_context"), SemanticAugmentConfig.paper(480, base=(520, 2048))),
        train=replace(TRAIN, val_every=13),  # 4056 iterations
    )


def pascal_context_segvit_l_dtop() -> Recipe:
    """DToP, 40k iterations from the dense SegViT-L (62.7 mIoU at 224.3 GFLOPs in the paper)."""
    dense = pascal_context_segvit_l()
    return dtop(dense, "pascal_context_segvit_l", thresholds=(0.95, 0.95, 0.95), steps=40_000)
