"""What models cost: the formulas count what torch's own counter counts, the trace decides, and `sievit flops` says it.

That blocks and policies do is in contract/test_policies.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sievit.heads import ATMConfig, MLPConfig, SemanticHeadConfig, SETRNaiveConfig, SETRPUPConfig, semantic_heads
from sievit.measure.costs import costs, per_image
from sievit.measure.published import published_macs
from sievit.models.backbone import backbone_gflops
from sievit.models.build import build, load
from sievit.models.detector import Detector
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmentation, Segmenter, SegmenterConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import DToPConfig, KeepAllConfig, PolicyConfig, SViTConfig
from sievit.recipes import recipe
from sievit.tokens import Trace
from tiny import dense, image_folder, on_meta, random_images, saved, tiny_detector, tiny_head, tiny_segmenter, tiny_vit

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
    fields: dict[str, Any] = {"vit": tiny_vit(embed_dim=32, depth=5), "out_indices": (1, 2, 4), "classes": "abcdefg"}
    fields |= {"input": InputConfig(min_size=None), "policy": POLICIES[policy], "head": HEADS[named], **changes}
    return tiny_segmenter(**{**fields, "classes": tuple(fields["classes"])})


def make(head: str, policy: str, **changes: Any) -> Segmenter:
    """A model whose heads are sure of themselves, one way or the other."""
    model = build(config(head, policy, **changes)).eval().requires_grad_(False)
    assert isinstance(model, Segmenter)
    with torch.no_grad():
        for module in model.net.heads.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                torch.nn.init.normal_(module.weight, std=0.5)
    return model


def answered(model: Segmenter, *sizes: tuple[int, int]) -> Segmentation:
    """Of random images."""
    with torch.no_grad():
        return model(random_images(*sizes))


def of_trace(config: SegmenterConfig, trace: Trace) -> Tensor:
    """(r,) GFLOPs by the published rule."""
    return published_macs(config.vit, config.head, len(config.classes), config.out_indices, trace) / 1e9


def dense_gflops(config: SegmenterConfig, size: tuple[int, int]) -> float:
    """By the published rule, of an image in which no token is left out."""
    model = on_meta(config)
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
    images = random_images((64, 96), (48, 64), (64, 96))
    with torch.no_grad():
        together = model.gflops(model(images))
        alone = torch.cat([model.gflops(model([image])) for image in images])
    torch.testing.assert_close(together, alone)
    assert together[1] < together[0]


@pytest.mark.parametrize("policy", ["dense", "dtop", "preserve"])
@pytest.mark.parametrize("head", HEADS)
def test_all_windows_of_an_image_are_counted(head: str, policy: str):
    model = make(head, policy, crop=(48, 48), stride=(32, 40), windows_at_once=3)
    images = random_images((48, 48), (70, 100), (40, 90))
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
    output = answered(model, (64, 96), (64, 64))
    parts = model.count(output)
    assert list(parts) == ["patch_embed", "blocks", "policy", "heads.0", "heads.1", "heads.2", "upsampling"]
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), model.gflops(output))
    assert (parts["patch_embed"] * 1e9).tolist() == [24 * 768 * 32, 16 * 768 * 32]
    assert (parts["upsampling"] * 1e9).tolist() == [4 * 7 * 64 * 96, 4 * 7 * 64 * 64]
    assert (parts["heads.0"] > parts["heads.1"]).all(), "some have left, no head runs for nothing"
    assert (parts["heads.1"] >= parts["heads.2"]).all()
    dense = make("atm", "dense")
    of_dense = dense.count(answered(dense, (64, 96)))
    assert of_dense["heads.0"].item() == of_dense["heads.1"].item() == of_dense["policy"].item() == 0
    assert of_dense["heads.2"].item() > 0
    gates = make("atm", "svit")
    assert gates.count(answered(gates, (64, 96)))["policy"].item() > 0


@pytest.mark.parametrize("head", HEADS)
def test_the_published_rule_adds_norms_and_a_second_resizing(head: str):
    """To what is computed: five per value of a layer norm, two of a batch norm. ATM's maps come with its attention."""
    model = make(head, "dense")
    output = answered(model, (64, 96))
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
    trace = answered(model, (64, 96), (64, 64), (64, 96)).trace
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


@pytest.fixture
def detector() -> Detector:
    neck = AdapterConfig(conv_inplane=8, deform_num_heads=2, num_interactions=2)
    head = tiny_head(
        fpn_channels=16, mask={"convs": (16,), "deconv": 16}, box={"max_detections": 100, "min_score": 0.05}
    )
    policy = SViTConfig(first_block=1, targets=(0.5,))
    inputs = InputConfig(min_size=None)
    return build(tiny_detector(vit=tiny_vit(embed_dim=32), neck=neck, policy=policy, head=head, input=inputs)).eval()


