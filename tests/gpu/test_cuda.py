"""What only a GPU can show: variable-length attention, and the same answers as on the CPU."""

from collections.abc import Iterator
from operator import attrgetter

import pytest
import torch

from sievit.models.backbone import build_backbone
from sievit.necks.adapter import AdapterConfig
from sievit.policies import SViTConfig
from sievit.vit import ViTConfig
from sievit.vit.packed import Packed, Packing

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # torch's, of kernels and their layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(5,), (64, 64), (3, 0, 70, 1)])
def test_varlen_attention_equals_one_image_at_a_time(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    part = torch.arange(max(lengths), device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
    packing = Packing.of(part)
    q, k, v = (torch.randn(sum(lengths), 3, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    results = []
    for backend in ("varlen", "per_image", "batched"):
        out = Packed(packing, backend).attend(q, k, v)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """By default those in float32 round to TF32."""
    conv = attrgetter("cudnn.conv")(torch.backends)
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    yield
    conv.fp32_precision = before


@pytest.mark.usefixtures("exact_convolutions")
@torch.inference_mode()
def test_a_backbone_gives_the_same_maps_as_on_the_cpu() -> None:
    vit = ViTConfig(grid=(4, 4), embed_dim=128, depth=4, num_heads=2)
    backbone = build_backbone(
        AdapterConfig(conv_inplane=16, deform_num_heads=4, num_interactions=2),
        vit,
        SViTConfig(first_block=1, targets=(0.5,)),
    ).eval()
    images = torch.randn(3, 3, 96, 64)
    expected, trace = backbone(images, [(96, 64), (70, 64), (96, 33)])
    got, own = backbone.cuda()(images.cuda(), [(96, 64), (70, 64), (96, 33)])
    assert all(torch.equal(a, b.cpu()) for a, b in zip(trace.keep, own.keep, strict=True))
    for name, feature in expected.items():
        torch.testing.assert_close(got[name].cpu(), feature, atol=1e-3, rtol=1e-3)


def test_training_steps_run_in_half_precision() -> None:
    vit = ViTConfig(grid=(4, 4), embed_dim=128, depth=4, num_heads=2)
    backbone = build_backbone(
        AdapterConfig(conv_inplane=16, deform_num_heads=4, num_interactions=2),
        vit,
        SViTConfig(first_block=1, targets=(0.5,)),
    ).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        features, trace = backbone(torch.randn(2, 3, 96, 64, device="cuda"))
    loss = sum(f.float().square().mean() for f in features.values()) + backbone.policy.loss(trace)["ratio"]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
