"""Nuclei in microscopy images (`<data-root>/nuclei`), trained from scratch."""

from pathlib import Path

from sievit.data.transforms import AugmentConfig
from sievit.engine.recipe import DataConfig, Recipe
from sievit.recipes.small import small_model, small_sparse, small_training

DATA = DataConfig(
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
