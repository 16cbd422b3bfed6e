"""SegViT on images and label images of one's own, in any folders.

Say where they are (`--data.train-images`, `--data.train-labels`, `--data.val-images`, `--data.val-labels`), how many
classes there are (`--num-classes`, or `--palette` with their colours and names), which label stands for "unknown"
(`--ignore-index`, 255), and what to start from (`--train.vit-from`, the state dict of a ViT-S in timm's naming).
"""

from dataclasses import replace
from pathlib import Path

from sievit.data.semantic import SemanticAugmentConfig
from sievit.engine.recipe import LabelsData, Recipe
from sievit.recipes.segvit import TRAIN, VIT_S, atm, dtop, segmenter


def folders_segvit_s() -> Recipe:
    """Dense SegViT-S on your own images and labels."""
    return Recipe(
        model=segmenter(
            VIT_S,
            atm(192, 3),
            crop=512,
            stride=341,
            short_edge=512,
            long_edge=2048,
            classes=("class 0", "class 1"),
        ),
        data=LabelsData(
            root=Path(),
            train_images=Path("images/train"),
            train_labels=Path("labels/train"),
            val_images=Path("images/val"),
            val_labels=Path("labels/val"),
            augment=SemanticAugmentConfig.paper(512),
        ),
        train=replace(TRAIN, steps=40_000),
    )


def folders_segvit_s_dtop() -> Recipe:
    """DToP, 10k iterations from the dense SegViT-S; it needs the same options."""
    return dtop(folders_segvit_s(), "folders_segvit_s", thresholds=(0.95,), steps=10_000)
