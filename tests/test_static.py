"""Static counts: the same numbers, and no shape, branch or synchronisation that depends on the image."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sievit.heads import ATMConfig
from sievit.models.backbone import build_backbone
from sievit.models.segmenter import SegmentationNet, build_net
from sievit.necks.adapter import AdapterConfig
from sievit.policies import DToPConfig, Policy, SViTConfig, TopNormConfig, build_policy
from sievit.tokens import Tokens
from sievit.vit import Execution, RopeConfig, ViT, ViTConfig
from sievit.vit.execution import Mode
from sievit.vit.executor import Run, execute_run
from tiny import refused, scattered

DEPTH = 6
VIT = ViTConfig(grid=(6, 8), patch_size=4, embed_dim=32, num_heads=2, depth=DEPTH)


def backbone(**options: Any) -> ViT:
    torch.manual_seed(0)
    return scattered(ViT(replace(VIT, class_token=True, **options)), 0.3)


def gates(**options: Any) -> Policy:
    torch.manual_seed(1)
    config = SViTConfig(first_block=2, **options)
    return build_policy(config, embed_dim=32, depth=DEPTH).eval()


@pytest.mark.parametrize("options", [{}, {"rope": RopeConfig(kind="centred", temperature=100.0), "pos_embed": "none"}])
@torch.no_grad()
def test_the_whole_backbone_is_one_graph(options: dict[str, Any]) -> None:
    """`fullgraph=True` refuses any branch on data; the numbers are the eager ones."""
    vit, policy = backbone(**options), gates(static_shares=(0.7, 0.5, 1.0, 0.3), multiple=8)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens, trace = vit(images, policy)
        return tokens.x, trace.counts()

    images = torch.randn(2, 3, 24, 32)
    got, counts = torch.compile(run, fullgraph=True, backend="eager")(images)
    expected, _ = run(images)
    torch.testing.assert_close(got, expected)
    assert counts[:, 0].tolist() == [49, 49, 41, 25, 49, 17], "rounded up to multiples of 8, and the class token"


def exits(**options: Any) -> SegmentationNet:
    torch.manual_seed(0)
    net = build_net(VIT, DToPConfig(**options), ATMConfig(channels=16, num_heads=2, num_layers=2), (1, 3, DEPTH - 1), 4)
    return scattered(net, 0.3)


@torch.no_grad()
def test_a_segmenter_with_static_exits_is_one_graph() -> None:
    net = exits(static_left=(0.35, 0.6), multiple=4, keep_per_class=1)

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, trace = net(images)
        return scores, trace.counts(), torch.stack(trace.exited).sum(2)

    images = torch.randn(2, 3, 24, 32)
    got, counts, gone = torch.compile(run, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(got, run(images)[0])
    assert counts[:, 0].tolist() == counts[:, 1].tolist() == [48, 48, 32, 32, 20, 20]
    assert gone[:, 0].tolist() == [16, 28, 28]


@torch.no_grad()
def test_those_with_the_highest_grades_leave_and_each_class_is_represented() -> None:
    net = exits(static_left=(0.35, 0.6), keep_per_class=2)
    _, trace = net(torch.randn(3, 3, 24, 32))
    grades, cls = trace.predictions[0].scores().max(1)
    for i, gone in enumerate(trace.exited[0]):
        of_class = [
            sorted((t for t in range(48) if cls[i, t] == c), key=lambda t: -float(grades[i, t])) for c in range(4)
        ]
        ordinary = [t for tokens in of_class for t in tokens[2:]]
        expected = sorted(ordinary, key=lambda t: -float(grades[i, t]))[: int(gone.sum())]
        assert set(gone.nonzero().flatten().tolist()) == set(expected)


@pytest.mark.slow
@torch.no_grad()
def test_a_backbone_with_static_counts_exports() -> None:
    torch.manual_seed(0)
    config = ViTConfig(embed_dim=32, num_heads=2, depth=8)
    policy = SViTConfig(static_shares=(0.7, 0.7, 0.5, 0.5, 0.3))
    backbone = build_backbone(AdapterConfig(conv_inplane=16, deform_num_heads=2), config, policy).eval()

    class Maps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.backbone(images)[0].values())

    images = torch.randn(2, 3, 64, 96)
    exported = torch.export.export(Maps(), (images,)).module()
    for got, expected in zip(exported(images), Maps()(images), strict=True):
        torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_the_highest_logits_are_chosen() -> None:
    vit = backbone()
    _, trace = vit(torch.randn(3, 3, 24, 32), gates(static_shares=(0.5,) * 4))
    for keep, aux in zip(trace.keep[2:], trace.aux[2:DEPTH], strict=True):
        margin = aux["logits"][..., 0] - aux["logits"][..., 1]
        assert keep.sum(1).eq(24).all()
        assert (margin.masked_fill(~keep, 1e9).amin(1) >= margin.masked_fill(keep, -1e9).amax(1)).all()


@torch.no_grad()
def test_equal_counts_need_no_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice by places never asks how many tokens there are: neither `nonzero` nor `tolist` is called."""
    vit, images = backbone(), torch.randn(2, 3, 24, 32)

    def asked(self: Tensor, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a synchronisation")

    policy = build_policy(TopNormConfig(first_block=2, shares=(0.5,)), embed_dim=32, depth=DEPTH)
    with monkeypatch.context() as patch:
        for name in ("nonzero", "tolist", "item", "__bool__"):
            patch.setattr(Tensor, name, asked)
        vit(images, gates(static_shares=(0.5,) * 4))
        vit(images, policy)
        with pytest.raises(AssertionError, match="a synchronisation"):
            vit(images, gates())


@torch.no_grad()
def test_buckets_are_few_and_change_nothing() -> None:
    vit, seen = backbone(), []
    block: Any = vit.blocks[0]
    images = torch.randn(2, 3, 24, 32)
    for count in range(49):
        tokens = vit.embed(images)
        keep = torch.arange(48)[None] * torch.tensor([[5], [7]]) % 48 < count
        chosen = tokens.select(keep & (torch.arange(2)[:, None] * 3 + count > 3))
        expected, _ = execute_run(Run([block]), chosen, Execution(mode="packed"))

        handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        torch.testing.assert_close(
            execute_run(Run([block]), chosen, Execution(mode="bucketed"))[0].x, expected.x, atol=1e-5, rtol=1e-4
        )
        handle.remove()
    assert set(seen) == {1 + 6 * i for i in range(9)}


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (gates, {"static_shares": (0.5,)}, "4, one per gated block"),
        (gates, {"static_shares": (0.5, 0.5, 0.0, 0.5)}, "above 0"),
        (gates, {"static_shares": (0.5,) * 4, "sample": True}, "go with the arg-max"),
        (gates, {"multiple": 0}, "multiple is 0"),
        (exits, {"static_left": (0.5,)}, "1 shares for 2 auxiliary heads"),
        (exits, {"static_left": (0.5, 0.4)}, "rising shares"),
        (exits, {"static_left": (0.5, 1.0)}, "has to be below 1"),
        (exits, {"static_left": (0.5, 0.6), "preserve": True}, "preserve"),
        (exits, {"multiple": 0}, "multiple is 0"),
    ],
)
def test_what_makes_no_sense(make: Callable[..., Any], config: dict[str, Any], message: str) -> None:
    refused(message, make, **config)


def test_gradients_of_selected_tokens_equal_those_of_masking_where_nothing_is_skipped() -> None:
    """With every gate open, `selected` is `masked`, gradients of the gates included; and with some closed the chosen
    tokens have the values of masking, and closed gates no gradient."""
    vit = backbone().requires_grad_(False)
    x = vit.embed(torch.randn(2, 3, 24, 32))
    block: Any = vit.blocks[0]
    for share in (0.0, 0.5):
        keep = torch.rand(2, 48, generator=torch.Generator().manual_seed(5)) >= share
        found = []
        modes: tuple[Mode, ...] = ("masked", "selected")
        for mode in modes:
            gate = keep.float().requires_grad_()
            tokens: Tokens = x.select(keep, gate)
            out = execute_run(Run([block]), tokens, Execution(mode=mode))[0].x
            out.square().sum().backward()
            assert gate.grad is not None
            found.append((out.detach(), gate.grad))
        (masked, of_masked), (selected, of_selected) = found
        torch.testing.assert_close(selected, masked, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(of_selected[keep], of_masked[keep], atol=1e-3, rtol=1e-3)
        assert of_selected[~keep].eq(0).all() and (share == 0 or of_masked[~keep].ne(0).any())
