"""Nuclei in microscopy images (`<data-root>/nuclei`): small models that train from scratch on a CPU.

A detector of 5.4 million weights and a segmenter of 3.2 million, one or two images a second on one core, or five.
"""

from dataclasses import replace
from pathlib import Path

from sievit.data.semantic import SemanticAugmentConfig
from sievit.data.transforms import AugmentConfig
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.heads import ATMConfig, MaskRCNNConfig
from sievit.heads.config import AnchorConfig, BoxConfig, MaskConfig, RoIConfig, RPNConfig
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import DToPConfig, KeepAllConfig, SViTConfig
from sievit.recipes.common import Listed, pair, with_policy
from sievit.tasks.detection import CocoData
from sievit.tasks.segmentation import LabelsData
from sievit.vit import ViTConfig

IMAGES = Path("nuclei/images")
TRAIN_FILE = Path("nuclei/annotations/instances_train.json")
VAL_FILE = Path("nuclei/annotations/instances_val.json")

BOXES = CocoData(
    train_images=IMAGES,
    train_annotations=TRAIN_FILE,
    val_images=IMAGES,
    val_annotations=VAL_FILE,
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
LABELS = LabelsData(
    train_images=IMAGES,
    train_labels=Path("nuclei/labels"),
    train_names=TRAIN_FILE,
    val_images=IMAGES,
    val_labels=Path("nuclei/labels"),
    val_names=VAL_FILE,
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

TRAIN = TrainConfig(
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
)

DETECTOR = DetectorConfig(
    vit=ViTConfig(grid=(20, 20), embed_dim=128, num_heads=4),
    neck=AdapterConfig(conv_inplane=32, deform_num_heads=4, deform_ratio=0.5),
    policy=KeepAllConfig(),
    head=MaskRCNNConfig(
        num_classes=1,
        fpn_channels=96,
        anchors=AnchorConfig(sizes=((16.0,), (32.0,), (64.0,), (128.0,), (256.0,))),
        rpn=RPNConfig(pre_nms_train=1000, pre_nms_test=500, post_nms_train=500, post_nms_test=300),
        roi=RoIConfig(sampling_ratio=2),
        box=BoxConfig(fc=256, batch_size=96, max_detections=200),
        mask=MaskConfig(convs=(96, 96, 96, 96), deconv=96),
    ),
    input=InputConfig(min_size=416, max_size=832),
    classes=("nucleus",),
    category_ids=(1,),
)
SEGMENTER = SegmenterConfig(
    vit=ViTConfig(grid=(24, 24), patch_size=8, embed_dim=128, num_heads=2),
    policy=KeepAllConfig(),
    head=ATMConfig(channels=64, num_heads=2),
    out_indices=(5, 7, 11),
    crop=(192, 192),
    stride=(160, 160),
    input=InputConfig(min_size=512, max_size=1024, size_divisor=8),
    classes=("background", "nucleus", "border"),
    palette=((24, 26, 40), (46, 196, 182), (255, 99, 72)),
)

DENSE = Recipe(model=DETECTOR, data=BOXES, train=TRAIN)
DENSE_LABELS = Recipe(
    model=SEGMENTER, data=LABELS, train=replace(TRAIN, epochs=10, val_every=10, batch_size=8, channels_last=False)
)
SVIT = SViTConfig(noise=0.0)
"""In so few steps gates that draw noise stay undecided (see docs/lab-earlier.md)."""
DTOP = DToPConfig(thresholds=(0.95,))

RECIPES = {
    **pair(
        "nuclei_vit",
        "detector of nuclei",
        DENSE,
        SVIT,
        sparse_name="nuclei_svit",
        epochs=3,
        val_every=3,
        lr=3e-4,
        policy_lr=3.0,
    ),
    **pair(
        "nuclei_segvit",
        "segmenter of nuclei and their borders",
        DENSE_LABELS,
        DTOP,
        epochs=4,
        val_every=4,
        lr=3e-4,
    ),
    "nuclei_segvit_dtop_retrain": Listed("DToP from scratch on nuclei", with_policy(DENSE_LABELS, DTOP)),
}
