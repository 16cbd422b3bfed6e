"""Segmenters: SegViT and SETR on a ViT with three heads, dense and with DToP's early exits.

The dense model is trained from an ImageNet ViT (`--train.vit-from`, a state dict in timm's naming: AugReg's at 384
pixels, with the papers), its auxiliary heads with it; on DINOv2 and DINOv3 timm downloads the weights. DToP then takes
it in one of three ways, for any pair of recipes X and X_dtop:

- Finetune, the default of X_dtop: from runs/X, for the shorter schedule that its recipe has.
- Direct, without training: `sievit eval runs/X --policy dtop --set thresholds=0.9` and the data's options; 0.95 for a
  ViT-L.
- Retrain: `sievit train X_dtop --train.init-from None --train.vit-from FILE --train.steps 160000`.

The data sets lie below `<data-root>` as `data.presets` states; COCO-Stuff's labels are from 1 to 171 in files called
`*_labelTrainIds.png`. The recipes folders_* take images and label images of your own: `--data.train-images`,
`--data.train-labels`, `--data.val-images`, `--data.val-labels`, how many classes there are (`--num-classes`, or
`--palette` with their colours and names) and the label of "unknown" (`--ignore-index`, 255), for the sparse model too.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sievit.data.presets import preset
from sievit.data.semantic import SemanticAugmentConfig
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.heads import ATMConfig, SemanticHeadConfig, SETRNaiveConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig
from sievit.recipes.common import DINOV2_B, DINOV2_S, DINOV3_B, VIT_B, VIT_L, VIT_S, Listed, pair, weights
from sievit.tasks.segmentation import LabelsData
from sievit.vit import ViTConfig

TRAIN = TrainConfig(
    steps=160_000,
    batch_size=16,
    lr=2e-5,
    head_lr=10.0,
    weight_decay=0.01,
    decay_norms=True,
    warmup_steps=1500,
    warmup_start=1e-6,
    schedule="poly",
    workers=4,
)
DINO_TRAIN = replace(
    TRAIN, lr=6e-5, head_lr=3.0, weight_decay=0.05, decay_norms=False, layer_decay=0.8, precision="bf16-mixed"
)

IMAGENET = InputConfig()
HALVES = InputConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""Of the pixels that AugReg's ViT-S and ViT-L were trained on."""


