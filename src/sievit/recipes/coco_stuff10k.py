"""SegViT and DToP on COCO-Stuff-10K (`<data-root>/coco_stuff10k`: images and annotations, each with train2014 and
test2014).

Labels are from 1 to 171 in files called `*_labelTrainIds.png`; for files with COCO's own ids see `data.presets`. How
the models are trained, and DToP's three ways from them, is told in `segvit`.
"""

from dataclasses import replace
from pathlib import Path

from sievit.data.presets import preset
from sievit.data.semantic import SemanticAugmentConfig
from sievit.engine.recipe import Recipe
from sievit.recipes.segvit import TRAIN, VIT_L, atm, dtop, labels_data, segmenter


def coco_stuff10k_segvit_l() -> Recipe:
    """Dense SegViT-L on COCO-Stuff-10K (47.4 mIoU at 366.9 GFLOPs in the paper)."""
    data = preset("coco_stuff10k")
    return Recipe(
        model=segmenter(
            VIT_L,
            atm(512, 16),
            crop=512,
            stride=341,
            short_edge=512,
            long_edge=2048,
            classes=data.classes,
            palette=data.palette,
        ),
        data=labels_data(data, Path("coco_stuff10k"), SemanticAugmentConfig.paper(512)),
        train=replace(TRAIN, val_every=7),  # 3934 iterations
    )


def coco_stuff10k_segvit_l_dtop() -> Recipe:
    """DToP, 20k iterations from the dense SegViT-L (47.1 mIoU at 276.2 GFLOPs in the paper)."""
    return dtop(coco_stuff10k_segvit_l(), "coco_stuff10k_segvit_l", thresholds=(0.95,), steps=20_000)
