"""Tiny models and data for all tests. Every function takes the fields of the configuration that it returns."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sievit.data.scenes import CLASSES
from sievit.heads import ATMConfig, MaskRCNNConfig
from sievit.heads.config import BoxConfig, MaskConfig, RPNConfig
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import KeepAllConfig
from sievit.vit import ViTConfig


def tiny_vit(**changes: Any) -> ViTConfig:
    return replace(ViTConfig(grid=(4, 4), embed_dim=16, depth=4, num_heads=2), **changes)


def tiny_head(**changes: Any) -> MaskRCNNConfig:
    """Mask R-CNN of the classes of generated scenes, which finds at most five objects; a stage's changes are a dict."""
    head = MaskRCNNConfig(
        num_classes=len(CLASSES),
        fpn_channels=8,
        rpn=RPNConfig(post_nms_train=50, post_nms_test=20),
        box=BoxConfig(fc=16, batch_size=16, min_score=0.0, max_detections=5),
        mask=MaskConfig(convs=(8,), deconv=8),
    )
    staged = {k: replace(getattr(head, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    return replace(head, **staged)


def tiny_detector(**changes: Any) -> DetectorConfig:
    """With a head for `classes`; `category_ids` are counted from 1 unless they are given."""
    classes = changes.setdefault("classes", CLASSES)
    changes.setdefault("category_ids", tuple(range(1, len(classes) + 1)))
    changes["head"] = replace(changes.get("head", tiny_head()), num_classes=len(classes))
    fields: dict[str, Any] = {
        "vit": tiny_vit(),
        "policy": KeepAllConfig(),
        "neck": PyramidConfig(out_channels=8),
        "input": InputConfig(min_size=64, max_size=128),
    }
    return DetectorConfig(**{**fields, **changes})


def tiny_segmenter(**changes: Any) -> SegmenterConfig:
    fields: dict[str, Any] = {
        "vit": tiny_vit(patch_size=8),
        "policy": KeepAllConfig(),
        "head": ATMConfig(channels=8, num_heads=2, num_layers=2),
        "out_indices": (1, 2, 3),
        "input": InputConfig(min_size=None, max_size=128, size_divisor=8),
        "classes": ("ground", *CLASSES),
    }
    return SegmenterConfig(**{**fields, **changes})


def random_images(*sizes: tuple[int, int]) -> list[Tensor]:
    """(3, h, w) float in 0..1 for each (h, w)."""
    return [torch.rand(3, *size) for size in sizes]


def random_pixels(seed: int, *shape: int) -> np.ndarray:
    """uint8."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def image_folder(folder: Path, *sizes: tuple[int, int]) -> Path:
    """A folder of noise: 0.png, 1.png, ... of these (height, width)."""
    for i, size in enumerate(sizes):
        write_image(folder / f"{i}.png", random_pixels(i, *size, 3))
    return folder


def run_two_processes(file: str, folder: Path) -> None:
    """Run a test file as torchrun does, with `folder` as its only argument."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, file, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
