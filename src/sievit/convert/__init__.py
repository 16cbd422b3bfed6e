"""Weights of other projects, through key tables in which every key is used or dropped on purpose."""

from sievit.convert.dtop import dtop_segmenter
from sievit.convert.svit import svit_backbone
from sievit.convert.timm import timm_vit

__all__ = ["dtop_segmenter", "svit_backbone", "timm_vit"]
