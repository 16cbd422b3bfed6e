"""What the papers' segmenters share: a ViT-B or ViT-L with three heads, and how it is trained.

The dense model is trained for 160k iterations from an ImageNet ViT (`--train.vit-from`, a state dict in timm's naming:
AugReg's at 384 pixels, with the papers); its auxiliary heads are trained with it. DToP then takes it in one of three
ways, for any pair of recipes X and X_dtop:

- Finetune, the default of X_dtop: from runs/X, for the shorter schedule that its recipe has.
- Direct, without any training: `sievit eval runs/X --thresholds 0.9`, or 0.95 for a ViT-L, with the data's options.
- Retrain: `sievit train X_dtop --train.init-from None --train.vit-from FILE --train.steps 160000`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from sievit.data.presets import LabelPreset
from sievit.data.semantic import SemanticAugmentConfig
from sievit.engine.recipe import LabelsData, Recipe, TrainConfig
from sievit.heads import ATMConfig, SemanticHeadConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig
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


@dataclass(frozen=True)
class Backbone:
    """A ViT, the blocks that heads stand behind, and `mean` and `std` of the pixels its weights were trained on."""

    vit: ViTConfig
    out_indices: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _vit(embed_dim: int, depth: int, num_heads: int, drop_path_rate: float) -> ViTConfig:
    return ViTConfig(
        embed_dim=embed_dim, depth=depth, num_heads=num_heads, drop_path_rate=drop_path_rate, pos_antialias=False
    )


VIT_S = Backbone(_vit(384, 12, 6, 0.1), (5, 7, 11), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
VIT_B = Backbone(_vit(768, 12, 12, 0.1), (5, 7, 11), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VIT_L = Backbone(_vit(1024, 24, 16, 0.3), (7, 15, 23), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def segmenter(
    backbone: Backbone,
    head: SemanticHeadConfig,
    *,
    crop: int,
    stride: int,
    short_edge: int,
    long_edge: int,
    classes: tuple[str, ...],
    palette: tuple[tuple[int, int, int], ...] = (),
    aux_weight: float = 1.0,
) -> SegmenterConfig:
    """The dense model.

    Args:
        crop: edge in pixels of the training images, and of the window of inference, which goes on by `stride`; whole
            patches. Positions are stored for it.
        short_edge, long_edge: of test images, which are fitted into them.
    """
    patch = backbone.vit.patch_size
    return SegmenterConfig(
        vit=replace(backbone.vit, grid=(crop // patch, crop // patch)),
        policy=KeepAllConfig(),
        head=head,
        out_indices=backbone.out_indices,
        aux_weight=aux_weight,
        crop=(crop, crop),
        stride=(stride, stride),
        input=InputConfig(
            mean=backbone.mean,
            std=backbone.std,
            min_size=short_edge,
            max_size=long_edge,
            size_divisor=patch,
            antialias=False,
        ),
        classes=classes,
        palette=palette,
    )


def atm(channels: int, num_heads: int) -> ATMConfig:
    """SegViT's head."""
    return ATMConfig(channels=channels, num_heads=num_heads)


def labels_data(preset: LabelPreset, folder: Path, augment: SemanticAugmentConfig) -> LabelsData:
    """A data set of the papers in `folder`, below the folder of data sets."""
    train, val = preset.train, preset.val
    return LabelsData(
        train_images=folder / train.images,
        train_labels=folder / train.labels,
        train_names=None if train.names is None else folder / train.names,
        val_images=folder / val.images,
        val_labels=folder / val.labels,
        val_names=None if val.names is None else folder / val.names,
        image_suffix=preset.image_suffix,
        label_suffix=preset.label_suffix,
        zero_is_ignored=preset.zero_is_ignored,
        values=preset.values,
        augment=augment,
    )


def dtop(dense: Recipe, name: str, *, thresholds: tuple[float, ...], steps: int) -> Recipe:
    """DToP from the run of the dense recipe called `name`."""
    return replace(
        dense,
        model=replace(dense.model, policy=DToPConfig(thresholds=thresholds)),
        train=replace(dense.train, init_from=Path("runs") / name, vit_from=None, steps=steps),
    )
