"""Heads turn feature maps into answers."""

from sievit.heads.config import MaskRCNNConfig, torchvision_config
from sievit.heads.mask_rcnn import MaskRCNN

__all__ = ["MaskRCNN", "MaskRCNNConfig", "torchvision_config"]
