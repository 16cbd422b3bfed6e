"""Detectors: ViT-Adapter (arXiv 2205.08534) with Mask R-CNN, dense and with SViT's gates.

- coco_vit_adapter_*, coco_svit_adapter_*: the papers' models on COCO 2017 (`<data-root>/coco`: train2017, val2017,
  annotations). The dense one starts from an ImageNet ViT (`--train.vit-from`, a DeiT state dict).
- coco_dinov2_*, coco_dinov3_*: the same on self-supervised backbones; timm downloads their weights when training
  starts, or `--train.vit-from vit_small_patch14_dinov2.pth` gives a file. Patches of 14 pixels stand for 16 of the
  image, which is resized first. Rates fall from block to block towards the embedding (ViTDet, arXiv 2203.16527);
  `--train.freeze vit` trains everything but the backbone. None of these schedules was run in full.
- boxes_dinov2_s: boxes of your own in COCO's format, with the classes of your file. Give `--data.train-images`,
  `--data.train-annotations`, `--data.val-images` and `--data.val-annotations`, for the sparse model too; where the
  files hold masks, `--model.head.with-masks` trains on them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sievit.data.presets import preset
from sievit.data.transforms import AugmentConfig
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.heads.config import MaskRCNNConfig
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import KeepAllConfig, SViTConfig
from sievit.recipes.common import DINOV2_B, DINOV2_S, DINOV3_B, DINOV3_S, Listed, pair, weights
from sievit.tasks.detection import CocoData
from sievit.vit import ViTConfig

CLASSES = preset("coco_stuff10k").classes[:80]
CATEGORY_IDS = (preset("coco_stuff10k_ids").values or ())[:80]
"""The things of COCO, and the ids that its files give them."""

COCO = CocoData(
    train_images=Path("coco/train2017"),
    train_annotations=Path("coco/annotations/instances_train2017.json"),
    val_images=Path("coco/val2017"),
    val_annotations=Path("coco/annotations/instances_val2017.json"),
    augment=replace(AugmentConfig.paper(), crop=(1024, 1024)),
    skip_empty=True,
    invalid="skip",  # train2017 holds a box without area
)
MY_BOXES = CocoData(
    root=Path(),
    train_images=Path("images/train"),
    train_annotations=Path("annotations/train.json"),
    val_images=Path("images/val"),
    val_annotations=Path("annotations/val.json"),
    augment=COCO.augment,
    own_classes=True,
)

TRAIN = TrainConfig(
    epochs=36,
    batch_size=16,
    lr=1e-4,
    weight_decay=0.05,
    warmup_steps=500,
    warmup_start=0.001,
    schedule="step",
    step_epochs=(27, 33),
    precision="16-mixed",
    workers=4,
)
DINO_TRAIN = replace(TRAIN, layer_decay=0.8, precision="bf16-mixed")


def _detector(
    vit: ViTConfig,
    input: InputConfig = InputConfig(),  # noqa: B008
    *,
    classes: tuple[str, ...] = CLASSES,
    category_ids: tuple[int, ...] = CATEGORY_IDS,
    with_masks: bool = True,
) -> DetectorConfig:
    base = vit.embed_dim == 768
    return DetectorConfig(
        vit=vit,
        neck=AdapterConfig(
            deform_num_heads=12 if base else 6,
            deform_ratio=0.5 if base else 1.0,
            drop_path_rate=vit.drop_path_rate,
        ),
        policy=KeepAllConfig(),
        head=MaskRCNNConfig(num_classes=len(classes), with_masks=with_masks),
        input=input,
        classes=classes,
        category_ids=category_ids,
    )


def _paper(embed_dim: int, num_heads: int, drop_path_rate: float) -> Recipe:
    vit = ViTConfig(embed_dim=embed_dim, num_heads=num_heads, drop_path_rate=drop_path_rate, pos_antialias=False)
    return Recipe(model=_detector(vit, InputConfig(antialias=False)), data=COCO, train=TRAIN)


def _at_stride_16(vit: ViTConfig) -> ViTConfig:
    return replace(vit, token_stride=16, drop_path_rate=0.2 if vit.embed_dim == 384 else 0.3)


def _dino(vit: ViTConfig) -> Recipe:
    return Recipe(model=_detector(_at_stride_16(vit)), data=COCO, train=replace(DINO_TRAIN, vit_from=weights(vit)))


def _svit(name: str, what: str, dense: Recipe, *, epochs: int = 4, step: int = 3, **listed: Any) -> dict[str, Listed]:
    """With SViT's fine-tuning of `epochs`, the rate falling after `step`; `listed` as of `pair`."""
    listed |= {"lr": 1e-5, "weight_decay": 1e-6, "epochs": epochs, "step_epochs": (step,)}
    return pair(name, what, dense, SViTConfig(), **listed)


MY_DETECTOR = Recipe(
    model=_detector(_at_stride_16(DINOV2_S), classes=("object",), category_ids=(1,), with_masks=False),
    data=MY_BOXES,
    train=replace(DINO_TRAIN, vit_from=weights(DINOV2_S), epochs=24, step_epochs=(16, 22), batch_size=8),
)

RECIPES = {
    **_svit(
        "coco_vit_adapter_t",
        "ViT-Adapter-T with Mask R-CNN",
        _paper(192, 3, 0.1),
        epochs=6,
        step=4,
        paper=("45.8 box AP, 40.9 mask AP", "45.5 box AP, 40.7 mask AP"),
        sparse_name="coco_svit_adapter_t",
    ),
    **_svit(
        "coco_vit_adapter_s",
        "ViT-Adapter-S with Mask R-CNN",
        _paper(384, 6, 0.2),
        paper=("48.5 box AP, 42.8 mask AP", "48.2 box AP, 42.5 mask AP"),
        sparse_name="coco_svit_adapter_s",
    ),
    **_svit("coco_dinov2_s", "ViT-Adapter with Mask R-CNN on DINOv2-S", _dino(DINOV2_S)),
    **_svit("coco_dinov2_b", "ViT-Adapter with Mask R-CNN on DINOv2-B", _dino(DINOV2_B)),
    **_svit("coco_dinov3_s", "ViT-Adapter with Mask R-CNN on DINOv3-S", _dino(DINOV3_S)),
    **_svit("coco_dinov3_b", "ViT-Adapter with Mask R-CNN on DINOv3-B", _dino(DINOV3_B)),
    **_svit("boxes_dinov2_s", "detector of your own boxes on DINOv2-S", MY_DETECTOR),
}
