"""Images of odd sizes: every one is counted as it is computed, and none of them ends a run."""

from collections import defaultdict
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sievit.heads import ATMConfig, SETRNaiveConfig, SETRPUPConfig
from sievit.models.build import build
from sievit.models.detector import Detector
from sievit.models.inputs import InputConfig, Size, padded_size
from sievit.models.segmenter import Segmenter
from sievit.necks.adapter import AdapterConfig
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import KeepAllConfig, SViTConfig
from tiny import random_images, tiny_detector, tiny_head, tiny_segmenter, tiny_vit

NECKS = {
    "pyramid": PyramidConfig(out_channels=8),
    "adapter": AdapterConfig(conv_inplane=4, deform_num_heads=2, num_interactions=2),
}
HEADS = {
    "atm": ATMConfig(channels=8, num_heads=2, num_layers=2),
    "setr_naive": SETRNaiveConfig(channels=8),
    "setr_pup": SETRPUPConfig(channels=8, num_convs=2),
}
SLENDER = [(3, 2000), (2000, 3), (17, 900), (1, 1), (31, 33), (32, 96), (96, 160)]


def odd_sizes(count: int) -> list[Size]:
    """The same ones in every run, most of them multiples of nothing."""
    rng = np.random.default_rng(count)
    return [(int(h), int(w)) for h, w in rng.integers(1, 150, (count, 2))]


def detector(neck: str, **changes: Any) -> Detector:
    head = tiny_head(box={"max_detections": 5})
    model = build(tiny_detector(neck=NECKS[neck], head=head, input=InputConfig(min_size=None), **changes))
    assert isinstance(model, Detector)
    return model.eval().requires_grad_(False)


def counts_as_computed(model: Detector, size: Size) -> None:
    """The count of one image is what torch's counter sees in its pass, part by part."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        answer = model(random_images(size))
    seen = defaultdict(float)
    for name, operators in counter.get_flop_counts().items():
        seen[name.removeprefix("Detector.")] = sum(operators.values()) / 2
    parts = {name: gflops.item() * 1e9 for name, gflops in model.count(answer).items()}
    backbone = parts["patch_embed"] + parts["blocks"] + parts["policy"] + parts["neck"]
    sampling = model.backbone.sampling_macs(padded_size(size, model.config.input.size_divisor))
    assert backbone - sampling == pytest.approx(seen["backbone"]), size
    assert parts["fpn"] == pytest.approx(seen["head.fpn"]), size
    assert parts["rpn"] == pytest.approx(seen["head.rpn.head"]), size
    heads = {
        name: seen[f"head.roi_heads.{name}_head"] + seen[f"head.roi_heads.{name}_predictor"] for name in ("box", "mask")
    }
    assert parts["mask"] == pytest.approx(heads["mask"]), size
    assert 0 < heads["box"] <= parts["box"] * 1.001, "counted at the limit of proposals"


@pytest.mark.parametrize("size", SLENDER)
@pytest.mark.parametrize("neck", NECKS)
def test_a_slender_image_is_counted_as_it_is_computed(neck: str, size: Size):
    counts_as_computed(detector(neck), size)


@pytest.mark.parametrize("padding", ["hidden", "seen"])
@pytest.mark.parametrize("neck", NECKS)
def test_a_detector_counts_what_it_computes_for_every_size(neck: str, padding: str):
    """Gates are left out where padding is hidden: they look at it, and are counted on the image alone."""
    policy = SViTConfig(first_block=1, targets=(0.5,)) if padding == "seen" else KeepAllConfig()
    model = detector(neck, padding=padding, policy=policy)
    for size in odd_sizes(4):
        counts_as_computed(model, size)


def test_a_detector_counts_what_it_computes_with_patches_of_14_pixels():
    model = detector("pyramid", vit=tiny_vit(patch_size=14, token_stride=16))
    for size in odd_sizes(3):
        counts_as_computed(model, size)


@pytest.mark.parametrize("padding", ["hidden", "seen"])
def test_a_dense_count_by_size_alone_is_that_of_a_pass(padding: str):
    model = detector("pyramid", padding=padding, policy=SViTConfig(first_block=1, targets=(0.5,), threshold=-100.0))
    for size in [(100, 90), (17, 200), (5, 40)]:
        with torch.no_grad():
            computed, by_size = model.count(model(random_images(size))), model.count(model.dense_answer(size))
        for name in computed.keys() - {"mask"}:
            assert by_size[name].item() == pytest.approx(computed[name].item()), (size, name)


def test_a_detector_counts_the_padding_that_it_is_configured_to_have():
    config = tiny_detector(neck=NECKS["pyramid"], input=InputConfig(min_size=None, size_divisor=96))
    model = build(config).eval().requires_grad_(False)
    assert isinstance(model, Detector)
    counts_as_computed(model, (100, 90))


def resizing(*_: object, out_shape: tuple[int, ...], **__: object) -> int:
    return 2 * 4 * prod(out_shape)


@pytest.mark.parametrize("windows", [{}, {"crop": (48, 48), "stride": (32, 40)}])
@pytest.mark.parametrize("head", HEADS)
def test_a_segmenter_counts_what_it_computes_for_every_size(head: str, windows: dict[str, Any]):
    config = tiny_segmenter(head=HEADS[head], input=InputConfig(min_size=None, size_divisor=8), **windows)
    model = build(config).eval().requires_grad_(False)
    assert isinstance(model, Segmenter)
    for size in [(3, 200), (200, 3), (1, 1), *odd_sizes(4)]:
        mapping = {torch.ops.aten.upsample_bilinear2d: resizing}
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            answer = model(random_images(size))
        assert model.gflops(answer).item() * 1e9 == pytest.approx(counter.get_total_flops() / 2), size
