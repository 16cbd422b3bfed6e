"""Backbones: a plain ViT with a neck that turns its tokens into maps at strides 4, 8, 16 and 32."""

from dataclasses import dataclass

from sievit.config import Config


@dataclass(frozen=True)
class NeckConfig(Config):
    """Base of every neck's configuration."""
