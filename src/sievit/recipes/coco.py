"""The papers' detectors on COCO 2017 (`<data-root>/coco`: train2017, val2017, annotations).

Dense ViT-Adapter + Mask R-CNN for 36 epochs (ViT-Adapter, arXiv 2205.08534) from an ImageNet ViT (--train.vit-from, a
DeiT state dict), then SViT's sparse fine-tuning from it.
"""

from dataclasses import replace
from pathlib import Path

from sievit.data.transforms import AugmentConfig
from sievit.engine.recipe import CocoData, Recipe, TrainConfig
from sievit.heads.config import MaskRCNNConfig
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import KeepAllConfig, SViTConfig
from sievit.recipes.coco_classes import CATEGORY_IDS, CLASSES
from sievit.vit import ViTConfig

DATA = CocoData(
    train_images=Path("coco/train2017"),
    train_annotations=Path("coco/annotations/instances_train2017.json"),
    val_images=Path("coco/val2017"),
    val_annotations=Path("coco/annotations/instances_val2017.json"),
    augment=replace(AugmentConfig.paper(), crop=(1024, 1024)),
    skip_empty=True,
    invalid="skip",  # train2017 holds a box without area
)

DENSE = TrainConfig(
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

SPARSE_LR, SPARSE_DECAY = 1e-5, 1e-6


def _model(embed_dim: int, num_heads: int, drop_path_rate: float) -> DetectorConfig:
    return DetectorConfig(
        vit=ViTConfig(embed_dim=embed_dim, num_heads=num_heads, drop_path_rate=drop_path_rate, pos_antialias=False),
        neck=AdapterConfig(conv_inplane=64, deform_num_heads=6, drop_path_rate=drop_path_rate),
        policy=KeepAllConfig(),
        head=MaskRCNNConfig(num_classes=len(CLASSES)),
        input=InputConfig(min_size=800, max_size=1333, antialias=False),
        classes=CLASSES,
        category_ids=CATEGORY_IDS,
    )


def coco_vit_adapter_t() -> Recipe:
    """Dense ViT-Adapter-T with Mask R-CNN (45.8 box AP, 40.9 mask AP in the paper)."""
    return Recipe(model=_model(192, 3, 0.1), data=DATA, train=DENSE)


def coco_vit_adapter_s() -> Recipe:
    """Dense ViT-Adapter-S with Mask R-CNN (48.5 box AP, 42.8 mask AP in the paper)."""
    return Recipe(model=_model(384, 6, 0.2), data=DATA, train=DENSE)


def coco_svit_adapter_t() -> Recipe:
    """SViT-Adapter-T, six epochs from the dense one (45.5 box AP, 40.7 mask AP in the paper)."""
    return sparse(coco_vit_adapter_t(), Path("runs/coco_vit_adapter_t"), epochs=6, step_epochs=(4,))


def coco_svit_adapter_s() -> Recipe:
    """SViT-Adapter-S, four epochs from the dense one (48.2 box AP, 42.5 mask AP in the paper)."""
    return sparse(coco_vit_adapter_s(), Path("runs/coco_vit_adapter_s"), epochs=4, step_epochs=(3,))


def sparse(dense: Recipe, start: Path, *, epochs: int, step_epochs: tuple[int, ...]) -> Recipe:
    """SViT's sparse fine-tuning from the run `start` of the dense recipe."""
    model = replace(dense.model, policy=SViTConfig())
    schedule = {"init_from": start, "vit_from": None, "epochs": epochs, "step_epochs": step_epochs}
    train = replace(dense.train, lr=SPARSE_LR, weight_decay=SPARSE_DECAY, **schedule)
    return replace(dense, model=model, train=train)