@torch.inference_mode()
def test_dense_backbone_equals_torchs_counter_plus_sampling(detector: Detector) -> None:
    with FlopCounterMode(display=False) as counter:
        _, trace = detector.backbone(torch.randn(1, 3, 64, 96), policy=dense(detector.vit))
    cells = 4 * 24 + 24 + 6
    sampling = (2 * 24 * 3 + 4 * cells) * 32 * 4 * 5  # 2 injectors on 3 levels, 4 extractors; 4 points
    got = sum(gflops.item() for gflops in backbone_gflops(detector.backbone, trace, [(64, 96)]).values()) * 1e9
    assert got == pytest.approx(counter.get_total_flops() / 2 + sampling)


@torch.inference_mode()
def test_each_image_is_counted_at_its_own_size_and_with_its_own_tokens(detector: Detector) -> None:
    images = random_images((64, 96), (64, 64))
    together = detector.gflops(detector(images))
    everyone = detector.gflops(detector(images, policy=dense(detector.vit)))
    assert together[0] > together[1]
    assert (together < everyone).all()
    alone = detector.gflops(detector(images[1:]))
    per_detection = 14 * 14 * (16 * 16 * 9) + 28 * 28 * 16 * 2 + 14 * 14 * 4 * 16 * 16  # the mask branch
    assert abs(together[1] - alone[0]).item() * 1e9 <= 100 * per_detection


def test_counting_leaves_the_detector_alone(detector: Detector) -> None:
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.train()
    with torch.no_grad():
        output = detector([torch.rand(3, 64, 64)])
    detector.gflops(output)
    assert detector.training and all(module.training for module in detector.modules())
    after = detector.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert all("running" in name or "batches_tracked" in name for name in changed), "the pass itself, not the count"


# The command.


