"""Detectors and segmenters on the self-supervised backbones DINOv2 (arXiv 2304.07193) and DINOv3 (arXiv 2508.10104).

Their weights come by timm's download when training starts, or from a file of the same weights:
`--train.vit-from vit_small_patch14_dinov2.pth`. Rates fall from block to block towards the embedding; `--train.freeze
vit` trains everything but the backbone, `--train.freeze 6` leaves its first six blocks as they are.

- coco_*: ViT-Adapter and Mask R-CNN as in `coco`. Patches of 14 pixels stand for 16 of the image, resized first.
- boxes_*: the same for boxes of your own in COCO's format; the classes are those of your file.
- ade20k_*, folders_*: SegViT's heads as in `ade20k` and `folders`, on crops of whole patches.

X_svit and X_dtop go on from the run of X. None of these schedules was run in full: they are those of the papers'
models, with the layer-wise decay of ViTDet (arXiv 2203.16527).
"""

from dataclasses import replace
from pathlib import Path

from sievit.data.semantic import SemanticAugmentConfig
from sievit.engine.recipe import CocoData, Recipe
from sievit.heads.config import MaskRCNNConfig
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import KeepAllConfig
from sievit.recipes import ade20k, coco, folders
from sievit.recipes.coco_classes import CATEGORY_IDS, CLASSES
from sievit.recipes.segvit import TRAIN, Backbone, atm, dtop, segmenter
from sievit.vit import RopeConfig, ViTConfig

DINOV2_S = ViTConfig(
    grid=(37, 37), patch_size=14, embed_dim=384, depth=12, num_heads=6, class_token=True, layer_scale="both"
)
DINOV2_B = replace(DINOV2_S, embed_dim=768, num_heads=12)
DINOV3_S = ViTConfig(
    grid=(16, 16),
    patch_size=16,
    embed_dim=384,
    depth=12,
    num_heads=6,
    qkv_bias=False,
    class_token=True,
    num_registers=4,
    pos_embed="none",
    rope=RopeConfig(kind="centred", temperature=100.0),
    layer_scale="both",
    norm_eps=1e-5,
)
DINOV3_B = replace(DINOV3_S, embed_dim=768, num_heads=12)

