"""Generated scenes, trained from scratch."""

from pathlib import Path

from sievit.data.scenes import CLASSES
from sievit.data.semantic import SemanticAugmentConfig
from sievit.data.transforms import AugmentConfig
from sievit.engine.recipe import CocoData, LabelsData, Recipe, ScenesConfig
from sievit.recipes.small import (
    small_dtop,
    small_model,
    small_segmenter,
    small_semantic_training,
    small_sparse,
    small_training,
)

DATA = CocoData(
    train_images=Path("scenes/train/images"),
    train_annotations=Path("scenes/train/annotations.json"),
    val_images=Path("scenes/val/images"),
    val_annotations=Path("scenes/val/annotations.json"),
    root=Path("out"),
    scenes=ScenesConfig(num_train=1200, num_val=100, size=(512, 512)),
    augment=AugmentConfig(flip=0.5, scales=(352, 416, 480, 544), crop=(256, 256)),
)


def scenes_vit() -> Recipe:
    """Dense detector of generated scenes, from scratch."""
    return Recipe(
        model=small_model(
            classes=CLASSES, test_size=(512, 1024), anchors=(16.0, 32.0, 64.0, 128.0, 256.0), max_detections=100
        ),
        data=DATA,
        train=small_training(epochs=5, val_every=2, val_images=40),
    )


def scenes_svit() -> Recipe:
    """SViT from the dense detector of scenes."""
    return small_sparse(scenes_vit(), start=Path("runs/scenes_vit"), epochs=1)


LABELS = LabelsData(
    train_images=Path("scenes/train/images"),
    train_labels=Path("scenes/train/labels"),
    val_images=Path("scenes/val/images"),
    val_labels=Path("scenes/val/labels"),
    root=Path("out"),
    scenes=DATA.scenes,
    augment=SemanticAugmentConfig(flip=0.5, scales=(256, 320, 384, 448), crop=(192, 192), cat_max_ratio=0.97),
)


def scenes_segvit() -> Recipe:
    """Dense segmenter of generated scenes, from scratch."""
    return Recipe(
        model=small_segmenter(
            classes=("ground", *CLASSES),
            palette=((92, 84, 72), (255, 99, 72), (46, 196, 182), (124, 207, 70), (255, 200, 40), (178, 120, 255)),
            test_size=(320, 640),
            embed_dim=96,
        ),
        data=LABELS,
        train=small_semantic_training(epochs=6, val_every=3, val_images=40),
    )


def scenes_segvit_dtop() -> Recipe:
    """DToP, fine-tuned from the dense segmenter of scenes."""
    return small_dtop(scenes_segvit(), start=Path("runs/scenes_segvit"), epochs=2)
