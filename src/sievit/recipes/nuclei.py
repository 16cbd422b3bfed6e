"""Nuclei in microscopy images (`<data-root>/nuclei`), trained from scratch."""

from pathlib import Path

from sievit.data.semantic import SemanticAugmentConfig
from sievit.data.transforms import AugmentConfig
from sievit.engine.recipe import CocoData, LabelsData, Recipe
from sievit.recipes.small import (
    small_dtop,
    small_dtop_retrained,
    small_model,
    small_segmenter,
    small_semantic_training,
    small_sparse,
    small_training,
)

DATA = CocoData(
    train_images=Path("nuclei/images"),
    train_annotations=Path("nuclei/annotations/instances_train.json"),
    val_images=Path("nuclei/images"),
    val_annotations=Path("nuclei/annotations/instances_val.json"),
    augment=AugmentConfig(
        flip=0.5,
        vertical_flip=0.5,
        rot90=True,
        scales=(320, 352, 384, 416, 448, 480, 512),
        crop=(320, 320),
        brightness=0.1,
        contrast=0.2,
        gamma=0.2,
    ),
)


def nuclei_vit() -> Recipe:
    """Dense detector of nuclei, from scratch."""
    return Recipe(
        model=small_model(
            classes=("nucleus",), test_size=(416, 832), anchors=(16.0, 32.0, 64.0, 128.0, 256.0), max_detections=200
        ),
        data=DATA,
        train=small_training(epochs=16, val_every=4, val_images=36),
    )


def nuclei_svit() -> Recipe:
    """SViT from the dense detector of nuclei."""
    return small_sparse(nuclei_vit(), start=Path("runs/nuclei_vit"), epochs=3)


LABELS = LabelsData(
    train_images=Path("nuclei/images"),
    train_labels=Path("nuclei/labels"),
    train_names=Path("nuclei/annotations/instances_train.json"),
    val_images=Path("nuclei/images"),
    val_labels=Path("nuclei/labels"),
    val_names=Path("nuclei/annotations/instances_val.json"),
    augment=SemanticAugmentConfig(
        flip=0.5,
        vertical_flip=0.5,
        rot90=True,
        scales=(384, 432, 480, 528, 576, 624),
        crop=(192, 192),
        cat_max_ratio=1.0,
        brightness=0.1,
        contrast=0.2,
        gamma=0.2,
    ),
)


def nuclei_segvit() -> Recipe:
    """Dense segmenter of nuclei and their borders, from scratch."""
    return Recipe(
        model=small_segmenter(
            classes=("background", "nucleus", "border"),
            palette=((24, 26, 40), (46, 196, 182), (255, 99, 72)),
            test_size=(512, 1024),
        ),
        data=LABELS,
        train=small_semantic_training(epochs=10, val_every=10, val_images=36),
    )


def nuclei_segvit_dtop() -> Recipe:
    """DToP, fine-tuned from the dense segmenter of nuclei."""
    return small_dtop(nuclei_segvit(), start=Path("runs/nuclei_segvit"), epochs=4)


def nuclei_segvit_dtop_retrain() -> Recipe:
    """DToP, trained from scratch on nuclei."""
    return small_dtop_retrained(nuclei_segvit())
