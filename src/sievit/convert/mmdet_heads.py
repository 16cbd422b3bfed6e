"""The heads of mmdet's Mask R-CNN (2.x): neck, rpn_head and roi_head of the released SViT and ViT-Adapter detectors.

mmdet counts the background last and gives it neither boxes nor masks; torchvision counts it first and has unused
outputs for it. Box offsets are (dx, dy, dw, dh) per class in both, anchors are ordered alike.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sievit.config import ConfigError
from sievit.convert.keys import Rules, load_strictly, need, rename
from sievit.heads.mask_rcnn import MaskRCNN, MaskRCNNConfig

HEAD_PREFIXES = ("neck.", "rpn_head.", "roi_head.")

RULES: Rules = (
    (r"neck\.lateral_convs\.(\d)\.conv\.(weight|bias)", r"fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(weight|bias)", r"fpn.layer_blocks.\1.0.\2"),
    (r"rpn_head\.rpn_conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(weight|bias)", r"rpn.head.cls_logits.\1"),
    (r"rpn_head\.rpn_reg\.(weight|bias)", r"rpn.head.bbox_pred.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.(weight|bias)", r"roi_heads.box_head.fc6.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.(weight|bias)", r"roi_heads.box_head.fc7.\1"),
    (r"roi_head\.bbox_head\.fc_cls\.(weight|bias)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(weight|bias)", r"roi_heads.box_predictor.bbox_pred.\1"),
    (r"roi_head\.mask_head\.convs\.(\d+)\.conv\.(weight|bias)", r"roi_heads.mask_head.\1.0.\2"),
    (r"roi_head\.mask_head\.upsample\.(weight|bias)", r"roi_heads.mask_predictor.conv5_mask.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(weight|bias)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
)

BACKGROUND_LAST = ("roi_heads.box_predictor.cls_score.",)
NO_BACKGROUND = {"roi_heads.box_predictor.bbox_pred.": 4, "roi_heads.mask_predictor.mask_fcn_logits.": 1}
"""Outputs per class of the layers that mmdet builds without a background."""


def mmdet_heads(state_dict: dict[str, Tensor], *, constants: MaskRCNNConfig | None = None) -> MaskRCNN:
    """The head that an mmdet Mask R-CNN's state dict describes; widths and classes are read from the shapes.

    Args:
        state_dict: keys under `neck.`, `rpn_head.` and `roi_head.`; others, such as a backbone's, are left out.
        constants: everything that does not follow from a shape (anchors, thresholds, limits); None: the SViT release's.

    Returns:
        The head in evaluation mode; label i + 1 is mmdet's class i.

    Raises:
        ConfigError: keys are missing, unknown, or of a shape that does not fit the others.
    """
    source = "an mmdet Mask R-CNN head"
    state = rename({k: v.float() for k, v in state_dict.items() if k.startswith(HEAD_PREFIXES)}, RULES, source=source)
    lateral = need(state, "fpn.inner_blocks.0.0.weight", source=source, ndim=4)
    scores = need(state, "roi_heads.box_predictor.cls_score.weight", source=source, ndim=2)
    masks = [k for k in state if k.startswith("roi_heads.mask_head.") and k.endswith("weight")]
    num_classes = scores.shape[0] - 1
    base = MaskRCNNConfig(num_classes=num_classes) if constants is None else constants
    config = replace(
        base,
        num_classes=num_classes,
        with_masks=bool(masks),
        fpn_channels=lateral.shape[0],
        box=replace(base.box, fc=scores.shape[1]),
    )
    if masks:
        convs = tuple(need(state, key, source=source, ndim=4).shape[0] for key in sorted(masks))
        deconv = need(state, "roi_heads.mask_predictor.conv5_mask.weight", source=source, ndim=4)
        config = replace(config, mask=replace(base.mask, convs=convs, deconv=deconv.shape[1]))
    head = MaskRCNN(config, in_channels=lateral.shape[1])
    load_strictly(head, background_first(state, num_classes), source=source)
    return head.eval()


def background_first(state: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """Our names with mmdet's outputs to outputs that have the background at 0; outputs it lacks are zero.

    Raises:
        ConfigError: the number of outputs does not fit the classes, such as class-agnostic boxes.
    """
    moved = dict(state)
    for key, value in state.items():
        if not value.ndim:
            raise ConfigError(f"{key}: a number where a tensor is expected")
        if key.startswith(BACKGROUND_LAST):
            moved[key] = value.roll(1, dims=0)
        for prefix, outputs in NO_BACKGROUND.items():
            if not key.startswith(prefix):
                continue
            if value.shape[0] != num_classes * outputs:
                raise ConfigError(f"{key}: {value.shape[0]} outputs where {num_classes} classes need {outputs} each")
            moved[key] = torch.cat([torch.zeros_like(value[:outputs]), value])
    return moved
