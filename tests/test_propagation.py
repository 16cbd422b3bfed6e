"""Propagation: what a token that is left out gets, and what gates learn from it."""

from dataclasses import replace

import pytest
import torch

from sievit.config import from_json
from sievit.policies import (
    DynamicViTConfig,
    EvoViTConfig,
    KeepAllConfig,
    PolicyConfig,
    RandomConfig,
    SpreadConfig,
    SViTConfig,
    ToMeConfig,
)
from sievit.policies.merging import covering
from sievit.policies.reuse import Reuse, ReuseConfig
from sievit.policies.selection import counted
from sievit.tokens import Tokens
from sievit.vit import Execution, ViT, ViTConfig
from sievit.vit.propagation import propagated, with_source
from tiny import refused

VIT = ViTConfig(grid=(4, 6), patch_size=4, embed_dim=24, depth=4, num_heads=3)


def canvas() -> Tokens:
    """A prefix token and four tokens: the first and the second are alike, and so are the third and the fourth."""
    x = torch.tensor([[[9.0, 9.0], [2.0, 0.0], [1.0, 0.1], [0.0, 3.0], [0.2, 1.0]]], dtype=torch.float64)
    return Tokens(x, (2, 2), num_prefix=1)


def moved(tokens: Tokens, update: list[list[float]]) -> Tokens:
    return replace(tokens, x=tokens.x + torch.tensor([[[1.0, 1.0], *update]], dtype=torch.float64))


