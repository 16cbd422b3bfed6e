"""Reuse over frames: what is computed, what is taken over, and what it costs."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sievit.config import ConfigError
from sievit.heads import SETRNaiveConfig
from sievit.measure.flops import traced_macs
from sievit.models.base import Model
from sievit.models.build import build
from sievit.necks.adapter import AdapterConfig
from sievit.policies import policies, policy_config
from sievit.policies.reuse import Reuse, ReuseConfig, without_values
from sievit.tokens import Tokens, Trace
from sievit.vit import Execution, ViT
from sievit.vit.config import RopeConfig
from tiny import attributes, dense, refused, scattered, tiny_detector, tiny_segmenter, tiny_vit

MERGE = {"evit", "evo_vit", "ats", "tome", "algm", "expedit"}
"""Policies that do more than select tokens before blocks."""
FIELDS = {"first_block": 1, "shares": (0.6, 0.4), "targets": (0.6,), "thresholds": (0.3,), "keep_per_class": 1}
EVERY = ReuseConfig(threshold=0, cut=1, refresh=None)
"""Every change counts."""


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def configured(name: str, **options: Any) -> Any:
    """With settings that leave tokens out on a tiny backbone, and come back for a last block where they can."""
    config = policy_config(name)
    names = {field.name for field in dataclasses.fields(config)}
    fields = {key: value for key, value in {**FIELDS, **options}.items() if key in names}
    return dataclasses.replace(config, **fields)


def segmenter(name: str = "keep_all", **changes: Any) -> Model:
    options = {"head": SETRNaiveConfig(channels=8, dropout=0.0), "policy": configured(name), **changes}
    return scattered(build(tiny_segmenter(**options)), 0.4)


def changed(image: Tensor, rows: slice, columns: slice) -> Tensor:
    """The image with other pixels there."""
    image = image.clone()
    image[:, rows, columns] = torch.rand_like(image[:, rows, columns])
    return image


@pytest.mark.parametrize("name", sorted(policies()))
def test_a_first_frame_is_an_image_and_a_frame_that_stands_costs_no_token(name: str):
    model = segmenter(name)
    first = torch.rand(3, 40, 56)
    if name in MERGE or model.policy.propagates:
        refused("only select tokens", model.stream)
        return
    alone, stream = model([first]), model.stream()
    for number in range(3):
        answer = stream([first])
        assert torch.equal(answer.results[0], alone.results[0])
        computed = torch.stack(answer.trace.keep).sum()
        assert bool(computed) == (number == 0)
        if number == 0:
            torch.testing.assert_close(model.gflops(answer), model.gflops(alone))
    assert model.gflops(answer) < 0.7 * model.gflops(alone)  # heads, and what the prefix tokens take


@pytest.mark.parametrize("name", ["keep_all", "svit", "dtop", "random", "dynamicvit"])
def test_where_everything_changes_every_frame_is_an_image(name: str):
    model = segmenter(name)
    stream = model.stream(EVERY)
    for frame in torch.rand(3, 3, 40, 56):
        alone, answer = model([frame]), stream([frame])
        assert torch.equal(answer.results[0], alone.results[0])
        torch.testing.assert_close(model.gflops(answer), model.gflops(alone))


def by_hand(vit: ViT, tokens: Tokens, past: list[Tensor], dirty: Tensor) -> list[Tensor]:
    """What goes into each block and comes out of the last: all tokens computed, and those that are not dirty put back
    to what they were."""
    p = tokens.num_prefix
    now = dataclasses.replace(tokens, x=torch.cat([tokens.x[:, :p], mixed(tokens.patches, past[0], dirty)], dim=1))
    found, trace = [now.patches], Trace.start(now)
    for index in range(vit.config.depth):
        now, trace = vit.run_blocks(now, dense(vit), trace, start=index, stop=index + 1)
        now = now.replace_patches(mixed(now.patches, past[index + 1], dirty))
        found.append(now.patches)
    return found


def mixed(new: Tensor, old: Tensor, dirty: Tensor) -> Tensor:
    return torch.where(dirty[..., None], new, old)


@pytest.mark.parametrize("family", ["plain", "rope", "no_class"])
def test_others_have_the_value_key_and_value_that_they_had_in_each_block(family: str):
    more: dict[str, Any] = {
        "plain": {},
        "rope": {"rope": RopeConfig(kind="centred", temperature=100.0), "pos_embed": "none", "num_registers": 2},
        "no_class": {"class_token": False},
    }[family]
    vit = scattered(ViT(tiny_vit(patch_size=8, embed_dim=32, **more)), 0.3)
    images = [torch.randn(2, 3, 32, 48)]
    images += [torch.stack([changed(images[0][0], slice(8, 24), slice(0, 16)), images[0][1]])]
    images += [torch.stack([images[1][0], changed(images[0][1], slice(0, 8), slice(8, 32))])]
    sizes = [(32, 48), (24, 40)]
    past, values = None, []
    for number, batch in enumerate(images):
        tokens = vit.embed(batch, sizes)
        dirty = torch.ones_like(tokens.valid_or_all())
        if number:
            dirty = (tokens.patches != values[0]).any(2)
            assert 0 < (dirty & tokens.valid_or_all()).sum() < 16
        values = by_hand(vit, tokens, values or [tokens.patches] * 5, dirty)
        policy = Reuse(EVERY, dense(vit), past)
        with FlopCounterMode(display=False) as counter:
            out, trace = vit.run_blocks(tokens, policy, Trace.start(tokens))
        there = tokens.valid_or_all()
        torch.testing.assert_close(out.patches[there], values[-1][there], atol=1e-4, rtol=1e-4)
        assert all(torch.equal(keep, dirty & there) for keep in trace.keep)
        if not number or family == "rope":  # elsewhere attention is computed on padding too
            assert traced_macs(vit.config, trace).sum() <= counter.get_total_flops() / 2
        past = policy.left(trace)


def test_the_cost_is_the_count_of_the_pass():
    vit = scattered(ViT(tiny_vit(patch_size=8)), 0.3)
    images = torch.randn(1, 3, 32, 48)
    past = None
    for batch in (images, changed(images[0], slice(8, 24), slice(0, 16))[None]):
        policy = Reuse(EVERY, vit.build_policy(configured("svit")), past)
        tokens = vit.embed(batch)
        with FlopCounterMode(display=False) as counter:
            _, trace = vit.run_blocks(tokens, policy, Trace.start(tokens))
        past, trace = policy.left(trace), without_values(trace)
        counted = traced_macs(vit.config, trace) + policy.inner.macs(trace)
        assert counted.item() == pytest.approx(counter.get_total_flops() / 2, rel=1e-9)
    assert 0 < trace.keep[0].sum() < trace.keep[3].sum() < 24


def computed(answer: Any) -> list[int]:
    """Tokens in the first block, by image."""
    return answer.trace.keep[0].sum(1).tolist()


def test_slow_changes_are_seen_and_cuts_sizes_and_age_start_anew():
    model = segmenter()
    first, other = torch.rand(2, 3, 40, 56)
    stream = model.stream(ReuseConfig(threshold=0.5, cut=0.6, refresh=4))
    steps = [first + (other - first) * share * torch.zeros(40, 56).index_fill(0, torch.arange(16), 1) for share in
             (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]  # fmt: skip
    seen = [computed(stream([frame]))[0] for frame in steps]
    assert seen[0] == 35 and seen[1] == 0  # a step is less than the threshold
    assert 0 < max(seen[2:4]) <= 14  # what adds up is not
    assert seen[4] >= 21  # those that were not computed for four frames
    assert computed(stream([other])) == [35]  # a cut
    assert computed(stream([other])) == [0]
    assert computed(stream([torch.rand(3, 48, 56)])) == [42]
    assert computed(stream([other])) == [35]


@pytest.mark.parametrize("name", ["keep_all", "dtop"])
def test_a_camera_that_moves_costs_what_images_cost_and_one_that_stops_is_seen(name: str):
    """Of the second of two frames that moved, and of those behind it, embeddings alone are remembered."""
    model = segmenter(name)
    frames = [torch.rand(3, 40, 56) for _ in range(4)]
    stream = model.stream(ReuseConfig(threshold=0.1, refresh=None))
    remembered = []
    for frame in [*frames, *frames[-1:] * 3]:
        answer, alone = stream([frame]), model([frame])
        assert torch.equal(answer.results[0], alone.results[0])
        assert stream.past is not None
        remembered.append(len(stream.past.memory))
        if len(remembered) < 6:
            torch.testing.assert_close(model.gflops(answer), model.gflops(alone))
        else:
            assert computed(answer) == [0]
    assert remembered == [4, 4, 0, 0, 4, 4, 4]


def test_videos_side_by_side_are_as_each_alone_and_state_is_a_value():
    model = segmenter("dtop")
    videos = [[torch.rand(3, 40, 56)], [torch.rand(3, 32, 56)]]
    for video in videos:
        video.append(changed(video[0], slice(0, 16), slice(8, 24)))
    together = model.stream(EVERY)
    alone = [model.stream(EVERY) for _ in videos]
    before = attributes(model)
    for frames in zip(*videos, strict=True):
        past = together.past
        answer = together(frames)
        for i, (stream, frame) in enumerate(zip(alone, frames, strict=True)):
            one = stream([frame])
            assert torch.equal(answer.results[i], one.results[0])
            torch.testing.assert_close(model.gflops(answer)[i], model.gflops(one)[0])
    assert attributes(model) == before
    together.past = past
    again = together(frames)
    assert all(torch.equal(a, b) for a, b in zip(again.results, answer.results, strict=True))


def test_windows_of_a_frame_have_a_past_each():
    model = segmenter(crop=(32, 32), stride=(24, 24), windows_at_once=2)
    frames = [torch.rand(3, 40, 56)]
    frames.append(changed(frames[0], slice(0, 8), slice(0, 8)))
    stream = model.stream()
    counts = [stream([frame]).trace.keep[0].sum(1).tolist() for frame in frames]
    assert counts == [[16] * 4, [1, 0, 0, 0]]


@pytest.mark.parametrize("name", ["keep_all", "svit"])
def test_a_detector_with_an_adapter_reuses_in_every_piece(name: str):
    adapter = AdapterConfig(conv_inplane=4, deform_num_heads=2, num_interactions=2)
    model = scattered(build(tiny_detector(neck=adapter, policy=configured(name))), 0.2)
    frame = torch.rand(3, 64, 96)
    stream, alone = model.stream(), model([frame])
    for number in range(2):
        answer = stream([frame])
        for key, value in alone.results[0].items():
            torch.testing.assert_close(answer.results[0][key], value)
        assert bool(torch.stack(answer.trace.keep).any()) == (number == 0)


def test_a_mode_that_was_tuned_does_not_matter():
    model = segmenter("svit").with_config(execution=Execution(mode="bucketed"))
    frame = torch.rand(3, 40, 56)
    assert torch.equal(model.stream()([frame]).results[0], model([frame]).results[0])
    with pytest.raises(ConfigError):
        model.stream()([frame.numpy()])