def _segmenter(
    vit: ViTConfig,
    head: SemanticHeadConfig,
    pixels: InputConfig,
    *,
    crop: int,
    stride: int,
    edges: tuple[int, int] | None = None,
    aux_weight: float = 1.0,
) -> SegmenterConfig:
    """The dense model, for two classes.

    Args:
        crop: edge in pixels of the training images, and of the window of inference, which goes on by `stride`; whole
            patches. Positions are stored for it.
        edges: short and long one of test images, which are fitted into them; by default `crop` and four times as much.
    """
    patch = vit.patch_size
    short, long = edges or (crop, 4 * crop)
    return SegmenterConfig(
        vit=replace(vit, grid=(crop // patch, crop // patch)),
        policy=KeepAllConfig(),
        head=head,
        out_indices=(7, 15, 23) if vit.depth == 24 else (5, 7, 11),
        aux_weight=aux_weight,
        crop=(crop, crop),
        stride=(stride, stride),
        input=replace(pixels, min_size=short, max_size=long, size_divisor=patch, antialias=False),
        classes=("class 0", "class 1"),
    )


def _atm(channels: int, num_heads: int) -> ATMConfig:
    return ATMConfig(channels=channels, num_heads=num_heads)


def _augment(model: SegmenterConfig) -> SemanticAugmentConfig:
    assert model.crop is not None and model.input.min_size is not None
    return SemanticAugmentConfig.paper(model.crop[0], base=(model.input.min_size, model.input.max_size))


def _on_preset(name: str, folder: str, model: SegmenterConfig, train: TrainConfig = TRAIN, **changes: Any) -> Recipe:
    """`model` for the classes of a data set of the papers, in `<data-root>/folder`; `changes` of `train`."""
    data = preset(name)
    files: dict[str, Any] = data.files(Path(folder))
    labels = LabelsData(
        **files,
        image_suffix=data.image_suffix,
        label_suffix=data.label_suffix,
        zero_is_ignored=data.zero_is_ignored,
        values=data.values,
        augment=_augment(model),
    )
    model = replace(model, classes=data.classes, palette=data.palette)
    return Recipe(model=model, data=labels, train=replace(train, **changes))


def _ade20k(model: SegmenterConfig, train: TrainConfig = TRAIN) -> Recipe:
    return _on_preset("ade20k", "ade20k", model, train, val_every=3)  # every 3789 iterations


def _ade20k_dino(vit: ViTConfig, *, crop: int, stride: int) -> Recipe:
    model = _segmenter(replace(vit, drop_path_rate=0.1), _atm(384, 6), IMAGENET, crop=crop, stride=stride)
    return _ade20k(model, replace(DINO_TRAIN, vit_from=weights(vit)))


def _folders(model: SegmenterConfig, train: TrainConfig) -> Recipe:
    data = LabelsData(
        root=Path(),
        train_images=Path("images/train"),
        train_labels=Path("labels/train"),
        val_images=Path("images/val"),
        val_labels=Path("labels/val"),
        augment=_augment(model),
    )
    return Recipe(model=model, data=data, train=replace(train, steps=40_000))


def _dtop(
    name: str, what: str, dense: Recipe, *thresholds: float, steps: int = 40_000, **listed: Any
) -> dict[str, Listed]:
    return pair(name, what, dense, DToPConfig(thresholds=thresholds), steps=steps, **listed)


DINOV2_FOLDERS = _segmenter(replace(DINOV2_S, drop_path_rate=0.1), _atm(192, 3), IMAGENET, crop=518, stride=345)

RECIPES = {
    **_dtop(
        "ade20k_segvit_b",
        "SegViT-B on ADE20K",
        _ade20k(_segmenter(VIT_B, _atm(384, 6), IMAGENET, crop=512, stride=341)),
        0.9,
        paper=("49.6 mIoU at 109.9 GFLOPs", "49.8 mIoU at 86.8 GFLOPs"),
    ),
    **_dtop(
        "ade20k_segvit_l",
        "SegViT-L on ADE20K",
        _ade20k(_segmenter(VIT_L, _atm(512, 8), HALVES, crop=640, stride=320)),
        *(0.95, 0.95, 0.95),
        paper=("53.3 mIoU at 617.0 GFLOPs", "52.8 mIoU at 412.8 GFLOPs"),
    ),
    **_dtop(
        "ade20k_setr_b",
        "SETR-B with naive heads on ADE20K",
        _ade20k(_segmenter(VIT_B, SETRNaiveConfig(), IMAGENET, crop=512, stride=341, aux_weight=0.4)),
        0.98,
        paper=("47.0 mIoU at 107.7 GFLOPs", "47.0 mIoU at 80.6 GFLOPs"),
    ),
    **_dtop(
        "pascal_context_segvit_l",
        "SegViT-L on Pascal Context's 59 classes",
        _on_preset(
            "pascal_context59",
            "pascal_context",
            _segmenter(VIT_L, _atm(512, 16), HALVES, crop=480, stride=320, edges=(520, 2048)),
            val_every=13,  # 4056 iterations
        ),
        *(0.95, 0.95, 0.95),
        paper=("63.0 mIoU at 315.4 GFLOPs", "62.7 mIoU at 224.3 GFLOPs"),
    ),
    **_dtop(
        "coco_stuff10k_segvit_l",
        "SegViT-L on COCO-Stuff-10K",
        _on_preset(
            "coco_stuff10k",
            "coco_stuff10k",
            _segmenter(VIT_L, _atm(512, 16), HALVES, crop=512, stride=341),
            val_every=7,  # 3934 iterations
        ),
        0.95,
        steps=20_000,
        paper=("47.4 mIoU at 366.9 GFLOPs", "47.1 mIoU at 276.2 GFLOPs"),
    ),
    **_dtop(
        "folders_segvit_s",
        "SegViT-S on your own images and labels",
        _folders(_segmenter(VIT_S, _atm(192, 3), HALVES, crop=512, stride=341), TRAIN),
        0.95,
        steps=10_000,
    ),
    **_dtop("ade20k_dinov2_b", "SegViT heads on DINOv2-B, ADE20K", _ade20k_dino(DINOV2_B, crop=518, stride=345), 0.9),
    **_dtop("ade20k_dinov3_b", "SegViT heads on DINOv3-B, ADE20K", _ade20k_dino(DINOV3_B, crop=512, stride=341), 0.9),
    **_dtop(
        "folders_dinov2_s",
        "SegViT heads on DINOv2-S for your own images and labels",
        _folders(DINOV2_FOLDERS, replace(DINO_TRAIN, vit_from=weights(DINOV2_S))),
        0.95,
        steps=10_000,
    ),
}
