"""The formulas count what torch's own counter counts, and the trace decides what is counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sievit.heads.config import BoxConfig, MaskConfig, MaskRCNNConfig
from sievit.measure.flops import block_macs, blocks_gflops
from sievit.models.backbone import backbone_gflops
from sievit.models.build import build
from sievit.models.detector import Detector, DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import KeepAllConfig, SViTConfig, build_policy
from sievit.tokens import Trace
from sievit.vit import ViT, ViTConfig

VIT = ViTConfig(grid=(4, 4), embed_dim=32, depth=4, num_heads=2)


@pytest.fixture
def model() -> Detector:
    config = DetectorConfig(
        vit=VIT,
        neck=AdapterConfig(conv_inplane=8, deform_num_heads=2, num_interactions=2),
        policy=SViTConfig(first_block=1, targets=(0.5,)),
        head=MaskRCNNConfig(
            num_classes=2, fpn_channels=16, box=BoxConfig(fc=16), mask=MaskConfig(convs=(16,), deconv=16)
        ),
        input=InputConfig(min_size=None),
        classes=("a", "b"),
        category_ids=(1, 2),
    )
    return build(config).eval()


def test_blocks_by_formula_equal_torchs_counter() -> None:
    vit = ViT(VIT)
    dense = build_policy(KeepAllConfig(), embed_dim=32, depth=4)
    tokens = vit.embed(torch.randn(1, 3, 64, 96))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _, trace = vit.run_blocks(tokens, dense, Trace.start(tokens))
    assert blocks_gflops(VIT, trace).item() * 1e9 == pytest.approx(counter.get_total_flops() / 2)
    assert block_macs(VIT, torch.tensor(24)).item() == 4 * 24 * 32**2 + 2 * 24**2 * 32 + 2 * 24 * 32 * 128


@torch.inference_mode()
def test_gates_equal_torchs_counter(model: Detector) -> None:
    tokens = model.backbone.vit.embed(torch.randn(1, 3, 64, 96))
    trace = Trace.start(tokens)
    with FlopCounterMode(display=False) as counter:
        for index in range(4):
            chosen, aux = model.policy.before_block(index, tokens, trace)
            trace = trace.record(chosen, aux, [False, True])
    assert model.policy.macs(trace).item() == pytest.approx(counter.get_total_flops() / 2)


@torch.inference_mode()
def test_dense_backbone_equals_torchs_counter_plus_sampling(model: Detector) -> None:
    dense = build_policy(KeepAllConfig(), embed_dim=32, depth=4)
    with FlopCounterMode(display=False) as counter:
        _, trace = model.backbone(torch.randn(1, 3, 64, 96), policy=dense)
    cells = 4 * 24 + 24 + 6
    sampling = (2 * 24 * 3 + 4 * cells) * 32 * 4 * 5  # 2 injectors on 3 levels, 4 extractors; 4 points
    got = sum(gflops.item() for gflops in backbone_gflops(model.backbone, trace, [(64, 96)]).values()) * 1e9
    assert got == pytest.approx(counter.get_total_flops() / 2 + sampling)


@torch.inference_mode()
def test_each_image_is_counted_at_its_own_size_and_with_its_own_tokens(model: Detector) -> None:
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 64)]
    together = model.gflops(model(images))
    dense = model.gflops(model(images, policy=build_policy(KeepAllConfig(), embed_dim=32, depth=4)))
    assert together[0] > together[1]
    assert (together < dense).all()
    alone = model.gflops(model(images[1:]))
    per_detection = 14 * 14 * (16 * 16 * 9) + 28 * 28 * 16 * 2 + 14 * 14 * 4 * 16 * 16  # the mask branch
    assert abs(together[1] - alone[0]).item() * 1e9 <= 100 * per_detection


def test_counting_leaves_the_model_alone(model: Detector) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    with torch.no_grad():
        output = model([torch.rand(3, 64, 64)])
    model.gflops(output)
    assert model.training and all(module.training for module in model.modules())
    after = model.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert all("running" in name or "batches_tracked" in name for name in changed), "the pass itself, not the count"
