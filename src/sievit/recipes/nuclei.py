"""Nuclei in microscopy images (`<data-root>/nuclei`), trained from scratch."""

from dataclasses import replace
from pathlib import Path

from sievit.data.transforms import AugmentConfig
from sievit.engine.recipe import DataConfig, Recipe, TrainConfig
from sievit.policies import SViTConfig
from sievit.recipes.small import small_model

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
        train=TrainConfig(
            epochs=16,
            batch_size=4,
            lr=1e-3,
            weight_decay=0.05,
            warmup_steps=100,
            schedule="cosine",
            clip_norm=5.0,
            ema=0.995,
            precision="bf16-mixed",
            val_every=4,
            val_images=36,
            workers=0,
        ),
    )


def nuclei_svit() -> Recipe:
    """SViT from the dense detector of nuclei."""
    dense = nuclei_vit()
    return replace(
        dense,
        model=replace(dense.model, policy=SViTConfig(noise=0.0)),
        train=replace(dense.train, init_from=Path("runs/nuclei_vit"), epochs=3, lr=3e-4, policy_lr=3.0, val_every=3),
    )
