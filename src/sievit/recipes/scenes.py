"""Generated scenes, trained from scratch."""

from dataclasses import replace
from pathlib import Path

from sievit.data.scenes import CLASSES
from sievit.data.transforms import AugmentConfig
from sievit.engine.recipe import DataConfig, Recipe, ScenesConfig, TrainConfig
from sievit.policies import SViTConfig
from sievit.recipes.small import small_model

DATA = DataConfig(
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
        train=TrainConfig(
            epochs=5,
            batch_size=4,
            lr=1e-3,
            weight_decay=0.05,
            warmup_steps=100,
            schedule="cosine",
            clip_norm=5.0,
            ema=0.995,
            precision="bf16-mixed",
            val_every=2,
            val_images=40,
            workers=0,
        ),
    )


def scenes_svit() -> Recipe:
    """SViT from the dense detector of scenes."""
    dense = scenes_vit()
    return replace(
        dense,
        model=replace(dense.model, policy=SViTConfig(noise=0.0)),
        train=replace(dense.train, init_from=Path("runs/scenes_vit"), epochs=1, lr=3e-4, policy_lr=3.0, val_every=1),
    )
