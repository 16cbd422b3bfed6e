"""What a segmenter costs: the formulas count what torch's own counter counts in the real pass, head by head."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sievit.heads import ATMConfig, MLPConfig, SemanticHeadConfig, SETRNaiveConfig, SETRPUPConfig, semantic_heads
from sievit.measure.published import published_macs
from sievit.models.build import build
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmentation, Segmenter, SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig, PolicyConfig, SViTConfig
from sievit.tokens import Trace
from sievit.vit import ViTConfig

SMALL: dict[str, SemanticHeadConfig] = {
    "atm": ATMConfig(channels=16, num_heads=2, num_layers=2),
    "mlp": MLPConfig(hidden_dim=24),
    "setr_naive": SETRNaiveConfig(channels=16),
    "setr_pup": SETRPUPConfig(channels=16, num_convs=2),
}
HEADS = {name: SMALL.get(name, config()) if name in SMALL else config() for name, config in semantic_heads().items()}
POLICIES: dict[str, PolicyConfig] = {
    "dense": KeepAllConfig(),
    "svit": SViTConfig(first_block=1, targets=(0.5,)),
    "nobody leaves": DToPConfig(thresholds=(0.5,), keep_per_class=24),
    "dtop": DToPConfig(thresholds=(0.0,), keep_per_class=3),
    "second stage": DToPConfig(thresholds=(1.0, 0.0), keep_per_class=2),
    "everyone leaves": DToPConfig(thresholds=(0.0,), keep_per_class=0),
    "preserve": DToPConfig(thresholds=(0.0,), keep_per_class=3, preserve=True),
    "rejoin": DToPConfig(thresholds=(0.0,), keep_per_class=3, rejoin=True),
    "both": DToPConfig(thresholds=(0.0,), keep_per_class=3, preserve=True, rejoin=True),
}


def config(named: str, policy: str, /, **changes: Any) -> SegmenterConfig:
    return replace(
        SegmenterConfig(
            vit=ViTConfig(grid=(4, 4), embed_dim=32, depth=5, num_heads=2),
            policy=POLICIES[policy],
            input=InputConfig(min_size=None),
            classes=("a", "b", "c", "d", "e", "f", "g"),
            head=HEADS[named],
            out_indices=(1, 2, 4),
        ),
        **changes,
    )


def make(head: str, policy: str, **changes: Any) -> Segmenter:
    """A model whose heads are sure of themselves, one way or the other."""
    model = build(config(head, policy, **changes)).eval().requires_grad_(False)
    assert isinstance(model, Segmenter)
    with torch.no_grad():
        for module in model.net.heads.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                torch.nn.init.normal_(module.weight, std=0.5)
    return model


def of_trace(config: SegmenterConfig, trace: Trace) -> Tensor:
    """(r,) GFLOPs by the published rule."""
    return published_macs(config.vit, config.head, len(config.classes), config.out_indices, trace) / 1e9


def dense_gflops(config: SegmenterConfig, size: tuple[int, int]) -> float:
    """By the published rule, of an image in which no token is left out."""
    with torch.device("meta"):
        model = build(config)
    published = model.published_gflops(model.dense_answer(size))
    assert published is not None
    return published.item()


def counted(model: Segmenter, images: list[Tensor]) -> tuple[Segmentation, float]:
    """A pass, and the multiply-adds that torch saw in it: products, and four per value of bilinear resizing."""

    def resizing(*_: object, out_shape: tuple[int, ...], **__: object) -> int:
        return 2 * 4 * prod(out_shape)

    mapping = {torch.ops.aten.upsample_bilinear2d: resizing}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        output = model(images)
    return output, counter.get_total_flops() / 2


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("head", HEADS)
def test_an_image_costs_what_torchs_counter_counts(head: str, policy: str):
    model = make(head, policy)
    output, macs = counted(model, [torch.rand(3, 64, 96)])
    assert model.gflops(output).item() * 1e9 == pytest.approx(macs)
    if policy in ("dtop", "second stage", "preserve"):
        left = output.trace.exited[-2].sum().item()
        assert 0 < left < 24, "the case is one where some leave"


@pytest.mark.parametrize("policy", ["dense", "dtop", "preserve", "everyone leaves"])
@pytest.mark.parametrize("head", HEADS)
def test_an_image_costs_the_same_alone_and_in_a_batch(head: str, policy: str):
    model = make(head, policy)
    images = [torch.rand(3, 64, 96), torch.rand(3, 48, 64), torch.rand(3, 64, 96)]
    with torch.no_grad():
        together = model.gflops(model(images))
        alone = torch.cat([model.gflops(model([image])) for image in images])
    torch.testing.assert_close(together, alone)
    assert together[1] < together[0]


@pytest.mark.parametrize("policy", ["dense", "dtop", "preserve"])
@pytest.mark.parametrize("head", HEADS)
def test_all_windows_of_an_image_are_counted(head: str, policy: str):
    model = make(head, policy, crop=(48, 48), stride=(32, 40), windows_at_once=3)
    images = [torch.rand(3, 48, 48), torch.rand(3, 70, 100), torch.rand(3, 40, 90)]
    together = model.gflops(model(images))
    for image, cost in zip(images, together, strict=True):
        output, macs = counted(model, [image])
        assert model.gflops(output).item() == pytest.approx(cost.item())
        if len({tuple(window[2:]) for window in output.windows}) == len(output.windows) == 1 or policy == "dense":
            assert cost.item() * 1e9 == pytest.approx(macs)


def test_resizing_to_the_pixels_of_the_given_image_counts():
    model = make("linear", "dense", input=InputConfig(min_size=32, max_size=64, antialias=True))
    same, given = torch.rand(3, 32, 48), torch.rand(3, 64, 96)
    costs = model.gflops(model([same, given])) * 1e9
    assert (costs[1] - costs[0]).item() == pytest.approx(4 * 7 * 64 * 96)
    _, macs = counted(model, [given])
    assert costs[1].item() == pytest.approx(macs), "the image was resized by another operator"


def test_parts_of_a_segmenter():
    model = make("atm", "dtop")
    with torch.no_grad():
        output = model([torch.rand(3, 64, 96), torch.rand(3, 64, 64)])
    parts = model.count(output)
    assert list(parts) == ["patch_embed", "blocks", "policy", "heads.0", "heads.1", "heads.2", "upsampling"]
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), model.gflops(output))
    assert (parts["patch_embed"] * 1e9).tolist() == [24 * 768 * 32, 16 * 768 * 32]
    assert (parts["upsampling"] * 1e9).tolist() == [4 * 7 * 64 * 96, 4 * 7 * 64 * 64]
    assert (parts["heads.0"] > parts["heads.1"]).all(), "some have left, no head runs for nothing"
    assert (parts["heads.1"] >= parts["heads.2"]).all()
    dense = make("atm", "dense")
    with torch.no_grad():
        of_dense = dense.count(dense([torch.rand(3, 64, 96)]))
    assert of_dense["heads.0"].item() == of_dense["heads.1"].item() == of_dense["policy"].item() == 0
    assert of_dense["heads.2"].item() > 0
    gates = make("atm", "svit")
    with torch.no_grad():
        assert gates.count(gates([torch.rand(3, 64, 96)]))["policy"].item() > 0


VIT_B = ViTConfig(grid=(32, 32), embed_dim=768, depth=12, num_heads=12)
VIT_L = ViTConfig(grid=(32, 32), embed_dim=1024, depth=24, num_heads=16)


@pytest.mark.parametrize(
    ("vit", "head", "classes", "side", "published"),
    [
        (VIT_B, ATMConfig(), 150, 512, 109.860705024),
        (VIT_L, ATMConfig(channels=512, num_heads=8), 150, 640, 616.977024),
        (VIT_L, ATMConfig(channels=512, num_heads=16), 59, 480, 315.35631104),
        (VIT_L, ATMConfig(channels=512, num_heads=16), 171, 512, 366.857516544),
    ],
)
def test_the_published_dense_figures(vit: ViTConfig, head: ATMConfig, classes: int, side: int, published: float):
    names = tuple(map(str, range(classes)))
    places = (vit.depth // 2 - 1, vit.depth - 1)
    chosen = config("atm", "dense", vit=vit, head=head, classes=names, out_indices=places)
    assert dense_gflops(chosen, (side, side)) == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_the_published_rule_adds_norms_and_a_second_resizing(head: str):
    """To what is computed: five per value of a layer norm, two of a batch norm. ATM's maps come with its attention."""
    model = make(head, "dense")
    with torch.no_grad():
        output = model([torch.rand(3, 64, 96)])
    extra = 5 * 24 * 32 * 2 * 5 + 4 * 7 * 64 * 96
    of_head = {
        "atm": 5 * 24 * 16 + 2 * 15 * 7 * 16 - 7 * 24 * 16,
        "linear": 5 * 24 * 32,
        "mlp": 0,
        "setr_naive": 5 * 24 * 32 + 2 * 24 * 16,
        "setr_pup": 5 * 24 * 32 + 2 * 24 * 16 * 5,
    }[head]
    published = dense_gflops(model.config, (64, 96))
    assert published * 1e9 == pytest.approx(model.gflops(output).item() * 1e9 + extra + of_head)
    assert model.published_gflops(output).item() == pytest.approx(published)
    assert of_trace(model.config, output.trace).item() == pytest.approx(published)


