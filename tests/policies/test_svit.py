"""SViT's gates: the loss, and each of the options."""

import dataclasses

import pytest
import torch

from sievit.config import from_json
from sievit.policies import PolicyConfig, SpreadConfig, SViTConfig, build_policy
from sievit.policies.base import BlockRange
from sievit.policies.gates import gumbel_gate
from sievit.policies.svit import SViT
from sievit.tokens import Trace
from sievit.vit import ViT, ViTConfig
from tiny import refused

CONFIG = SViTConfig(first_block=1, targets=(0.6, 0.4))
VIT = ViTConfig(grid=(4, 6), embed_dim=24, depth=5, num_heads=2)


def built(config: SViTConfig = CONFIG) -> SViT:
    torch.manual_seed(0)
    policy = build_policy(config, embed_dim=24, depth=5)
    assert isinstance(policy, SViT)
    return policy


def decided(policy: SViT) -> SViT:
    """With gates that tell tokens apart."""
    for gate in policy.gates:
        torch.nn.init.normal_(gate.get_parameter("fc2.weight"), std=2.0)
    return policy


def trace_of(gates: torch.Tensor, valid: torch.Tensor | None = None) -> Trace:
    """A trace whose gated blocks chose `gates` (blocks, b, n)."""
    b, n = gates.shape[1:]
    valid = torch.ones(b, n, dtype=torch.bool) if valid is None else valid
    return Trace(grid=(1, n), valid=valid, keep=(), aux=tuple({"gate": gate} for gate in gates))


def test_ratio_loss_is_on_the_batch_or_on_each_image_without_padding() -> None:
    gates = torch.zeros(4, 2, 10)
    gates[:, 0, :8] = 1  # one image keeps 0.8, the other 0.2: the mean of the batch is 0.5
    gates[:, 1, :2] = 1
    targets = torch.tensor([0.6, 0.6, 0.4, 0.4])
    batch = 4 * (0.5 - targets).square().mean()
    torch.testing.assert_close(built().loss(trace_of(gates))["ratio"], batch)
    each = 4 * torch.stack([(share - targets).square() for share in (0.8, 0.2)]).mean()
    fixed = built(dataclasses.replace(CONFIG, per_sample=True))
    torch.testing.assert_close(fixed.loss(trace_of(gates))["ratio"], each)

    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, 5:] = False
    gates = torch.ones(4, 2, 10) * valid
    targets = torch.tensor([0.6, 0.6, 0.4, 0.4])
    torch.testing.assert_close(built().loss(trace_of(gates, valid))["ratio"], 4 * (1 - targets).square().mean())

    assert built().targets == (0.6, 0.6, 0.4, 0.4)
    assert build_policy(SViTConfig(), embed_dim=24, depth=12).targets == (0.7,) * 3 + (0.49,) * 3 + (0.343,) * 3


