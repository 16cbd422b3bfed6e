"""Street photographs of facades (`<data-root>/facade`): a detector and a segmenter on DINOv2-S, fine-tuned on a CPU.

The first six blocks keep their weights. The transformer carries nearly all of the work: the detector has ViTDet's
simple pyramid (arXiv 2203.16527) and narrow heads, the segmenter SETR's naive ones (arXiv 2012.15840). The photographs
are seen whole in training, at about the size of the test: models that are trained on crops of larger ones are best at
a size that they were not tested at, and pruned models are then compared with the wrong dense one. As variants,
`facade_adapter` has ViT-Adapter's neck, and `facade_segvit` SegViT's heads (arXiv 2210.05844), which learn more slowly.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sievit.data.semantic import SemanticAugmentConfig
from sievit.data.transforms import AugmentConfig
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.heads import ATMConfig, MaskRCNNConfig, SETRNaiveConfig
from sievit.heads.config import AnchorConfig, BoxConfig, MaskConfig, RoIConfig, RPNConfig
from sievit.losses import ATMLossConfig, PixelLossConfig
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.necks.adapter import AdapterConfig
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import DToPConfig, KeepAllConfig, SpreadConfig, SViTConfig
from sievit.recipes.common import DINOV2_S, Listed, pair, weights, with_policy
from sievit.tasks.detection import CocoData
from sievit.tasks.segmentation import LabelsData

CLASSES = (
    "window",
    "balcony-fence",
    "vegetation",
    "facade",
    "street",
    "car",
    "traffic-infrastructure",
    "fence",
    "non-building-infrastructure",
    "shop",
)
PALETTE = (
    (70, 130, 180),
    (255, 196, 61),
    (239, 111, 108),
    (86, 160, 74),
    (190, 178, 160),
    (128, 100, 145),
    (20, 90, 200),
    (250, 130, 20),
    (140, 90, 50),
    (0, 170, 170),
    (220, 60, 160),
)
FOLDER = Path("facade")

BOXES = CocoData(
    train_images=FOLDER / "images/train",
    train_annotations=FOLDER / "annotations/instances_train.json",
    val_images=FOLDER / "images/val",
    val_annotations=FOLDER / "annotations/instances_val.json",
    augment=AugmentConfig(
        scales=(384, 416, 448, 480, 512, 576), crop=(448, 448), brightness=0.1, contrast=0.2, gamma=0.2, saturation=0.3
    ),
    skip_empty=True,
    invalid="skip",
)
LABELS = LabelsData(
    train_images=FOLDER / "images/train",
    train_labels=FOLDER / "labels/train",
    val_images=FOLDER / "images/val",
    val_labels=FOLDER / "labels/val",
    augment=SemanticAugmentConfig(
        base=(448, 896), ratio_range=(0.8, 1.4), crop=(392, 392), class_crops=0.5, photometric=True
    ),
)

TRAIN = TrainConfig(
    vit_from=weights(DINOV2_S),
    epochs=12,
    batch_size=8,
    lr=2e-4,
    head_lr=5.0,
    weight_decay=0.05,
    warmup_steps=50,
    schedule="cosine",
    layer_decay=0.75,
    freeze=6,
    clip_norm=1.0,
    ema=0.99,
    precision="bf16-mixed",
    val_every=4,
    workers=0,
)

RARE = PixelLossConfig(balance=0.5, stride=4)
"""Of four rare classes a dense model learns nothing in a few epochs unless their pixels count more."""

DETECTOR = DetectorConfig(
    vit=replace(DINOV2_S, token_stride=16, drop_path_rate=0.1),
    neck=PyramidConfig(out_channels=128),
    policy=KeepAllConfig(),
    head=MaskRCNNConfig(
        num_classes=len(CLASSES),
        fpn_channels=128,
        anchors=AnchorConfig(sizes=((16.0,), (32.0,), (64.0,), (128.0,), (256.0,))),
        rpn=RPNConfig(pre_nms_train=1000, pre_nms_test=500, post_nms_train=500, post_nms_test=300),
        roi=RoIConfig(sampling_ratio=2, finest_size=28.0),
        box=BoxConfig(fc=512, batch_size=128),
        mask=MaskConfig(convs=(128, 128, 128), deconv=128),
    ),
    input=InputConfig(min_size=448, max_size=896),
    classes=CLASSES,
    category_ids=tuple(range(1, len(CLASSES) + 1)),
)
SEGMENTER = SegmenterConfig(
    vit=replace(DINOV2_S, drop_path_rate=0.1),
    policy=KeepAllConfig(),
    head=SETRNaiveConfig(loss=RARE),
    out_indices=(5, 7, 11),
    input=InputConfig(min_size=448, max_size=896, size_divisor=14, antialias=False),
    classes=("other", *CLASSES),
    palette=PALETTE,
)

DENSE = Recipe(model=DETECTOR, data=BOXES, train=replace(TRAIN, batch_size=4, head_lr=2.0))
ADAPTER = replace(DENSE, model=replace(DETECTOR, neck=AdapterConfig(deform_num_heads=6, drop_path_rate=0.1)))
DENSE_LABELS = Recipe(model=SEGMENTER, data=LABELS, train=TRAIN)
SEGVIT = replace(SEGMENTER, head=ATMConfig(channels=192, num_heads=3, loss=ATMLossConfig(pixel_weight=2.0, pixel=RARE)))
DENSE_SEGVIT = replace(DENSE_LABELS, model=SEGVIT)
SHORT: dict[str, Any] = {
    "epochs": 3,
    "val_every": 3,
    "lr": 1e-4,
    "warmup_steps": 10,
    "ema": 0.97,
    "freeze": 3,
    "distill": 2.0,  # blocks that leave tokens out have to learn, and their features are held
}
SVIT: dict[str, Any] = {
    "policy": SViTConfig(dither="grid", propagate=True, loss_weight=20.0),
    **SHORT,
    "steps": 80,
    "lr": 1e-3,
    "freeze": "model",
    "clip_norm": 0.1,
}
"""Gates that draw; and tokens that are left out follow the most similar one, which costs far less accuracy. The gates
learn in a model that stays as it is: trained together, both lose more. At four times the rate gates closed, and norms
of the gradients are near 0.1 (docs/results.md)."""
SVIT_STAGES: dict[str, Any] = {
    **SVIT,
    "policy": SViTConfig(dither="similarity", per_stage=True, propagate=True, loss_weight=20.0),
}
"""In detectors gates that leave out similar tokens first, and decide three times, lose least; in the segmenter, whose
heads stand behind several blocks, those that decide before each block."""
DTOP: dict[str, Any] = {"policy": DToPConfig(thresholds=(0.9,)), **SHORT}
SPREAD: dict[str, Any] = {"policy": SpreadConfig(), **SHORT, "lr": 2e-4}
"""The rate of the run in docs/results.md."""
ON_PHOTOGRAPHS = "of photographs on DINOv2-S"

RECIPES = {
    **pair("facade_vit", f"detector {ON_PHOTOGRAPHS}, simple pyramid", DENSE, **SVIT_STAGES, sparse_name="facade_svit"),
    **pair("facade_adapter", f"detector {ON_PHOTOGRAPHS}, ViT-Adapter", ADAPTER, **SVIT_STAGES),
    **pair("facade_setr", f"segmenter {ON_PHOTOGRAPHS}, SETR", DENSE_LABELS, **SVIT),
    **pair("facade_setr", f"segmenter {ON_PHOTOGRAPHS}, SETR", DENSE_LABELS, **SPREAD),
    **pair("facade_setr", f"segmenter {ON_PHOTOGRAPHS}, SETR", DENSE_LABELS, **DTOP),
    "facade_setr_dtop_retrain": Listed(f"DToP {ON_PHOTOGRAPHS}, SETR", with_policy(DENSE_LABELS, DTOP["policy"])),
    **pair("facade_segvit", f"segmenter {ON_PHOTOGRAPHS}, SegViT", DENSE_SEGVIT, **DTOP),
}
