"""Weights of other projects, through key tables in which every key is used or dropped on purpose."""

from sievit.convert.dtop import segvit_segmenter
from sievit.convert.mmdet_heads import mmdet_heads
from sievit.convert.pth import read_checkpoint
from sievit.convert.svit import adapter_backbone
from sievit.convert.timm import from_timm, timm_config
from sievit.convert.transformers import from_transformers
