"""A plain vision transformer of timm's families, the executor of its blocks, and the one loop over them."""

from sievit.vit.block import Block
from sievit.vit.config import RopeConfig, ViTConfig
from sievit.vit.execution import Execution
from sievit.vit.model import Sizes, ViT

__all__ = ["Block", "Execution", "RopeConfig", "Sizes", "ViT", "ViTConfig"]
