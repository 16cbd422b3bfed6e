"""The papers' released checkpoints as whole models: the tables of `convert`, and what the recipes state of the rest.

A file holds weights. Anchors, limits, classes, sizes of test images and thresholds are those of the recipe of the same
model; what no recipe knows has to be given.
"""

from sievit.released.common import Converted
from sievit.released.detectors import DetectorOptions, convert_detector
from sievit.released.segmenters import SegmenterOptions, convert_segmenter

__all__ = ["Converted", "DetectorOptions", "SegmenterOptions", "convert_detector", "convert_segmenter"]