NAMES = {
    DINOV2_S: "vit_small_patch14_dinov2.lvd142m",
    DINOV2_B: "vit_base_patch14_dinov2.lvd142m",
    DINOV3_S: "vit_small_patch16_dinov3.lvd1689m",
    DINOV3_B: "vit_base_patch16_dinov3.lvd1689m",
}
"""What timm calls the weights."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYER_DECAY = 0.8

DETECTOR_TRAIN = replace(coco.DENSE, layer_decay=LAYER_DECAY, precision="bf16-mixed")
SEGMENTER_TRAIN = replace(
    TRAIN, lr=6e-5, head_lr=3.0, weight_decay=0.05, decay_norms=False, layer_decay=LAYER_DECAY, precision="bf16-mixed"
)


def _weights(vit: ViTConfig) -> Path:
    return Path(f"timm:{NAMES[vit]}")


def _detector(
    vit: ViTConfig, *, classes: tuple[str, ...], category_ids: tuple[int, ...], with_masks: bool = True
) -> DetectorConfig:
    """ViT-Adapter-S or -B (arXiv 2205.08534) and Mask R-CNN."""
    small = vit.embed_dim == 384
    drop_path_rate = 0.2 if small else 0.3
    return DetectorConfig(
        vit=replace(vit, token_stride=16, drop_path_rate=drop_path_rate),
        neck=AdapterConfig(
            deform_num_heads=6 if small else 12, deform_ratio=1.0 if small else 0.5, drop_path_rate=drop_path_rate
        ),
        policy=KeepAllConfig(),
        head=MaskRCNNConfig(num_classes=len(classes), with_masks=with_masks),
        input=InputConfig(mean=MEAN, std=STD, min_size=800, max_size=1333),
        classes=classes,
        category_ids=category_ids,
    )


def _coco(vit: ViTConfig) -> Recipe:
    return Recipe(
        model=_detector(vit, classes=CLASSES, category_ids=CATEGORY_IDS),
        data=coco.DATA,
        train=replace(DETECTOR_TRAIN, vit_from=_weights(vit)),
    )


def _coco_svit(dense: Recipe, name: str) -> Recipe:
    return coco.sparse(dense, Path("runs") / name, epochs=4, step_epochs=(3,))


def coco_dinov2_s() -> Recipe:
    """Dense ViT-Adapter with Mask R-CNN on DINOv2-S."""
    return _coco(DINOV2_S)


def coco_dinov2_s_svit() -> Recipe:
    """SViT, four epochs from the dense detector on DINOv2-S."""
    return _coco_svit(coco_dinov2_s(), "coco_dinov2_s")


def coco_dinov2_b() -> Recipe:
    """Dense ViT-Adapter with Mask R-CNN on DINOv2-B."""
    return _coco(DINOV2_B)


def coco_dinov2_b_svit() -> Recipe:
    """SViT, four epochs from the dense detector on DINOv2-B."""
    return _coco_svit(coco_dinov2_b(), "coco_dinov2_b")


def coco_dinov3_s() -> Recipe:
    """Dense ViT-Adapter with Mask R-CNN on DINOv3-S."""
    return _coco(DINOV3_S)


def coco_dinov3_s_svit() -> Recipe:
    """SViT, four epochs from the dense detector on DINOv3-S."""
    return _coco_svit(coco_dinov3_s(), "coco_dinov3_s")


def coco_dinov3_b() -> Recipe:
    """Dense ViT-Adapter with Mask R-CNN on DINOv3-B."""
    return _coco(DINOV3_B)


def coco_dinov3_b_svit() -> Recipe:
    """SViT, four epochs from the dense detector on DINOv3-B."""
    return _coco_svit(coco_dinov3_b(), "coco_dinov3_b")


def boxes_dinov2_s() -> Recipe:
    """Dense detector on DINOv2-S of your own boxes in COCO's format.

    Say where they are: `--data.train-images`, `--data.train-annotations`, `--data.val-images`,
    `--data.val-annotations`. Where the files hold masks too, `--model.head.with-masks True` learns them.
    """
    return Recipe(
        model=_detector(DINOV2_S, classes=("object",), category_ids=(1,), with_masks=False),
        data=CocoData(
            root=Path(),
            train_images=Path("images/train"),
            train_annotations=Path("annotations/train.json"),
            val_images=Path("images/val"),
            val_annotations=Path("annotations/val.json"),
            augment=coco.DATA.augment,
            own_classes=True,
        ),
        train=replace(DETECTOR_TRAIN, vit_from=_weights(DINOV2_S), epochs=24, step_epochs=(16, 22), batch_size=8),
    )


def boxes_dinov2_s_svit() -> Recipe:
    """SViT, four epochs from the dense detector of your own boxes; it needs the same options."""
    return coco.sparse(boxes_dinov2_s(), Path("runs/boxes_dinov2_s"), epochs=4, step_epochs=(3,))


def _backbone(vit: ViTConfig) -> Backbone:
    return Backbone(replace(vit, drop_path_rate=0.1), (5, 7, 11), MEAN, STD)


def _ade20k(vit: ViTConfig, *, crop: int, stride: int) -> Recipe:
    train = replace(SEGMENTER_TRAIN, vit_from=_weights(vit))
    return ade20k.dense(_backbone(vit), atm(384, 6), crop=crop, stride=stride, train=train)


def ade20k_dinov2_b() -> Recipe:
    """Dense SegViT heads on DINOv2-B, ADE20K, crops of 518 pixels."""
    return _ade20k(DINOV2_B, crop=518, stride=345)


def ade20k_dinov2_b_dtop() -> Recipe:
    """DToP, 40k iterations from the dense segmenter on DINOv2-B."""
    return dtop(ade20k_dinov2_b(), "ade20k_dinov2_b", thresholds=(0.9,), steps=40_000)


def ade20k_dinov3_b() -> Recipe:
    """Dense SegViT heads on DINOv3-B, ADE20K, crops of 512 pixels."""
    return _ade20k(DINOV3_B, crop=512, stride=341)


def ade20k_dinov3_b_dtop() -> Recipe:
    """DToP, 40k iterations from the dense segmenter on DINOv3-B."""
    return dtop(ade20k_dinov3_b(), "ade20k_dinov3_b", thresholds=(0.9,), steps=40_000)


def folders_dinov2_s() -> Recipe:
    """Dense SegViT heads on DINOv2-S for your own images and labels."""
    own = folders.folders_segvit_s()
    model = segmenter(
        _backbone(DINOV2_S),
        atm(192, 3),
        crop=518,
        stride=345,
        short_edge=518,
        long_edge=2072,
        classes=own.model.classes,
    )
    data = replace(own.data, augment=SemanticAugmentConfig.paper(518))
    return Recipe(model=model, data=data, train=replace(SEGMENTER_TRAIN, vit_from=_weights(DINOV2_S), steps=40_000))


def folders_dinov2_s_dtop() -> Recipe:
    """DToP, 10k iterations from the dense segmenter on DINOv2-S; it needs the same options."""
    return dtop(folders_dinov2_s(), "folders_dinov2_s", thresholds=(0.95,), steps=10_000)
