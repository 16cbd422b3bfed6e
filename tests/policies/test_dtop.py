"""DToP's rule against loops, its options, and the cases at its ends."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sievit.config import ConfigError
from sievit.heads import ATM, ATMConfig, LinearConfig, build_head
from sievit.heads.atm import DecoderLayer
from sievit.models.segmenter import SegmentationNet, build_net
from sievit.policies import DToPConfig, KeepAllConfig, build_policy
from sievit.policies.dtop import DToP, leave
from sievit.tokens import Prediction, Tokens
from sievit.vit import Execution, ViTConfig
from sievit.vit.execution import Mode
from sievit.vit.packed import Masked
from tiny import attributes, refused, without_dropout

GRID = (5, 7)
N = GRID[0] * GRID[1]
VIT = ViTConfig(grid=GRID, patch_size=4, embed_dim=24, depth=6, num_heads=3)
ATM_HEAD = ATMConfig(channels=16, num_heads=2, num_layers=2)
PLACES = (1, 3, 5)


def built(config: DToPConfig | KeepAllConfig, *, head: Any = ATM_HEAD, vit: ViTConfig = VIT) -> SegmentationNet:
    """A network whose scores spread over 0 to 1."""
    torch.manual_seed(3)
    net = build_net(vit, config, head, PLACES, 4)
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    torch.nn.init.normal_(net.vit.get_parameter("pos_embed"))
    for own in net.heads:
        if isinstance(own, ATM):
            last = own.layers[-1]
            assert isinstance(last, DecoderLayer)
            last.cross_attn.q.weight.data *= 3
            own.class_embed.bias.data = torch.tensor([2.0, 0.0])
    return net.eval()


def pictures(b: int = 3) -> Tensor:
    return torch.randn(b, 3, GRID[0] * 4, GRID[1] * 4, generator=torch.Generator().manual_seed(1))


HEADS = {"atm": ATM_HEAD, "linear": LinearConfig()}
MIDDLE = DToPConfig(thresholds=(0.6, 0.6), keep_per_class=1)


# The rule.


def grade_by_hand(scores: list[float], grade: str) -> float:
    """Of one token, whose scores per class are given."""
    if grade == "max" or len(scores) == 1:
        return max(scores)
    if grade == "margin":
        first, second = sorted(scores)[-1:-3:-1]
        return first - second
    shares = [score / sum(scores) for score in scores]
    return 1 + sum(share * math.log(share) for share in shares if share > 0) / math.log(len(scores))


def leave_by_hand(scores: Tensor, left: Tensor, threshold: float, k: int, grade: str) -> Tensor:
    """Image by image, class by class."""
    b, classes, n = scores.shape
    out = torch.zeros(b, n, dtype=torch.bool)
    for i in range(b):
        grades = [grade_by_hand(scores[i, :, j].tolist(), grade) for j in range(n)]
        best = [max(range(classes), key=lambda c: (float(scores[i, c, j]), -c)) for j in range(n)]
        for cls in range(classes):
            mine = [j for j in range(n) if left[i, j] and best[j] == cls and grades[j] > threshold]
            mine.sort(key=lambda j: (-grades[j], j))  # the higher grade first, of equal ones the first token
            for j in mine[k:]:
                out[i, j] = threshold < 1
    return out


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 14)),
    k=st.sampled_from([0, 1, 5]),
    threshold=st.sampled_from([0.0, 0.3, 0.55, 0.9, 1.0]),
)
def test_who_leaves_is_as_written_out(data: st.DataObject, shape: tuple, k: int, threshold: float) -> None:
    """Scores on few levels, so that many are equal."""
    b, classes, n = shape
    levels = data.draw(st.lists(st.integers(0, 5), min_size=b * classes * n, max_size=b * classes * n))
    scores = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])[levels].view(shape)
    left = torch.tensor(data.draw(st.lists(st.booleans(), min_size=b * n, max_size=b * n))).view(b, n)

    class Given(Prediction):
        def scores(self) -> Tensor:
            return scores

    got = leave(Given(scores), left, threshold, keep_per_class=k, grade="max")
    assert torch.equal(got, leave_by_hand(scores, left, threshold, k, "max"))
    assert not (got & ~left).any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(1, 5),
    k=st.sampled_from([0, 1, 5]),
    threshold=st.floats(0.05, 0.95),
    grade=st.sampled_from(["max", "margin", "entropy"]),
    atm=st.booleans(),
)
def test_every_grade_is_as_written_out(seed, classes, k, threshold, grade, atm) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = 2 * torch.randn(2, classes, 20, generator=generator, dtype=torch.float64)
    presence = torch.randn(2, classes, 2, generator=generator, dtype=torch.float64) if atm else None
    left = torch.rand(2, 20, generator=generator) < 0.8
    prediction = Prediction(maps, presence)
    got = leave(prediction, left, threshold, keep_per_class=k, grade=grade)
    assert torch.equal(got, leave_by_hand(prediction.scores(), left, threshold, k, grade))


def test_scores_that_vanish_are_not_certain() -> None:
    prediction = Prediction(torch.full((1, 3, 4), -200.0), torch.zeros(1, 3, 2))
    left = torch.ones(1, 4, dtype=torch.bool)
    for grade in ("max", "margin", "entropy"):
        assert not leave(prediction, left, 0.1, keep_per_class=0, grade=grade).any(), grade


# Thresholds and heads.


def test_thresholds_per_stage() -> None:
    assert DToPConfig(thresholds=(0.9,)).per_stage(3) == (0.9, 0.9, 1.0)
    assert DToPConfig(thresholds=(0.9, 0.8)).per_stage(3) == (0.9, 0.8, 1.0)
    assert DToPConfig(thresholds=(0.9, 0.8, 0.7)).per_stage(3) == (0.9, 0.8, 0.7)
    refused("2 thresholds for 3 auxiliary heads; give 1, 3 or 4", DToPConfig(thresholds=(0.9, 0.8)).per_stage, 4)
    for thresholds in ((), (1.5,), (0.5, -0.1), (math.nan,)):
        refused("thresholds", DToPConfig, thresholds=thresholds)
    refused("keep_per_class", DToPConfig, keep_per_class=-1)


def test_without_heads_it_cannot_be() -> None:
    refused(r"dtop.*segmenter", build_policy, DToPConfig(), embed_dim=24, depth=6)
    head = build_head(LinearConfig(), embed_dim=24, num_classes=2)
    refused("behind 5", build_policy, DToPConfig(), embed_dim=24, depth=6, heads={1: head, 3: head})
    with pytest.raises(ConfigError, match="2 auxiliary heads"):
        build_policy(DToPConfig(thresholds=(0.5,) * 5), embed_dim=24, depth=6, heads=dict.fromkeys(PLACES, head))


def test_heads_at_threshold_one_are_not_asked() -> None:
    net = built(DToPConfig(thresholds=(1.0, 0.6), keep_per_class=1))
    said, trace = net.predictions(pictures())
    assert list(said) == [3, 5]
    assert len(trace.exited) == 3
    assert not trace.exited[0].any()
    assert trace.exited[1].any()


# The pass.


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("options", [{"thresholds": (0.6, 0.6, 0.6)}, {"static_left": (0.35, 0.6)}], ids=str)
def test_tokens_that_left_stay_away_and_keep_their_maps(head, options: dict) -> None:
    net = built(replace(MIDDLE, **options), head=head)
    with torch.no_grad():
        said, trace = net.predictions(pictures())
    assert 0.05 < trace.exited[0].float().mean() < 0.95
    assert (trace.exited[1] & ~trace.exited[0]).any()
    for before, after in zip(trace.exited, trace.exited[1:], strict=False):
        assert not (before & ~after).any()
    for block, keep in enumerate(trace.keep):
        gone = [trace.exited[s] for s, place in enumerate(PLACES) if place < block]
        expected = ~gone[-1] if gone else torch.ones_like(keep)
        assert torch.equal(keep, expected), block
    for stage, (first, second) in enumerate([(1, 3), (3, 5)]):
        gone = trace.exited[stage][:, None].expand_as(said[first].maps)
        assert torch.equal(said[first].maps[gone], said[second].maps[gone])
        assert not torch.equal(said[first].maps, said[second].maps)


@pytest.mark.parametrize(("threshold", "kept"), [(1.0, 0), (0.0, N)])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_at_threshold_one_and_where_all_are_kept_it_is_dense(head, threshold: float, kept: int) -> None:
    net, images = built(DToPConfig(thresholds=(threshold,), keep_per_class=kept), head=head), pictures()
    with torch.no_grad():
        got, trace = net(images)
        expected, dense = net(images, policy=net.build_policy(KeepAllConfig()))
    torch.testing.assert_close(got, expected, atol=1e-6 * kept, rtol=1e-6 * kept)
    assert torch.equal(trace.counts(), dense.counts())
    assert not any(exited.any() for exited in trace.exited)


@pytest.mark.parametrize("options", [{}, {"preserve": True}, {"rejoin": True}])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_everybody_leaves_at_the_first_stage(name: str, class_token: bool, options: dict) -> None:
    config = DToPConfig(thresholds=(0.0,), keep_per_class=0, **options)
    net = built(config, head=HEADS[name], vit=replace(VIT, class_token=class_token))
    images = pictures()
    with torch.no_grad():
        logits, trace = net(images)
        said, _ = net.predictions(images)
    assert trace.exited[0].all()
    assert logits.isfinite().all()
    assert [bool(keep.any()) for keep in trace.keep] == [True] * 2 + [False] * 3 + [bool(options.get("rejoin"))]
    if not options.get("rejoin"):
        assert torch.equal(said[1].scores(), said[5].scores())


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_everybody_leaves_in_one_image_of_a_batch(name: str, training: bool) -> None:
    net, images = built(replace(MIDDLE, keep_per_class=0), head=HEADS[name]), pictures()
    ask = net.heads[0].forward

    def certain(tokens: Tokens, part: Tensor | None, previous: Prediction | None) -> Prediction:
        said = ask(tokens, part, previous)
        maps = said.maps.clone()
        maps[1, 0] = 30.0
        return replace(said, maps=maps)

    net.heads[0].forward = certain
    if training:
        without_dropout(net)
    logits, trace = net(images)
    assert trace.exited[0][1].all()
    assert not trace.exited[1][0].all()
    assert logits.isfinite().all()
    for i in (0, 2):
        others, _ = net(images[[i, 1]])
        torch.testing.assert_close(others[0], logits[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(others[1], logits[1], atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_an_image_of_one_class() -> None:
    """All candidates are of one class; the k best of them stay."""
    net, images = built(DToPConfig(thresholds=(0.0,), keep_per_class=5), head=LinearConfig()), pictures()
    for head in net.heads:
        head.get_parameter("fc.bias").data[2] += 100
    with torch.no_grad():
        _, trace = net(images)
    assert trace.exited[0].sum(1).tolist() == [N - 5] * 3
    assert trace.exited[1].sum(1).tolist() == [N - 5] * 3


# What goes beyond the paper.


def reference(net: SegmentationNet, images: Tensor, trace, *, preserve: bool) -> Tensor:
    """The canvas, computed as a whole block by block; `trace` tells who takes part."""
    tokens = net.vit.embed(images)
    x = tokens.x
    for block, keep in zip(net.vit.blocks, trace.keep, strict=True):
        seen = torch.ones_like(keep) if preserve else keep
        y = block(x, Masked(seen), len(x))
        x = torch.where(keep[..., None], y, x)
    return x


@pytest.mark.parametrize("mode", ["packed", "masked"])
@pytest.mark.parametrize("preserve", [False, True])
def test_preserved_tokens_are_seen_and_not_computed(preserve: bool, mode: Mode) -> None:
    net, images = built(replace(MIDDLE, preserve=preserve)), pictures()
    with torch.no_grad():
        tokens, trace = net.vit(images, net.policy, execution=Execution(mode=mode))
        assert trace.exited[0].any(1).all()
        torch.testing.assert_close(tokens.x, reference(net, images, trace, preserve=preserve), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(tokens.x, reference(net, images, trace, preserve=not preserve), atol=1e-3)
    seen = trace.seen() if preserve else trace.counts()
    assert torch.equal(trace.seen(), seen)
    if preserve:
        assert (trace.seen() == N).all()


def test_rejoined_tokens_are_judged_by_the_last_head() -> None:
    net, images = built(replace(MIDDLE, rejoin=True)), pictures()
    with torch.no_grad():
        tokens, trace = net.vit(images, net.policy)
        said, _ = net.predictions(images)
        last = net.heads[-1](tokens, None, None)
    assert trace.keep[5].all()
    assert not trace.keep[4].all()
    assert trace.exited[1].any()
    torch.testing.assert_close(said[5].maps, last.maps, atol=1e-5, rtol=1e-5)
    assert not (trace.exited[1] & ~trace.exited[2]).any()


@pytest.mark.parametrize("grade", ["max", "margin", "entropy"])
def test_grades_leave_others(grade) -> None:
    net, images = built(replace(MIDDLE, grade=grade, thresholds=(0.4,), keep_per_class=0)), pictures()
    with torch.no_grad():
        said, trace = net.predictions(images)
    scores, everyone = said[1].scores(), torch.ones_like(trace.valid)
    assert torch.equal(trace.exited[0], leave_by_hand(scores, everyone, 0.4, 0, grade))
    assert 0 < trace.exited[0].sum() < trace.exited[0].numel()


# A module among modules.


def test_a_copy_asks_its_own_heads() -> None:
    """Exponential averages and trials are deep copies."""
    net, images = built(MIDDLE), pictures()
    twin = copy.deepcopy(net)
    assert isinstance(twin.policy, DToP)
    assert [twin.policy.heads[place] for place in PLACES] == list(twin.heads)
    with torch.no_grad():
        before, _ = net(images)
        for parameter in twin.heads[0].parameters():
            parameter.zero_()
        changed, trace = twin(images)
        after, own = net(images)
    assert torch.equal(before, after)
    assert not torch.equal(trace.exited[0], own.exited[0])
    assert not torch.allclose(changed, after)


def test_the_last_head_of_a_copy_stands_behind_its_own_norm() -> None:
    net, images = built(MIDDLE, vit=replace(VIT, final_norm=True)), pictures()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        before, _ = net(images)
        twin.vit.norm.get_parameter("weight").zero_()
        changed, _ = twin(images)
        after, _ = net(images)
        plain, _ = twin(images, policy=twin.build_policy(KeepAllConfig()))
    assert torch.equal(before, after)
    assert not torch.allclose(changed, after)
    assert plain.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_written_during_a_pass_and_heads_belong_to_the_network(training: bool) -> None:
    net = built(replace(MIDDLE, preserve=True)).train(training)

    before = attributes(net)
    net(pictures())
    assert attributes(net) == before

    net = built(MIDDLE)
    assert not list(net.policy.parameters())
    assert not any(name.startswith("policy") for name in net.state_dict())
    assert len(list(net.parameters())) == len({id(p) for p in net.parameters()})


def test_gradients_reach_earlier_heads_through_the_canvas() -> None:
    """The maps of tokens that left are an auxiliary head's, and the last loss trains them there."""
    net = built(replace(MIDDLE, thresholds=(0.5, 1.0))).train()
    said, trace = net.predictions(pictures())
    assert trace.exited[0].any()
    said[5].maps.square().sum().backward()
    gradient = net.heads[0].get_parameter("input_proj.weight").grad
    assert gradient is not None
    assert gradient.any()
