"""Backbones: a plain ViT with a neck that turns its tokens into maps at strides 4, 8, 16 and 32."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NeckConfig:
    """Base of every neck's configuration."""
