"""Generated scenes, trained from scratch with the models of `nuclei`."""

from dataclasses import replace
from pathlib import Path

from sievit.data.scenes import CLASSES
from sievit.data.semantic import SemanticAugmentConfig
from sievit.data.transforms import AugmentConfig
from sievit.engine.recipe import CocoData, LabelsData, Recipe, ScenesConfig
from sievit.models.inputs import InputConfig
from sievit.recipes import nuclei
from sievit.recipes.common import pair

BOXES = CocoData(
    train_images=Path("scenes/train/images"),
    train_annotations=Path("scenes/train/annotations.json"),
    val_images=Path("scenes/val/images"),
    val_annotations=Path("scenes/val/annotations.json"),
    root=Path("out"),
    scenes=ScenesConfig(num_train=1200, num_val=100, size=(512, 512)),
    augment=AugmentConfig(flip=0.5, scales=(352, 416, 480, 544), crop=(256, 256)),
)
LABELS = LabelsData(
    train_images=Path("scenes/train/images"),
    train_labels=Path("scenes/train/labels"),
    val_images=Path("scenes/val/images"),
    val_labels=Path("scenes/val/labels"),
    root=Path("out"),
    scenes=BOXES.scenes,
    augment=SemanticAugmentConfig(flip=0.5, scales=(256, 320, 384, 448), crop=(192, 192), cat_max_ratio=0.97),
)
HEAD = nuclei.DETECTOR.head
DETECTOR = replace(
    nuclei.DETECTOR,
    head=replace(HEAD, num_classes=len(CLASSES), box=replace(HEAD.box, max_detections=100)),
    input=InputConfig(min_size=512, max_size=1024),
    classes=CLASSES,
    category_ids=tuple(range(1, len(CLASSES) + 1)),
)
SEGMENTER = replace(
    nuclei.SEGMENTER,
    vit=replace(nuclei.SEGMENTER.vit, embed_dim=96),
    input=InputConfig(min_size=320, max_size=640, size_divisor=8),
    classes=("ground", *CLASSES),
    palette=((92, 84, 72), (255, 99, 72), (46, 196, 182), (124, 207, 70), (255, 200, 40), (178, 120, 255)),
)
DENSE = Recipe(model=DETECTOR, data=BOXES, train=replace(nuclei.TRAIN, epochs=5, val_every=2, val_images=40))
DENSE_LABELS = Recipe(
    model=SEGMENTER,
    data=LABELS,
    train=replace(nuclei.DENSE_LABELS.train, epochs=6, val_every=3, val_images=40),
)

RECIPES = {
    **pair(
        "scenes_vit",
        "detector of generated scenes",
        DENSE,
        nuclei.SVIT,
        sparse_name="scenes_svit",
        epochs=1,
        val_every=1,
        lr=3e-4,
        policy_lr=3.0,
    ),
    **pair(
        "scenes_segvit",
        "segmenter of generated scenes",
        DENSE_LABELS,
        nuclei.DTOP,
        epochs=2,
        val_every=2,
        lr=3e-4,
    ),
}
