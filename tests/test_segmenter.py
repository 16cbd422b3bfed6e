"""The segmenter from images to labels on their pixels, and the file that holds one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sievit.heads import ATMConfig, LinearConfig, SemanticHeadConfig, SETRNaiveConfig, SETRPUPConfig
from sievit.models.build import build, load, save
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter, SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig, PolicyConfig
from sievit.tokens import Tokens, Trace
from tiny import random_images, refused, scattered, tiny_segmenter, tiny_vit

DTOP = DToPConfig(thresholds=(0.6, 0.6), keep_per_class=1)
HEADS: dict[str, SemanticHeadConfig] = {
    "atm": ATMConfig(channels=16, num_heads=2, num_layers=2),
    "linear": LinearConfig(),
    "naive": SETRNaiveConfig(channels=8),
    "pup": SETRPUPConfig(channels=8, num_convs=2),
}
POLICIES: dict[str, PolicyConfig] = {"dense": KeepAllConfig(), "dtop": DTOP}


def config(policy: PolicyConfig = DTOP, head: str = "atm", **options: Any) -> SegmenterConfig:
    return tiny_segmenter(
        vit=tiny_vit(patch_size=8, embed_dim=24, depth=5, num_heads=3),
        policy=policy,
        head=HEADS[head],
        classes=("a", "b", "c", "d"),
        **{"out_indices": (1, 2, 4), **options},
    )


def built(*args: Any, **options: Any) -> Segmenter:
    """With weights that tell classes apart and let tokens leave."""
    torch.manual_seed(7)
    return scattered(build(config(*args, **options)), lambda name: 0.6 if "heads" in name else 0.3)


def pairs(*sizes: tuple[int, int]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return random_images(*sizes), [{"labels": torch.randint(0, 4, size)} for size in sizes]


SIZES = [(32, 40), (21, 64), (5, 3), (1, 40), (48, 9)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("head", HEADS)
def test_a_batch_of_sizes_equals_each_alone(head: str, policy: str) -> None:
    model, images = built(POLICIES[policy], head), random_images(*SIZES)
    with torch.inference_mode():
        together, output = model.scores(images), model(images)
        for i, image in enumerate(images):
            alone = model([image])
            torch.testing.assert_close(together[i], model.scores([image])[0], atol=1e-5, rtol=1e-5)
            assert together[i].shape == (4, *SIZES[i])
            assert output.labels[i].shape == SIZES[i]
            assert torch.equal(output.exit_stages(i), alone.exit_stages(0))
            assert torch.equal(output.trace.counts()[:, i], alone.trace.counts()[:, 0])
    assert output.losses == {}
    assert output.owner == tuple(range(5))
    assert output.sizes == SIZES
    assert output.image_size == (48, 64)
    assert output.trace.valid.sum(1).tolist() == [20, 24, 1, 5, 12]


@pytest.mark.parametrize("head", ["atm", "linear"])
@pytest.mark.parametrize("policy", POLICIES)
def test_losses_of_a_batch_of_sizes_are_those_on_their_pixels(head: str, policy: str) -> None:
    """What padding is filled with and how much there is of it does not matter."""
    model = built(POLICIES[policy], head)
    images, targets = pairs((32, 40), (21, 17))
    with torch.no_grad():
        narrow = model(images, targets)
        more, label = pairs((48, 64))
        label[0]["labels"].fill_(255)
        wide = model([*images, *more], [*targets, *label])
    assert narrow.image_size == (32, 40)
    assert wide.image_size == (48, 64)
    for name in narrow.losses:
        if name.endswith("class"):
            continue  # an image without any label counts there as one without any class
        torch.testing.assert_close(narrow.losses[name], wide.losses[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("head", HEADS)
def test_training_reaches_every_parameter(head: str, policy: str) -> None:
    model = built(POLICIES[policy], head, aux_weight=0.5).train()
    images, targets = pairs((32, 40), (24, 30))
    targets[0]["labels"][:10] = 255
    output = model(images, targets)
    terms = {"class", "mask", "dice"} if head == "atm" else {"pixel"}
    assert output.losses.keys() == {prefix + term for prefix in ("", "aux_0_", "aux_1_") for term in terms}
    assert output.labels == []
    torch.stack(list(output.losses.values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_auxiliary_losses_are_weighted_and_outside_training_those_of_the_heads_asked() -> None:
    images, targets = pairs((32, 32))
    with torch.no_grad():
        one = built(head="linear")(images, targets).losses
        half = built(head="linear", aux_weight=0.5)(images, targets).losses
    assert float(half["aux_0_pixel"]) == pytest.approx(0.5 * float(one["aux_0_pixel"]))
    assert float(half["pixel"]) == pytest.approx(float(one["pixel"]))

    images, targets = pairs((32, 40))
    dense, dtop = built(KeepAllConfig(), "linear"), built(replace(DTOP, thresholds=(1.0, 0.6)), "linear")
    assert dense(images, targets).losses.keys() == {"pixel"}
    assert dtop(images, targets).losses.keys() == {"aux_1_pixel", "pixel"}


def test_labels_of_another_size_are_an_error() -> None:
    model = built().train()
    images, targets = pairs((32, 40), (24, 30))
    for shape in ((24, 31), (1, 30), (24,)):
        wrong = [targets[0], {"labels": torch.zeros(shape, dtype=torch.int64)}]
        refused("image 1 is 24x30 pixels, its labels are", model, images, wrong)


# Windows.


def score_by_hand(model: Segmenter, image: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Window by window, each alone; one more step as long as the image is not covered, the last window moved inside."""
    h, w = image.shape[1:]
    high, wide = min(crop[0], h), min(crop[1], w)
    total, count = torch.zeros(4, h, w), torch.zeros(h, w)
    whole = Segmenter(replace(model.config, crop=None, stride=None), model.net).eval()
    for y in (min(y, h - high) for y in range(0, h - high + stride[0], stride[0])):
        for x in (min(x, w - wide) for x in range(0, w - wide + stride[1], stride[1])):
            total[:, y : y + high, x : x + wide] += whole.scores([image[:, y : y + high, x : x + wide]])[0]
            count[y : y + high, x : x + wide] += 1
    assert (count > 0).all()
    return total / count