def small(policy: PolicyConfig, **changes: Any) -> SegmenterConfig:
    vit, sizes = tiny_vit(embed_dim=32, depth=3), InputConfig(min_size=None)
    return tiny_segmenter(
        vit=vit, policy=policy, input=sizes, classes=("a", "b", "c"), out_indices=(0, 1, 2), **changes
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images", (64, 64), (48, 64), (64, 96))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved(small(DToPConfig(thresholds=(0.0,), keep_per_class=2)), tmp_path / "model.safetensors")


@pytest.fixture
def flops(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command `sievit flops`."""
    return partial(command, "flops")


Flops = Callable[..., Any]


@pytest.mark.parametrize("name", ["ade20k_segvit_b", "ade20k_segvit_l_dtop"])
def test_a_recipe_on_the_command_line(name: str, flops: Flops):
    figures = flops(name).figures
    assert figures["gflops_full"] == pytest.approx(sum(figures["by_module"].values()))
    assert (figures["by_module"]["heads.0"] > 0) == name.endswith("_dtop"), (
        "DToP asks them whether anyone leaves or not"
    )
    assert figures["size"] == ([512, 512] if name.endswith("b") else [640, 640])
    assert flops(name, "--size", 256, 384).figures["size"] == [256, 384]


@pytest.mark.parametrize("name", ["nuclei_svit", "nuclei_vit"])
def test_a_detectors_recipe(name: str, flops: Flops):
    figures = flops(name, "--size", 64, 96).figures
    assert figures["gflops"] == figures["gflops_full"] == pytest.approx(sum(figures["by_module"].values()))
    assert list(figures["by_module"]) == ["patch_embed", "blocks", "policy", "neck", "fpn", "rpn", "box", "mask"]
    assert (figures["by_module"]["policy"] > 0) == name.endswith("svit")


def test_paper_and_pass_agree_where_nobody_leaves():
    image = torch.rand(3, 64, 96)
    for policy in (KeepAllConfig(), DToPConfig(thresholds=(0.5,), keep_per_class=24), DToPConfig(thresholds=(1.0,))):
        model = build(small(policy)).eval()
        with torch.no_grad():
            spent = model.gflops(model([image])).item()
        assert costs(model.config, size=(64, 96))["gflops_full"] == pytest.approx(spent, abs=1e-5)
    detector = build(recipe("nuclei_svit").model)
    trace = detector.dense_answer((70, 100)).trace
    assert trace.grid == (6, 8), "padded as the network pads"
    assert sum("logits" in aux for aux in trace.aux) == 9


def test_sizes_that_nobody_names():
    assert small(KeepAllConfig()).default_size == (64, 64)
    assert small(KeepAllConfig(), crop=(48, 80), stride=(48, 80)).default_size == (48, 80)
    assert recipe("coco_vit_adapter_t").model.default_size == (800, 1333)


def test_images_of_a_checkpoint(checkpoint: Path, folder: Path, flops: Flops):
    printed = flops(checkpoint, "--images", folder, "--batch-size", 2, "--device", "cpu")
    assert all(words in printed.out for words in ("█", "left at stage 0", "by the published rule")), "a histogram"
    said = printed.figures["per_image"]
    rows = said["images"]
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png"]
    values = [row["gflops"] for row in rows]
    assert said["min"] == min(values) and said["max"] == max(values)
    assert said["mean"] == pytest.approx(sum(values) / 3, abs=2e-6)
    assert said["quantiles"]["50"] == pytest.approx(sorted(values)[1], abs=2e-6)
    assert len(said["left_at"]) == 3 and len(said["keep"]) == 3
    assert said["left_at"][0] > 0.3, "of 12 to 24 tokens at most six stay"
    for row in rows:
        assert row["keep"][1] == pytest.approx(1 - row["left_at"][0], abs=2e-4)
        assert row["keep"][2] == pytest.approx(1 - sum(row["left_at"][:2]), abs=2e-4)
    alone = per_image(load(checkpoint), folder, limit=1)["images"][0]
    assert alone == rows[0], "whatever it shares a batch with"


def test_thresholds_take_the_place_of_the_models_own(checkpoint: Path, folder: Path, flops: Flops):
    options = ("--images", folder, "--device", "cpu", "--set", "thresholds=1.0")
    said = flops(checkpoint, *options).figures["per_image"]
    assert said["left_at"] == [0.0, 0.0, 0.0]
    model = load(checkpoint)
    dense = [costs(model.config, size=size)["gflops"] for size in ((64, 64), (48, 64), (64, 96))]
    assert [row["published"] for row in said["images"]] == pytest.approx(dense, abs=2e-6)


def test_windows_count_as_one_image_by_either_rule(folder: Path):
    model = build(small(KeepAllConfig(), crop=(32, 32), stride=(32, 32)))
    window = costs(model.config)["gflops_full"]
    assert [row["gflops"] for row in per_image(model, folder)["images"]] == pytest.approx(
        [4 * window, 4 * window, 6 * window], abs=4e-6
    )

    model = make("atm", "dense", crop=(48, 48), stride=(48, 48))
    output = answered(model, (48, 96), (48, 48))
    window = dense_gflops(model.config, (48, 48))
    assert model.published_gflops(output).tolist() == pytest.approx([2 * window, window])


def test_what_cannot_be_read_is_named_and_the_rest_is_counted(checkpoint: Path, folder: Path, flops: Flops):
    (folder / "broken.jpg").write_bytes(b"no image")
    printed = flops(checkpoint, "--images", folder, "--device", "cpu", status=1)
    figures = printed.figures
    assert len(figures["per_image"]["images"]) == 3 and "broken.jpg" in figures["failures"][0]
    assert "broken.jpg" in printed.err
    for path in folder.glob("*.png"):
        path.unlink()
    printed = flops(checkpoint, "--images", folder, "--device", "cpu", status=2)
    assert "none of its 1 images can be read" in printed.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ade20k_segvit"], "'ade20k_segvit' is neither a recipe nor a model; did you mean 'ade20k_segvit_"),
        (["ade20k_segvit_b", "--images", "."], "is a recipe, its weights are random; --images needs a trained model"),
        (["ade20k_segvit_b", "--size", "0", "5"], "--size is 0; it has to be at least 1"),
        (["ade20k_segvit_b", "--policy", "dtop"], "give --images"),
        (["CHECKPOINT", "--images", "EMPTY"], "holds no images"),
        (["CHECKPOINT", "--images", "gone"], "no such folder"),
        (["CHECKPOINT", "--images", "IMAGES", "--batch-size", "0"], "at least 1"),
        (["EMPTY"], "has neither model.safetensors"),
    ],
)
def test_what_cannot_be_done(
    args: list[str], message: str, checkpoint: Path, folder: Path, tmp_path: Path, flops: Flops
):
    (tmp_path / "empty").mkdir()
    places = {"CHECKPOINT": checkpoint, "EMPTY": tmp_path / "empty", "IMAGES": folder}
    assert message in flops(*(places.get(arg, arg) for arg in args), status=2).err
