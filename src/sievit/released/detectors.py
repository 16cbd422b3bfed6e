"""The released SViT-Adapter and ViT-Adapter detectors."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from sievit.config import ConfigError, Count
from sievit.convert import adapter_backbone, mmdet_heads
from sievit.convert.mmdet_heads import HEAD_PREFIXES
from sievit.convert.pth import Checkpoint
from sievit.data.coco_json import CocoFile
from sievit.heads.config import MaskRCNNConfig
from sievit.hub.file import listed
from sievit.models.detector import Detector, DetectorConfig
from sievit.necks.adapter import ViTAdapter
from sievit.policies import SViTConfig
from sievit.recipes import recipe
from sievit.recipes.detectors import CATEGORY_IDS, CLASSES
from sievit.released.common import Converted, ReleasedOptions, class_names, described, lines

RECIPES = {192: "coco_{}_adapter_t", 384: "coco_{}_adapter_s"}
"""By width of the ViT; the braces are `svit` or `vit`."""


def release_limits(head: MaskRCNNConfig) -> MaskRCNNConfig:
    """mmdet drops proposals without any area, and detections for no size at all."""
    return replace(head, rpn=replace(head.rpn, min_size=1e-6), box=replace(head.box, min_size=0.0))


@dataclass(frozen=True, kw_only=True)
class ViTAdapterOptions(ReleasedOptions):
    """What the file of a detector does not hold.

    Attributes:
        classes: file with the names of the classes, one a line, in the order of training; not needed for COCO's 80.
        annotations: COCO annotation file that the model was trained on, for the names and ids of the classes.
        num_heads: of the ViT's attention; default one for every 64 channels.
        deform_num_heads: of the adapter's deformable attention; default as many as have four points each.
    """

    family = "vit_adapter"
    classes: Path | None = None
    annotations: Path | None = None
    num_heads: Count | None = None
    deform_num_heads: Count | None = None


@dataclass(frozen=True, kw_only=True)
class SViTOptions(ViTAdapterOptions):
    """What the file of a sparse detector does not hold.

    Attributes:
        sample: gates draw at inference, as the released test scripts do, instead of taking the arg-max.
    """

    family = "svit"
    sample: bool = False


def assemble(
    checkpoint: Checkpoint, options: ViTAdapterOptions, *, constants: MaskRCNNConfig | None = None
) -> Converted:
    """The detector in a checkpoint; `constants` of Mask R-CNN, None: the release's."""
    state = checkpoint.state
    _refuse(checkpoint)
    levels = state.get("backbone.level_embed")
    width = 0 if levels is None or not levels.ndim else levels.shape[-1]
    base = cast(DetectorConfig, recipe(RECIPES.get(width, RECIPES[384]).format("svit")).model)
    backbone = adapter_backbone(
        state,
        num_heads=options.num_heads,
        deform_num_heads=options.deform_num_heads,
        sample=isinstance(options, SViTOptions) and options.sample,
        drop_path_rate=base.vit.drop_path_rate if width in RECIPES else 0.0,
    )
    head = mmdet_heads(state, constants=release_limits(base.head) if constants is None else constants)
    count = head.config.num_classes
    classes, ids = class_names(
        count,
        checkpoint.classes,
        (CLASSES, CATEGORY_IDS) if count == len(CLASSES) else None,
        {"--classes": (options.classes, lines), "--annotations": (options.annotations, _categories)},
        way_out=f"not COCO's {len(CLASSES)}; name them with --annotations FILE (the COCO file of the training) or "
        "--classes FILE (a name a line, in the order of training)",
    )
    config = replace(
        base,
        vit=backbone.vit.config,
        policy=backbone.policy.config,
        neck=backbone.config,
        head=head.config,
        classes=classes,
        category_ids=ids or tuple(range(1, count + 1)),
        padding="seen",
    )
    model = Detector(config, backbone=backbone, head=head).eval()
    return Converted(model=model, facts=_facts(model), keys=len(state), dropped={})


def _refuse(checkpoint: Checkpoint) -> None:
    """Raise if the checkpoint holds what none of the released detectors has."""
    unknown = sorted(key for key in checkpoint.state if not key.startswith(("backbone.", *HEAD_PREFIXES)))
    if unknown:
        raise ConfigError(f"has {listed(unknown)}, which no released detector has")
    if re.search(r"window_attn\s*=\s*\[[^\]]*True", checkpoint.config):
        raise ConfigError("was trained with attention inside windows (window_attn), which sievit does not have")


def _facts(model: Detector) -> dict[str, str]:
    """Facts to print, by heading."""
    config, backbone = model.config, model.backbone
    assert isinstance(backbone, ViTAdapter)
    sparse = isinstance(config.policy, SViTConfig)
    policy = "keep_all: every token is computed"
    if isinstance(config.policy, SViTConfig):
        policy = f"svit, gates {'drawn as the released test scripts do' if config.policy.sample else 'by arg-max'}"
    facts = {
        "model": f"{'SViT' if sparse else 'dense ViT'}-Adapter with Mask R-CNN",
        "backbone": f"{described(backbone.vit)}; {backbone.config.deform_num_heads} heads of deformable attention",
        "classes": f"{len(config.classes)} ({config.classes[0]}, ..., {config.classes[-1]})",
        "policy": policy,
        "unused": "the first row of backbone.pos_embed, a class token's",
    }
    if config.vit.embed_dim in RECIPES:
        name = RECIPES[config.vit.embed_dim].format("svit" if sparse else "vit")
        as_it_is = f"--model.vit.norm-eps {config.vit.norm_eps} --model.padding seen"
        facts["to train on"] = f"sievit train {name} --train.init-from FILE {as_it_is}"
    return facts


def _categories(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """In the order of the file, which is that of mmdet's outputs; evaluation needs rising ids."""
    categories = CocoFile(path).categories()
    names, ids = tuple(c["name"] for c in categories), tuple(c["id"] for c in categories)
    if list(ids) != sorted(set(ids)):
        raise ConfigError(
            f"{path}: the ids of its categories do not rise; mmdet counts classes in the order of the file, sievit by "
            "id: renumber the categories"
        )
    return names, ids
