"""sievit makes plain vision transformers faster on dense prediction by not computing the tokens an image does not need.

>>> import sievit
>>> model = sievit.load("model.safetensors")
>>> detections = model.predict(["image.jpg"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sievit import convert
    from sievit.config import ConfigError
    from sievit.convert import from_timm, from_transformers
    from sievit.heads.config import MaskRCNNConfig
    from sievit.hub import Card
    from sievit.memory import keep_memory
    from sievit.models.build import build, load, save
    from sievit.models.detector import Detector, DetectorConfig, Output
    from sievit.models.features import Features, SievedViT, sieve
    from sievit.models.inputs import InputConfig, ModelConfig
    from sievit.models.segmenter import Segmentation, Segmenter, SegmenterConfig
    from sievit.policies import policy_config
    from sievit.policies.reuse import ReuseConfig
    from sievit.tokens import Tokens, Trace
    from sievit.vit import ViT, ViTConfig

__version__ = "0.1.0"

_HOMES = {
    "Card": "sievit.hub",
    "ConfigError": "sievit.config",
    "Detector": "sievit.models.detector",
    "DetectorConfig": "sievit.models.detector",
    "Features": "sievit.models.features",
    "InputConfig": "sievit.models.inputs",
    "MaskRCNNConfig": "sievit.heads.config",
    "ModelConfig": "sievit.models.inputs",
    "Output": "sievit.models.detector",
    "ReuseConfig": "sievit.policies.reuse",
    "Segmentation": "sievit.models.segmenter",
    "Segmenter": "sievit.models.segmenter",
    "SegmenterConfig": "sievit.models.segmenter",
    "SievedViT": "sievit.models.features",
    "Tokens": "sievit.tokens",
    "Trace": "sievit.tokens",
    "ViT": "sievit.vit",
    "ViTConfig": "sievit.vit",
    "build": "sievit.models.build",
    "from_timm": "sievit.convert",
    "from_transformers": "sievit.convert",
    "keep_memory": "sievit.memory",
    "load": "sievit.models.build",
    "policy_config": "sievit.policies",
    "save": "sievit.models.build",
    "sieve": "sievit.models.features",
}


__all__ = ["__version__", "convert", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import sievit` alone does not import torch (PEP 562)."""
    if name == "convert":
        return import_module("sievit.convert")
    if name not in _HOMES:
        raise AttributeError(f"module 'sievit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