@pytest.mark.parametrize("reactivate", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_tokens_come_back_unless_they_are_not_to(training: bool, reactivate: bool) -> None:
    vit, policy = ViT(VIT), decided(built(dataclasses.replace(CONFIG, reactivate=reactivate)).train(training))
    _, trace = vit(torch.randn(4, 3, 64, 96), policy)
    back = [bool((later & ~earlier).any()) for earlier, later in zip(trace.keep[1:], trace.keep[2:], strict=False)]
    assert any(back) == reactivate
    assert reactivate or trace.keep[1].sum() > trace.keep[4].sum()


@pytest.mark.parametrize("training", [True, False])
def test_dropped_tokens_are_zero_and_preserved_ones_are_not(training: bool) -> None:
    vit = ViT(VIT)
    for preserve in (True, False):
        config = dataclasses.replace(CONFIG, reactivate=False, preserve=preserve)
        tokens, trace = vit(torch.randn(2, 3, 64, 96), built(config).train(training))
        out = tokens.patches[~trace.keep[-1]]
        assert len(out) and bool(out.any()) == preserve


def test_sampling_at_inference_draws_by_the_gates_probability() -> None:
    vit, policy = ViT(VIT), built(dataclasses.replace(CONFIG, sample=True)).eval()
    for gate in policy.gates:
        torch.nn.init.zeros_(gate.get_parameter("fc2.weight"))
        gate.get_parameter("fc2.bias").data = torch.tensor([0.8, 0.2]).log()
    _, trace = vit(torch.randn(64, 3, 64, 96), policy)
    share = trace.shares()[1:].mean().item()
    assert share == pytest.approx(0.8, abs=0.02)  # 6144 draws: a standard deviation is 0.005
    quiet = SViT(CONFIG, embed_dim=24, depth=5).eval()
    quiet.load_state_dict(policy.state_dict())
    assert vit(torch.randn(1, 3, 64, 96), quiet)[1].shares()[1:].eq(1).all(), "arg-max takes the likelier side"


def test_dither_keeps_the_same_share_in_a_fixed_pattern_that_moves() -> None:
    vit, policy = ViT(VIT), built(dataclasses.replace(CONFIG, dither="grid")).eval()
    policy.begin()
    images = torch.randn(2, 3, 256, 384)
    keep = torch.stack(vit(images, policy)[1].keep[1:])  # (4, 2, 384)
    for share, target in zip(keep.double().mean((1, 2)).tolist(), policy.targets, strict=True):
        assert share == pytest.approx(target, abs=0.02)
    assert torch.equal(keep[:, 0], keep[:, 1]), "these gates know nothing of an image"
    assert torch.equal(keep, torch.stack(vit(images, policy)[1].keep[1:])), "no chance in it"
    assert keep.any(0).all(), "in some block each token takes part"
    rows = keep[0, 0].view(16, 24)
    assert rows[:8].double().mean().item() == pytest.approx(rows[8:].double().mean().item(), abs=0.03)
    for noisy in (True, False):
        fixed = built(dataclasses.replace(CONFIG, dither="grid" if noisy else None, static_shares=(0.5,) * 4)).eval()
        fixed.begin()
        chosen = vit(images[:1], fixed)[1].keep[1]
        assert chosen.double().mean() == 0.5
        if noisy:
            assert 0.4 < chosen[0, :192].double().mean() < 0.6, "static counts are spread over the image too"


SIMILAR = dataclasses.replace(CONFIG, dither="similarity", targets=(0.625, 0.375))  # whole numbers of 64 tokens


def test_by_similarity_gates_that_know_nothing_choose_as_spread_does() -> None:
    """And the same in training, which draws nothing."""
    vit, policy, images = ViT(VIT).eval(), built(SIMILAR), torch.randn(2, 3, 128, 128)
    policy.begin()
    plain = build_policy(SpreadConfig(first_block=1, shares=SIMILAR.targets, propagate=False), embed_dim=24, depth=5)
    chosen = vit(images, plain)[1].keep
    for training in (False, True):
        _, trace = vit(images, policy.train(training))
        for ours, spread in zip(trace.keep, chosen, strict=True):
            assert torch.equal(ours, spread)
        torch.testing.assert_close(trace.aux[2]["order"], trace.aux[1]["order"], atol=0, rtol=0)
        assert not torch.equal(trace.aux[3]["order"], trace.aux[2]["order"]), "where the target falls they are new"
        assert [("macs" in aux) for aux in trace.aux[:5]] == [False, True, False, True, False]


def test_by_similarity_a_gate_says_how_many_tokens_are_computed_and_learns() -> None:
    vit, policy, images = ViT(VIT), built(SIMILAR), torch.randn(2, 3, 128, 128)
    policy.begin()
    with torch.no_grad():
        policy.gates[0].get_parameter("fc2.bias").copy_(torch.tensor([-2.0, 2.0]))  # 0.018 of the tokens
    _, trace = vit(images, policy)
    assert trace.shares()[1].max() < 0.05 < trace.shares()[2].min()
    policy.loss(trace)["ratio"].backward()
    grad = policy.gates[0].get_parameter("fc2.bias").grad
    assert grad is not None and grad[0] < 0 < grad[1], "the loss opens it again"


def test_by_similarity_a_block_without_a_gate_is_no_hole() -> None:
    """Behind it similar tokens are looked for again, whether the target falls there or not."""
    vit, images = ViT(VIT).eval(), torch.randn(1, 3, 128, 128)
    for dense, looked in (((1,), [2, 3]), ((3,), [1, 4]), ((2, 4), [1, 3])):
        policy = built(dataclasses.replace(SIMILAR, dense_blocks=dense)).eval()
        _, trace = vit(images, policy)
        assert [i for i, aux in enumerate(trace.aux) if "macs" in aux] == looked
        assert all(trace.keep[i].all() for i in dense)


@pytest.mark.parametrize("training", [True, False])
def test_per_stage_a_choice_holds_until_the_target_changes(training: bool) -> None:
    vit, policy = ViT(VIT), decided(built(dataclasses.replace(CONFIG, per_stage=True))).train(training)
    assert len(policy.gates) == 2 and policy.ranges() == [BlockRange(1, 3), BlockRange(3, 5)]
    tokens = vit.embed(torch.randn(2, 3, 64, 96))
    trace = Trace.start(tokens)
    for start, stop in ((0, 2), (2, 5)):  # a piece of the loop begins in the middle of a stage
        tokens, trace = vit.run_blocks(tokens, policy, trace, start=start, stop=stop)
    first, second = trace.keep[1], trace.keep[3]
    assert torch.equal(trace.keep[2], first) and torch.equal(trace.keep[4], second) and not torch.equal(first, second)
    if training:
        errors = [(keep.double().mean() - target) ** 2 for keep, target in ((first, 0.6), (second, 0.4))]
        torch.testing.assert_close(policy.loss(trace)["ratio"].double(), 4 * torch.stack(errors).mean())


def test_per_stage_a_stage_is_left_alone_as_a_whole() -> None:
    policy = built(dataclasses.replace(CONFIG, per_stage=True))
    assert policy.without([3]) == dataclasses.replace(policy.config, dense_blocks=(3, 4))
    fixed = policy.made_static([1.0, 0.6, 0.6, 0.4, 0.4])
    assert isinstance(fixed, SViTConfig)
    assert fixed == dataclasses.replace(policy.config, static_shares=(0.6, 0.6, 0.4, 0.4))
    assert built(fixed).without([1]) == dataclasses.replace(fixed, static_shares=(1.0, 1.0, 0.4, 0.4))


def test_per_stage_blocks_of_one_gate_are_treated_alike() -> None:
    per_stage = dataclasses.replace(CONFIG, per_stage=True)
    for options in ({"dense_blocks": (3,)}, {"static_shares": (0.6, 0.5, 0.4, 0.4)}):
        refused("decides once for blocks", built, dataclasses.replace(per_stage, **options))
    fixed = built(per_stage).made_static([1.0, 0.6, 0.6, 0.4, 1.0])  # all tokens join in the last block
    assert isinstance(fixed, SViTConfig) and fixed.static_shares == (0.6, 0.6, 0.4, 0.4)


def test_the_json_of_versions_with_one_pattern_loads() -> None:
    for old, new in ((True, "grid"), (False, None), ("similarity", "similarity")):
        assert from_json(PolicyConfig, {"kind": "svit", "dither": old}) == SViTConfig(dither=new)


def test_gates_that_closed_are_named_to_who_trained_them() -> None:
    policy = built()
    assert policy.hint([1.0, 0.5, 0.6, 0.45, 0.4]) is None
    hint = policy.hint([1.0, 0.6, 0.0, 0.4, 0.9])
    assert hint is not None and "in blocks 2 (0% of 60%), 4 (90% of 40%):" in hint
    halved = built(dataclasses.replace(CONFIG, budgets=(0.4, 1.2), budget=0.5))
    assert halved.hint([1.0, 0.3, 0.3, 0.2, 0.2]) is None
    assert built(dataclasses.replace(CONFIG, dense_blocks=(2,))).hint([1.0] * 5) is None


def test_gumbel_gate_is_hard_with_a_soft_gradient() -> None:
    logits = torch.randn(2, 50, 2, requires_grad=True)
    gate = gumbel_gate(logits, temperature=1.0)
    torch.testing.assert_close(gate, gate.round(), atol=1e-6, rtol=0)
    gate.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(2, 50), atol=1e-6, rtol=0)
    assert (logits.grad[..., 0] > 0).all()


