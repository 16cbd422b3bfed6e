"""What only a GPU can show: variable-length attention, the same answers as on the CPU, graphs, and waiting."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import pytest
import torch
from rich.console import Console

from sievit.bench import BlocksBench, bench_blocks
from sievit.bench.common import load_images, normalised
from sievit.bench.network import timed_blocks
from sievit.bench.random_models import SIZES, random_vit
from sievit.bench.timing import Timed, many_shapes
from sievit.measure.meters import counted_syncs, memory
from sievit.measure.modes import DENSE, MODES, RunMode
from sievit.models.backbone import Backbone, build_backbone
from sievit.models.build import build
from sievit.necks.adapter import AdapterConfig
from sievit.policies import KeepAllConfig, Policy, PolicyOptions, SViTConfig
from sievit.vit import Execution, ViTConfig
from sievit.vit.packed import Packed, Packing
from tiny import tiny_segmenter

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


def gated_backbone() -> Backbone:
    neck = AdapterConfig(conv_inplane=16, deform_num_heads=4, num_interactions=2)
    vit = ViTConfig(grid=(4, 4), embed_dim=128, depth=4, num_heads=2)
    return build_backbone(neck, vit, SViTConfig(first_block=1, targets=(0.5,)))


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
    backbone = gated_backbone().eval()
    images = torch.randn(3, 3, 96, 64)
    expected, trace = backbone(images, [(96, 64), (70, 64), (96, 33)])
    got, own = backbone.cuda()(images.cuda(), [(96, 64), (70, 64), (96, 33)])
    assert all(torch.equal(a, b.cpu()) for a, b in zip(trace.keep, own.keep, strict=True))
    for name, feature in expected.items():
        torch.testing.assert_close(got[name].cpu(), feature, atol=1e-3, rtol=1e-3)


def test_training_steps_run_in_half_precision() -> None:
    backbone = gated_backbone().cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        features, trace = backbone(torch.randn(2, 3, 96, 64, device="cuda"))
    loss = sum(f.float().square().mean() for f in features.values()) + backbone.policy.loss(trace)["ratio"]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize("mode", ["dense", "static", "bucketed"])
@torch.inference_mode()
def test_graphs_give_the_answers_of_the_model_as_it_stands(mode: str) -> None:
    """More windows than go through the network together, and several passes: some recorded, others replayed."""
    gates = SViTConfig(first_block=2, static_shares=(0.6, 0.4) if mode == "static" else None, targets=(0.5,))
    config = tiny_segmenter(
        vit=ViTConfig(grid=(8, 8), patch_size=8, embed_dim=64, depth=4, num_heads=2),
        policy=KeepAllConfig() if mode == "dense" else gates,
        out_indices=(3,),
        crop=(64, 64),
        stride=(64, 64),
        windows_at_once=2,
        execution=Execution(mode="bucketed" if mode == "bucketed" else "auto", compiled=True),
    )
    torch.manual_seed(0)
    model = build(config).eval().to("cuda")
    batches = [[torch.rand(3, 64, 128) for _ in range(2)] for _ in range(3)]
    answers = [model(batch) for batch in batches]
    for batch, answer in zip(batches, answers, strict=True):
        expected = model(batch, execution=Execution(mode=config.execution.mode))
        agree = [(a == b).double().mean().item() for a, b in zip(answer.labels, expected.labels, strict=True)]
        assert min(agree) > 0.99, agree
        torch.testing.assert_close(answer.trace.shares(), expected.trace.shares(), atol=0.05, rtol=0)


# Benches: the modes, how often the host waits, and memory.


TIMED = [name for name in MODES if name not in ("dynamic_compiled", "dynamic_graphs")]
"""Each number of tokens would be compiled by itself in the others."""
SMALL = ViTConfig(grid=(4, 4), embed_dim=128, depth=6, num_heads=2)


@pytest.fixture(scope="module")
def model() -> tuple[Timed, dict[str, Policy]]:
    """The blocks of a backbone in bfloat16, and its policies by `RunMode.counts`."""
    with torch.inference_mode():
        images = normalised(load_images(None, (256, 320), 4)).to("cuda", torch.bfloat16)
        timed = timed_blocks(*random_vit(SMALL, images, PolicyOptions(), (0.6, 0.4)), [images])
        static = timed.static_policy(8)
        assert static is not None
        return timed, {"dense": timed.build_policy(DENSE), "dynamic": timed.policy, "static": static}


@pytest.mark.parametrize("name", TIMED)
@torch.inference_mode()
def test_every_mode_gives_the_numbers_of_the_reference(name: str, model: Any) -> None:
    """The first pass, those that are replayed, and other images after them: in bfloat16 within 5e-2."""
    (timed, policies), mode = model, RunMode.of(name)
    policy, (x,) = policies[mode.counts], timed.inputs
    call, reference = timed.call(policy, mode), Execution(mode="padded" if mode.counts == "dynamic" else "auto")
    with many_shapes(mode):
        for given in (x, x, x, x.flip(0), x.flip(1)):
            expected, _ = timed.network(given, policy=policy, execution=reference)
            torch.testing.assert_close(call(given)[0].clone(), expected, atol=5e-2, rtol=5e-2)


@torch.inference_mode()
def test_static_counts_never_wait_and_dynamic_ones_once_a_choice(model: Any) -> None:
    timed, policies = model
    counts = {}
    for name in ("dense", "static", "bucketed", "dynamic"):
        call, (x,) = timed.call(policies[RunMode.of(name).counts], RunMode.of(name)), timed.inputs
        call(x)
        with counted_syncs(timed.device) as places:
            call(x)
        counts[name] = places.total(), dict(places)
    assert counts["dense"][0] == counts["static"][0] == 0, counts
    assert 0 < counts["bucketed"][0] <= 3, counts
    assert 0 < counts["dynamic"][0] <= 3, counts


@torch.inference_mode()
def test_memory_of_the_blocks_falls_with_the_tokens(model: Any) -> None:
    timed, policies = model
    held = [
        memory(
            lambda name=name: timed.call(policies[name], RunMode.of(name))(timed.inputs[0]), timed.device, timed.blocks
        )
        for name in ("dense", "dynamic")
    ]
    for i in (3, 4, 5):
        assert 0 < held[1].blocks[i] < held[0].blocks[i], held


def test_rows_of_every_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "small", SMALL)
    config = BlocksBench(
        models=("small",),
        sizes=((256, 320),),
        batches=(4,),
        repeats=3,
        device="cuda",
        precision="bfloat16",
        modes=tuple(TIMED),
        targets=(0.5,),
    )
    rows = bench_blocks(config, Console(quiet=True))["rows"]
    assert [row["mode"] for row in rows] == TIMED
    assert not [row["skipped"] for row in rows if "skipped" in row]