@pytest.mark.parametrize(
    ("crop", "stride"), [((32, 32), (24, 24)), ((32, 24), (32, 7)), ((16, 100), (11, 100)), ((17, 30), (17, 13))]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_windows_cover_an_image_and_are_averaged(policy: str, crop, stride) -> None:
    model = built(POLICIES[policy], crop=crop, stride=stride, windows_at_once=3)
    images = random_images((50, 70), (32, 24), (9, 60), (33, 33))
    with torch.inference_mode():
        scores, output = model.scores(images), model(images)
        for i, image in enumerate(images):
            torch.testing.assert_close(scores[i], score_by_hand(model, image, crop, stride), atol=1e-5, rtol=1e-5)
            assert torch.equal(output.labels[i], scores[i].argmax(0))
    for (y, x, h, w), owner in zip(output.windows, output.owner, strict=True):
        assert 0 <= y <= y + h <= images[owner].shape[1]
        assert 0 <= x <= x + w <= images[owner].shape[2]
    assert list(output.owner) == sorted(output.owner)
    assert len(output.trace.valid) == len(output.windows)


@pytest.mark.parametrize("options", [{}, {"preserve": True}, {"rejoin": True}])
def test_how_many_windows_go_together_changes_nothing(options: dict) -> None:
    images = random_images((50, 70), (20, 24), (64, 40))
    several = {"crop": (32, 32), "stride": (20, 20)}
    policy = DToPConfig(thresholds=(0.75, 0.75), keep_per_class=1, **options)
    answers = [built(policy, windows_at_once=n, **several) for n in (1, 4, 100)]
    with torch.inference_mode():
        first, *others = [(model.scores(images), model(images)) for model in answers]
    for scores, output in others:
        for a, b in zip(first[0], scores, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert torch.equal(first[1].trace.counts(), output.trace.counts())
        assert torch.equal(first[1].trace.seen(), output.trace.seen())
        assert all(torch.equal(first[1].exit_stages(i), output.exit_stages(i)) for i in range(3))
        assert first[1].windows == output.windows


@pytest.mark.parametrize("turned", [False, True])
def test_windows_of_which_only_some_remember_context_are_joined(turned: bool) -> None:
    """With `preserve`, a batch in which nobody has left has no context to remember."""
    tokens = Tokens(torch.zeros(2, 6, 3), (2, 3))
    gone = torch.tensor([[True, False] * 3, [True] * 6])
    without = Trace.start(tokens).record(tokens, {"maps": torch.ones(2, 4, 6)}, [False, True]).finish(None, {})
    chosen = tokens.select(~gone, context=gone)
    context = Trace.start(tokens).record(chosen, {"maps": torch.ones(2, 4, 6)}, [False, True]).finish(None, {})
    joined = Trace.join([context, without] if turned else [without, context])
    parts = (context, without) if turned else (without, context)
    assert torch.equal(joined.seen(), torch.cat([part.seen() for part in parts], dim=1))
    assert torch.equal(joined.counts(), torch.cat([part.counts() for part in parts], dim=1))
    assert joined.aux[0]["maps"].shape == (4, 4, 6)
    assert Trace.join([context]) is context


def test_where_tokens_left_on_the_pixels() -> None:
    model = built()
    (image,) = random_images((30, 44))
    with torch.inference_mode():
        output = model([image])
    left = output.exit_stages(0)
    assert left.shape == (30, 44)
    assert left.dtype == torch.int64
    for y, x in ((0, 0), (7, 8), (29, 43), (15, 16)):
        token = (y // 8) * output.trace.grid[1] + x // 8
        stages = [stage for stage, exited in enumerate(output.trace.exited) if exited[0, token]]
        assert int(left[y, x]) == (stages[0] if stages else 3)
    assert set(left.unique().tolist()) >= {0, 3}
    with torch.inference_mode():
        assert not built(KeepAllConfig())([image]).exit_stages(0).any()


def test_where_windows_overlap_the_later_stage_counts() -> None:
    model = built(crop=(16, 16), stride=(8, 8))
    (image,) = random_images((24, 24))
    with torch.inference_mode():
        output = model([image])
    expected = torch.zeros(24, 24, dtype=torch.int64)
    for i, (y, x, h, w) in enumerate(output.windows):
        stages = 3 - sum(
            exited[i].int() for exited in output.trace.exited
        )  # every later stage has those of earlier ones
        here = stages.view(2, 2).repeat_interleave(8, 0).repeat_interleave(8, 1)[:h, :w]
        expected[y : y + h, x : x + w] = expected[y : y + h, x : x + w].maximum(here)
    assert torch.equal(output.exit_stages(0), expected)


# Images in, labels out.


def test_labels_lie_on_the_given_pixels() -> None:
    model = built(input=InputConfig(min_size=32, max_size=96))
    images = random_images((60, 90), (20, 10))
    with torch.inference_mode():
        output = model(images)
    assert output.sizes == [(32, 48), (64, 32)]
    assert [tuple(labels.shape) for labels in output.labels] == [(60, 90), (20, 10)]
    assert all(labels.dtype == torch.int64 and 0 <= labels.min() <= labels.max() <= 3 for labels in output.labels)


def test_a_network_without_whole_patches() -> None:
    """Released models get images of any size in one tensor."""
    net = built().net
    with torch.inference_mode():
        logits, trace = net(torch.rand(2, 3, 21, 13))
    assert logits.shape == (2, 4, 21, 13)
    assert trace.grid == (3, 2)


# Files and configurations.


def test_pruning_a_trained_model_needs_no_training(tmp_path: Path) -> None:
    dense, images = built(KeepAllConfig()), random_images((40, 50))
    save(dense, tmp_path / "dense.safetensors")
    direct = load(tmp_path / "dense.safetensors", policy=DTOP)
    assert isinstance(direct, Segmenter)
    assert direct.config == replace(dense.config, policy=DTOP)
    with torch.inference_mode():
        assert torch.equal(direct.scores(images)[0], built(DTOP).scores(images)[0])
        once = dense.scores(images, policy=dense.net.build_policy(DTOP))
        assert torch.equal(once[0], direct.scores(images)[0]), "as for one pass"
        said = dense.predict(images, policy=dense.net.build_policy(DTOP))
        assert torch.equal(said[0], once[0].argmax(0)) and not torch.equal(dense.scores(images)[0], once[0])
    named = load(tmp_path / "dense.safetensors", policy="dtop")
    assert named.config.policy == DToPConfig()
    save(direct, tmp_path / "pruned.safetensors")
    back = load(tmp_path / "pruned.safetensors", policy="keep_all")
    assert isinstance(back, Segmenter)
    with torch.inference_mode():
        assert torch.equal(back.scores(images)[0], dense.scores(images)[0])
    refused("2 auxiliary heads", load, tmp_path / "dense.safetensors", policy=DToPConfig(thresholds=(0.5,) * 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": (32, 32)}, "crop and stride"),
        ({"stride": (32, 32)}, "crop and stride"),
        ({"crop": (32, 32), "stride": (33, 32)}, "gaps"),
        ({"crop": (32, 32), "stride": (32, 40)}, "gaps"),
        ({"crop": (0, 32), "stride": (0, 32)}, "at least 1"),
        ({"ignore_index": 2}, "ignore_index 2"),
        ({"palette": ((0, 0, 0),)}, "1 colours for 4 classes"),
        ({"windows_at_once": 0}, "windows_at_once"),
    ],
)
def test_impossible_configurations(options: dict, message: str) -> None:
    refused(message, config, **options)


@pytest.mark.parametrize("places", [(), (1, 2), (4, 1), (1, 1, 4), (-1, 4), (1, 5)])
def test_heads_stand_behind_blocks_that_there_are(places: tuple[int, ...]) -> None:
    refused("out_indices", config, out_indices=places)


def test_one_head_is_enough() -> None:
    with torch.inference_mode():
        output = build(config(DToPConfig(), out_indices=(4,))).eval()(random_images((32, 32)))
    assert len(output.trace.exited) == 1
    assert all(keep.all() for keep in output.trace.keep)
