"""Heads turn features into answers; importing this package registers the semantic ones."""

from sievit.heads.atm import ATM, ATMConfig
from sievit.heads.config import MaskRCNNConfig, torchvision_config
from sievit.heads.mask_rcnn import MaskRCNN
from sievit.heads.semantic import SemanticHead, SemanticHeadConfig, build_head, semantic_heads
from sievit.heads.setr import MLP, SETRPUP, Linear, LinearConfig, MLPConfig, SETRNaive, SETRNaiveConfig, SETRPUPConfig

__all__ = [
    "ATM",
    "MLP",
    "SETRPUP",
    "ATMConfig",
    "Linear",
    "LinearConfig",
    "MLPConfig",
    "MaskRCNN",
    "MaskRCNNConfig",
    "SETRNaive",
    "SETRNaiveConfig",
    "SETRPUPConfig",
    "SemanticHead",
    "SemanticHeadConfig",
    "build_head",
    "semantic_heads",
    "torchvision_config",
]