def test_the_published_rule_counts_auxiliary_heads_where_a_token_left_early():
    model = make("atm", "nobody leaves")
    with torch.no_grad():
        trace = model([torch.rand(3, 64, 96), torch.rand(3, 64, 64), torch.rand(3, 64, 96)]).trace
    assert not trace.exited[-1].any()
    dense = torch.tensor([dense_gflops(model.config, (64, side)) for side in (96, 64, 96)], dtype=torch.float64)
    torch.testing.assert_close(of_trace(model.config, trace), dense)

    def left(stages: tuple[int, ...]) -> Trace:
        """The same, as if a token of the first image had left at these stages, and cost as much afterwards."""
        marks = iter(
            torch.stack([torch.full((24,), stage in stages), *torch.zeros(2, 24).bool()]) for stage in range(3)
        )
        return replace(trace, aux=tuple({**a, "exited": next(marks)} if "exited" in a else a for a in trace.aux))

    torch.testing.assert_close(of_trace(model.config, left((2,))), dense)
    t, c, d, k = 24, 32, 16, 7
    layer = 14 * k * d**2 + 2 * k**2 * d + 15 * k * d + 2 * t * d**2 + 2 * k * t * d
    head = t * c * d + 5 * t * d + 2 * layer + 2 * k * d
    for stages in ((0, 1, 2), (1, 2)):
        more = (of_trace(model.config, left(stages)) - dense) * 1e9
        assert more.tolist() == pytest.approx([2 * head, 0, 0], abs=1e-3), "both heads, whichever let it go"


def test_windows_are_summed_by_the_published_rule_too():
    model = make("atm", "dense", crop=(48, 48), stride=(48, 48))
    with torch.no_grad():
        output = model([torch.rand(3, 48, 96), torch.rand(3, 48, 48)])
    window = dense_gflops(model.config, (48, 48))
    assert model.published_gflops(output).tolist() == pytest.approx([2 * window, window])
