"""The small detector that trains from scratch on a CPU: 5.4 million weights, 10.8 MB as float16."""

from sievit.heads.config import MaskRCNNConfig
from sievit.model import InputConfig, ModelConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import KeepAllConfig
from sievit.vit import ViTConfig


def small_model(
    *, classes: tuple[str, ...], test_size: tuple[int, int], anchors: tuple[float, ...], max_detections: int
) -> ModelConfig:
    """A ViT of width 128 and depth 12 with a narrow adapter and Mask R-CNN.

    Args:
        test_size: short edge of test images in pixels, and limit of the long one.
        anchors: size of the anchors per level, in pixels.
        max_detections: per image.
    """
    return ModelConfig(
        vit=ViTConfig(grid=(20, 20), embed_dim=128, num_heads=4),
        neck=AdapterConfig(conv_inplane=32, deform_num_heads=4, deform_ratio=0.5),
        policy=KeepAllConfig(),
        head=MaskRCNNConfig(
            num_classes=len(classes),
            fpn_channels=96,
            box_fc=256,
            mask_convs=(96, 96, 96, 96),
            mask_deconv=96,
            anchor_sizes=tuple((size,) for size in anchors),
            roi_sampling_ratio=2,
            rpn_pre_nms_train=1000,
            rpn_pre_nms_test=500,
            rpn_post_nms_train=500,
            rpn_post_nms_test=300,
            box_batch_size=96,
            box_max_detections=max_detections,
        ),
        input=InputConfig(min_size=test_size[0], max_size=test_size[1]),
        classes=classes,
        category_ids=tuple(range(1, len(classes) + 1)),
    )