RANGE = dataclasses.replace(CONFIG, budgets=(0.5, 2.0))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("factor", "targets"), [(0.5, (0.3, 0.3, 0.2, 0.2)), (2.0, (1.0, 1.0, 0.8, 0.8))])
def test_the_drawn_budget_scales_the_targets_up_to_all_tokens(per_sample: bool, factor: float, targets: tuple) -> None:
    trace = trace_of(torch.full((4, 2, 10), 0.25))
    trace = dataclasses.replace(trace, aux=({"budget": torch.tensor([factor] * 2), **trace.aux[0]}, *trace.aux[1:]))
    got = built(dataclasses.replace(RANGE, per_sample=per_sample)).loss(trace)["ratio"]
    torch.testing.assert_close(got, 4 * (0.25 - torch.tensor(targets)).square().mean())


def test_a_pass_draws_one_budget_for_all_images_and_gates() -> None:
    vit, policy = ViT(VIT), built(RANGE).train()
    traces = [vit(torch.randn(3, 3, 64, 96), policy)[1] for _ in range(20)]
    assert all(["budget" in aux for aux in t.aux] == [False, True, False, False, False, False] for t in traces)
    drawn = torch.stack([trace.aux[1]["budget"] for trace in traces])  # (20, b)
    assert drawn.shape == (20, 3) and drawn.eq(drawn[:, :1]).all()
    assert 0.5 <= drawn.min() < 0.9 and 1.6 < drawn.max() <= 2
    assert not any("budget" in aux for aux in vit(torch.randn(1, 3, 64, 96), policy.eval())[1].aux)


