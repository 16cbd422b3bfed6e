"""Deformable attention against transformers'; backbones give an image the same features alone and in any batch."""

import math

import pytest
import torch
from torch import Tensor, nn

from sievit.models.backbone import Backbone, build_backbone
from sievit.necks import NeckConfig
from sievit.necks.adapter import AdapterConfig
from sievit.necks.deform_attn import DeformAttn, deform_sample, reference_points
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import SViTConfig
from sievit.vit import ViTConfig
from tiny import refused

SHAPES = [(6, 4), (3, 2), (1, 5)]
VIT = ViTConfig(grid=(4, 4), embed_dim=32, depth=4, num_heads=2)
ADAPTER = AdapterConfig(conv_inplane=8, deform_num_heads=2, num_interactions=2)


def test_sampling_equals_transformers_with_its_gradients() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    b, q, h, d = 2, 7, 3, 5
    values = torch.randn(b, sum(r * c for r, c in SHAPES), h, d, requires_grad=True)
    places = (torch.randn(b, q, h, len(SHAPES), 4, 2) * 4).requires_grad_()  # many lie outside
    weights = torch.rand(b, q, h, len(SHAPES), 4, requires_grad=True)
    theirs = (torch.tensor(SHAPES), SHAPES, torch.zeros(0), (places + 0.5) / torch.tensor(SHAPES).flip(1)[:, None])
    results = []
    for out in (
        deform_sample(values, SHAPES, places, weights),
        MultiScaleDeformableAttention()(values, *theirs, weights, 64),
    ):
        gradients = torch.autograd.grad(out.square().sum(), (values, places, weights))
        results.append((out, *gradients))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


def test_sampling_at_borders_and_places_that_are_no_numbers() -> None:
    shapes = [(2, 3), (1, 1)]
    values = torch.arange(1.0, 8).view(1, 7, 1, 1)
    xs = [0.0, -1.0, -0.5, 3.0, 2.5, 2.0, 1e9, -math.inf, math.nan]
    places = torch.zeros(1, len(xs), 1, 2, 1, 2)
    places[0, :, 0, 0, 0, 0] = torch.tensor(xs)
    weights = torch.ones(1, len(xs), 1, 2, 1)
    expected = [1.0, 0.0, 0.5, 0.0, 1.5, 3.0, 0.0, 0.0, math.nan]  # of the first row 1, 2, 3
    out = deform_sample(values, shapes, places, weights)[0, :, 0] - 7  # the second level's only cell
    torch.testing.assert_close(out, torch.tensor(expected), equal_nan=True)


def test_without_offsets_a_query_reads_its_own_place() -> None:
    attention = DeformAttn(dim=8, num_heads=2, num_levels=1, num_points=1)
    with torch.no_grad():
        attention.sampling_offsets.bias.zero_()
        attention.value_proj.weight.copy_(torch.eye(8))
        attention.output_proj.weight.copy_(torch.eye(8))
    features = torch.randn(1, 6, 8)
    points = reference_points([(2, 3)], features.device)
    torch.testing.assert_close(attention(features, points, features, [(2, 3)]), features, atol=1e-5, rtol=1e-5)


def randomised(neck: NeckConfig) -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone(neck, VIT, SViTConfig(first_block=1, targets=(0.6,)))
    for name, parameter in backbone.named_parameters():
        if parameter.ndim <= 1:
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"), std=0.2)
    return backbone.eval()


@pytest.mark.parametrize("neck", [ADAPTER, PyramidConfig(out_channels=16)], ids=["adapter", "pyramid"])
@torch.inference_mode()
def test_alone_equals_in_a_padded_batch(neck: NeckConfig) -> None:
    backbone = randomised(neck)
    sizes = [(64, 96), (40, 90), (64, 33)]
    pictures = [torch.randn(3, h, w) for h, w in sizes]

    def padded(picture: Tensor, height: int, width: int) -> Tensor:
        return nn.functional.pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1]))

    together, trace = backbone(torch.stack([padded(p, 64, 96) for p in pictures]), sizes)
    for i, (picture, (h, w)) in enumerate(zip(pictures, sizes, strict=True)):
        own = [-(-side // 32) * 32 for side in (h, w)]
        alone, own_trace = backbone(padded(picture, *own)[None], [(h, w)])
        assert torch.equal(trace.counts()[:, i], own_trace.counts()[:, 0])
        for level, (name, feature) in enumerate(alone.items()):
            rows, columns = (-(-side // (4 * 2**level)) for side in (h, w))
            inside = together[name][i, :, :rows, :columns]
            if isinstance(neck, AdapterConfig):
                torch.testing.assert_close(inside, feature[0, :, :rows, :columns], atol=1e-4, rtol=1e-4)
    assert not (torch.stack(trace.keep) & ~trace.valid).any()


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        randomised(ADAPTER)(torch.zeros(1, 3, 48, 64))
    with pytest.raises(ValueError, match="3 interactions"):
        build_backbone(AdapterConfig(num_interactions=3), VIT, SViTConfig(targets=(0.5,)))
    refused("neck", build_backbone, NeckConfig(), VIT, SViTConfig(targets=(0.5,)))
