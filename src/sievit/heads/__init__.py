"""Heads turn features into answers; importing this package registers the semantic ones."""

from sievit.heads.atm import ATM, ATMConfig
from sievit.heads.config import MaskRCNNConfig
from sievit.heads.mask_rcnn import MaskRCNN
from sievit.heads.semantic import SemanticHead, SemanticHeadConfig, build_head, semantic_heads
from sievit.heads.setr import MLP, SETRPUP, LinearConfig, MLPConfig, SETRNaive, SETRNaiveConfig, SETRPUPConfig