def test_gates_without_a_budget_are_the_same_with_one_at_the_start() -> None:
    vit, plain = ViT(VIT), decided(built().eval())
    images = torch.randn(2, 3, 64, 96)
    for budget in (0.5, 1.0, 2.0):
        policy = SViT(dataclasses.replace(RANGE, budget=budget), embed_dim=24, depth=5).eval()
        missing, unexpected = policy.load_state_dict(plain.state_dict(), strict=False)
        assert set(missing) == {f"gates.{i}.budget" for i in range(4)} and not unexpected
        assert torch.equal(vit(images, policy)[0].x, vit(images, plain)[0].x)
    assert not any("budget" in name for name, _ in plain.named_parameters())


def test_gates_learn_to_keep_as_many_tokens_as_the_budget_says() -> None:
    vit = ViT(VIT)
    for parameter in vit.parameters():
        parameter.requires_grad_(False)
    config = SViTConfig(first_block=1, targets=(0.5,), noise=0.0, budgets=(0.4, 1.6))
    policy = built(config).train()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    images = torch.randn(4, 3, 64, 96)
    for _ in range(60):
        optimizer.zero_grad()
        policy.loss(vit(images, policy)[1])["ratio"].backward()
        optimizer.step()
    shares = []
    for budget in (0.4, 1.0, 1.6):
        point = SViT(dataclasses.replace(config, budget=budget), embed_dim=24, depth=5).eval()
        point.load_state_dict(policy.state_dict())
        shares.append(vit(images, point)[1].shares()[1:].mean().item())
    assert shares[0] < shares[1] - 0.1 and shares[1] < shares[2] - 0.1, shares


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": (1.2, 0.5)}, r"two rising factors.*not \(1\.2, 0\.5\)"),
        ({"budgets": (0.0, 1.0)}, "budgets is 0.0"),
        ({"budgets": (1.0, 1.0)}, "two rising factors"),
        ({"budgets": (0.5, float("inf"))}, "budgets is inf"),
        ({"budgets": (0.3, 0.8)}, r"budget 1\.0 is not in the range of budgets, 0\.3 to 0\.8"),
        ({"budgets": (0.5, 1.2), "budget": 1.3}, "not in the range"),
        ({"budget": 0.7}, "needs gates that were trained for a range"),
        ({"preserve": False}, "reactivate=False"),
        ({"dither": "grid", "sample": True}, "takes the place of sample"),
        ({"dither": "grid", "noise": 0.0}, "needs noise above 0"),
        ({"targets": (1.2,)}, r"targets is 1\.2"),
        ({"first_block": 5}, "blocks 0 to 4"),
    ],
)
def test_gates_that_there_cannot_be(changes: dict, words: str) -> None:
    refused(words, lambda: built(dataclasses.replace(CONFIG, **changes)))