def test_a_token_that_is_left_out_gets_the_update_of_the_most_similar_one() -> None:
    before, notes = with_source(canvas().select(torch.tensor([[True, False, True, False]])), {})
    sizes = before.sizes()
    assert sizes is not None and sizes.tolist() == [[2, 0, 2, 0]], "in the attention it counts for the two"
    after = propagated(before, before, moved(before, [[0.5, 0.25], [0, 0], [0, -2], [0, 0]]))
    expected = [[10, 10], [2.5, 0.25], [1.5, 0.35], [0, 1], [0.2, -1]]
    torch.testing.assert_close(after.x[0], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    assert notes["propagation"].tolist() == [2 * 2 * 2], "two left out, two computed, two channels"


def test_a_token_is_computed_as_the_mean_of_those_that_follow_it_and_each_keeps_its_own_features() -> None:
    whole, _ = with_source(canvas().select(torch.tensor([[True, False, True, False]])), {})
    before = whole.averaged()
    expected = [[9, 9], [1.5, 0.05], [1, 0.1], [0.1, 2], [0.2, 1]]
    torch.testing.assert_close(before.x[0], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    after = propagated(whole, before, moved(before, [[0.5, 0.25], [0, 0], [0, -2], [0, 0]]))
    expected = [[10, 10], [2.5, 0.25], [1.5, 0.35], [0, 1], [0.2, -1]]
    torch.testing.assert_close(after.x[0], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_spread_keeps_one_token_of_each_pair() -> None:
    """Round by round 1, 1 and 2 tokens leave: of equal ones the first of a set."""
    directions = torch.eye(4, dtype=torch.float64).repeat_interleave(2, 0)
    scale = torch.arange(1.0, 9.0, dtype=torch.float64)[:, None]  # cosines do not see it
    order = covering(Tokens((scale * directions)[None], (2, 4)), 0.5)
    assert order[0, [0, 3, 4, 6]].tolist() == [7.5 / 8, 6.5 / 8, 5.5 / 8, 4.5 / 8]
    assert (order[0, [1, 2, 5, 7]] < 0.5).all()


def test_spread_of_the_version_with_a_pattern_loads() -> None:
    assert from_json(PolicyConfig, {"kind": "spread", "even": 0.5, "shares": [0.6]}) == SpreadConfig(shares=(0.6,))


def test_a_count_is_a_whole_number_of_what_the_share_is_of() -> None:
    for total, share, multiple, count in ((10, 0.7, 1, 7), (3, 2 / 3, 1, 2), (80, 0.6, 1, 48), (10, 0.71, 4, 8)):
        assert counted(total, share, multiple) == count
    assert counted(torch.tensor([1024, 7]), 0.343).tolist() == [352, 3]
    assert counted(torch.tensor(21_000, dtype=torch.int32), 0.9999) == 20_998  # as runtimes of 32 bits count


def test_without_a_choice_without_a_token_and_for_merged_tokens_there_is_no_source() -> None:
    merged = canvas().merge(torch.tensor([[0, 0, 2, 2]]))
    for tokens in (canvas(), canvas().select(torch.zeros(1, 4, dtype=torch.bool)), merged):
        same, notes = with_source(tokens, {})
        assert same is tokens and not notes


def test_padding_neither_gives_nor_gets_an_update() -> None:
    tokens = replace(canvas(), valid=torch.tensor([[True, True, True, False]]))
    before, notes = with_source(tokens.select(torch.tensor([[True, False, False, True]])), {})
    after = propagated(before, before, moved(before, [[1, 1], [0, 0], [0, 0], [0, 0]]))
    assert after.patches[0].tolist() == [[3, 1], [2, 1.1], [1, 4], [0.2, 1]]
    assert notes["propagation"].tolist() == [1 * 2 * 2]


def test_gates_learn_by_the_difference_to_what_a_token_would_get_otherwise() -> None:
    """Of the tokens that take part, one whose most similar one has the same update could as well be left out."""
    gate = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    before, _ = with_source(canvas().select(torch.ones(1, 4, dtype=torch.bool), gate), {})
    update = torch.tensor([[[0.0, 0.0], [1, 0], [1, 0], [0, 1], [0, 3]]], dtype=torch.float64)
    m = before.with_prefix(gate, value=1.0)[..., None]
    after = propagated(before, before, replace(before, x=before.x + m * update))
    torch.testing.assert_close(after.x, before.x + update)
    (gradient,) = torch.autograd.grad(after.patches[0, [1, 3]].sum(), gate)
    assert gradient[0].tolist() == [0, 0, 0, 2], "1 - 1 for the second token, 3 - 1 for the fourth"


@pytest.mark.parametrize("config", [RandomConfig(first_block=1), SViTConfig(first_block=1, dither="grid")])
def test_of_equal_images_the_update_makes_up_for_all_that_is_left_out(config: PolicyConfig) -> None:
    """A picture of one colour, without positions: all tokens are equal, and one that is computed tells all of them."""
    torch.manual_seed(0)
    vit = ViT(VIT).eval()
    assert vit.pos_embed is not None
    torch.nn.init.zeros_(vit.pos_embed)
    images = torch.full((1, 3, 16, 24), 0.3)
    expected, _ = vit(images, vit.build_policy(KeepAllConfig()))
    policy = vit.build_policy(replace(config, propagate=True))
    policy.begin()
    got, trace = vit(images, policy.eval())
    assert all(0 < share < 1 for share in trace.shares()[1:, 0].tolist())
    torch.testing.assert_close(got.x, expected.x, atol=1e-5, rtol=1e-5)
    behind, _ = vit(images, vit.build_policy(config).eval())
    assert (behind.x - expected.x).abs().max() > 0.01, "without it they stay behind"


def test_selected_and_masked_gates_give_the_same() -> None:
    torch.manual_seed(0)
    vit, images = ViT(VIT), torch.randn(2, 3, 16, 24)
    results = []
    for mode in ("masked", "selected"):
        torch.manual_seed(1)
        policy = vit.build_policy(SViTConfig(first_block=1, propagate=True)).train()
        results.append(vit(images, policy, execution=Execution(mode))[0].x)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_gates_of_tokens_that_were_not_computed_learn_nothing() -> None:
    """What such a token would get by itself is not known; its own update must not count as none."""
    gate = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    before, _ = with_source(canvas().select(torch.tensor([[True, False, True, False]]), gate), {})
    after = propagated(before, before, moved(before, [[1, 0], [0, 0], [0, 1], [0, 0]]), selected=True)
    (gradient,) = torch.autograd.grad(after.patches.sum(), gate)
    assert gradient[0].tolist() == [-1, 0, -1, 0], "each of the others has the update of its most similar one instead"


def test_policies_that_it_does_not_go_with() -> None:
    for config in (ToMeConfig(propagate=True), EvoViTConfig(propagate=True)):
        refused("does not go with propagate", ViT(VIT).build_policy, config)
    refused("set preserve=True", DynamicViTConfig, propagate=True)
    refused(
        "propagate=False",
        lambda: ViT(VIT).build_policy(SViTConfig(1, preserve=False, reactivate=False, propagate=True)),
    )
    inner = ViT(VIT).build_policy(RandomConfig(first_block=1, propagate=True))
    refused("reuse over frames", lambda: Reuse(ReuseConfig(), inner, None))
