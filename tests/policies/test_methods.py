"""The methods that others published, each on an example that is worked out by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from sievit.policies import (
    ALGMConfig,
    ATSConfig,
    CroprConfig,
    DynamicViTConfig,
    EViTConfig,
    EvoViTConfig,
    ExpeditConfig,
    Policy,
    PolicyConfig,
    ToMeConfig,
    build_policy,
)
from sievit.policies.ats import sampled
from sievit.policies.cropr import Scorer
from sievit.policies.dynamicvit import Predictor
from sievit.policies.expedit import pooled, rebuilt
from sievit.tokens import Tokens, Trace
from sievit.vit import ViT, ViTConfig
from tiny import Seen, refused

DEPTH = 4


def canvas(values: Sequence[Sequence[float]], grid: tuple[int, int], prefix: int = 1) -> Tokens:
    """One image in float64, whose prefix tokens are zero."""
    x = torch.tensor(values, dtype=torch.float64)
    return Tokens(torch.cat([x.new_zeros(prefix, x.shape[1]), x])[None], grid, num_prefix=prefix)


def built(config: PolicyConfig, dim: int = 2, **parts: object) -> Policy:
    torch.manual_seed(0)
    return build_policy(config, embed_dim=dim, depth=DEPTH, **parts).double().eval()


def kept(tokens: Tokens) -> list[int]:
    assert tokens.keep is not None
    return tokens.keep[0].nonzero()[:, 0].tolist()


def test_evit_keeps_the_attentive_tokens_and_fuses_the_others() -> None:
    tokens = canvas([[1, 0], [2, 0], [3, 0], [4, 0]], (2, 2)).select(None)
    policy = built(EViTConfig(first_block=1, shares=(0.5,), preserve=True))
    seen = Seen(attention=torch.tensor([[0.1, 0.4, 0.3, 0.2]], dtype=torch.float64))
    assert [policy.decides_inside(i) for i in range(DEPTH)] == [False, True, False, False]
    chosen, notes = policy.inside_block(1, tokens, Trace.start(tokens), seen)
    assert kept(chosen) == [1, 2]
    # the tokens of attention 0.1 and 0.2 become (0.1 * 1 + 0.2 * 4) / 0.3 = 3
    assert chosen.extra[0].tolist() == [[pytest.approx(3.0), 0.0]] and chosen.num_prefix == 2
    assert notes["macs"].item() == (4 + 1) * 2
    dropped, _ = built(EViTConfig(first_block=1, shares=(0.5,))).inside_block(1, tokens, Trace.start(tokens), seen)
    assert dropped.patches[0].tolist() == [[0, 0], [2, 0], [3, 0], [0, 0]]


def test_evo_vit_adds_to_the_rest_what_the_block_added_to_its_representative() -> None:
    tokens = canvas([[1, 0], [2, 0], [3, 0], [4, 0]], (2, 2)).select(None)
    policy = built(EvoViTConfig(first_block=1, shares=(0.5,)))
    attention = torch.tensor([[0.4, 0.1, 0.2, 0.3]], dtype=torch.float64)
    trace = Trace.start(tokens).record(tokens, {}, [False])
    tokens, notes = policy.inside_block(0, tokens, trace, Seen(attention=attention))
    torch.testing.assert_close(notes["scores"], attention)  # nothing was there before: the first block's own
    trace = trace.record(tokens, notes, [True])
    chosen, notes = policy.before_block(1, tokens, trace)
    assert kept(chosen) == [0, 3]
    # the others, 2 and 3, are represented by (0.1 * 2 + 0.2 * 3) / 0.3 = 8 / 3
    torch.testing.assert_close(chosen.extra[0, 0, 0].item(), 8 / 3)
    trace = trace.record(chosen, notes, [False])
    new = torch.tensor([[0.2, 0.0, 0.0, 0.5]], dtype=torch.float64)
    chosen, more = policy.inside_block(1, chosen, trace, Seen(attention=new))
    # tokens that were computed have half of the old and half of the new score, the others the old one
    torch.testing.assert_close(more["scores"], torch.tensor([[0.3, 0.1, 0.2, 0.4]], dtype=torch.float64))
    trace = trace.record(chosen, more, [True])
    computed = chosen.x.clone()
    computed[:, 1] += torch.tensor([1.0, -1.0], dtype=torch.float64)  # what the block does to the representative
    after = policy.after_piece(replace(chosen, x=computed), trace)
    assert after.num_extra == 0
    assert after.patches[0].tolist() == [[1, 0], [3, -1], [4, -1], [4, 0]]


def test_ats_samples_where_the_cumulative_significance_reaches_fixed_quantiles() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    # cumulative: 0.1, 0.3, 0.6, 1; of four samples at 1/8, 3/8, 5/8, 7/8 the last two fall on the last token
    assert sampled(scores, torch.tensor([4]))[0].tolist() == [False, True, True, True]
    assert sampled(scores, torch.tensor([1]))[0].tolist() == [False, False, True, False]
    assert sampled(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([3]))[0].tolist() == [False, True, False]

    policy = built(ATSConfig(first_block=1, shares=(1.0, 0.75, 0.75), preserve=True))
    assert [policy.decides_inside(i) for i in range(DEPTH)] == [False, False, True, True]
    tokens = canvas([[1, 0], [2, 0], [3, 0], [4, 0]], (2, 2))
    tokens = tokens.select(torch.tensor([[True, False, True, True]]))
    seen = Seen(
        attention=torch.tensor([[0.5, 0.1, 0.2, 0.2]], dtype=torch.float64),
        norms=torch.tensor([[1.0, 9.0, 1.0, 2.0]], dtype=torch.float64),
    )
    # of those that are left 0.5, 0.2, 0.4: cumulative 5/11, 7/11, 1; three samples at 1/6, 1/2, 5/6
    chosen, notes = policy.inside_block(2, tokens, Trace.start(tokens), seen)
    torch.testing.assert_close(notes["scores"], torch.tensor([[0.5, 0.0, 0.2, 0.4]], dtype=torch.float64))
    assert kept(chosen) == [0, 2, 3]


def test_tome_merges_the_most_similar_pairs_and_counts_what_a_token_stands_for() -> None:
    tokens = canvas([[1, 0], [3, 0], [5, 0], [9, 0]], (2, 2)).select(None)
    policy = built(ToMeConfig(share=0.25), num_heads=1)
    keys = torch.tensor([[[1, 0.1], [1, 0], [0, 1], [1, 1]]], dtype=torch.float64)
    # the first set are tokens 0 and 2, the second 1 and 3: 0 is most like 1 (0.995), 2 is most like 3 (0.71)
    merged, notes = policy.inside_block(0, tokens, Trace.start(tokens), Seen(keys=keys))
    assert notes["owner"][0].tolist() == [1, 1, 2, 3] and kept(merged) == [1, 2, 3]
    assert merged.patches[0, 1].tolist() == [2, 0], "the mean of 1 and 3"
    sizes = merged.sizes()
    assert sizes is not None and sizes[0].tolist() == [0, 2, 1, 1]
    # of those that are left 1 and 3 are the first set, 2 the second; now 3 is like 2, and 1 is not
    keys = torch.tensor([[[0, 0], [1, 0], [0.1, 1], [0, 1]]], dtype=torch.float64)
    merged, notes = policy.inside_block(1, merged, Trace.start(tokens), Seen(keys=keys))
    assert notes["owner"][0].tolist() == [1, 1, 2, 2] and kept(merged) == [1, 2]
    assert merged.patches[0, 2].tolist() == [7, 0]
    assert policy.after_piece(merged, Trace.start(tokens)).patches[0].tolist() == [[2, 0], [2, 0], [7, 0], [7, 0]]


def test_algm_merges_windows_first_and_pairs_anywhere_later() -> None:
    values = [[1, 0], [1, 0.1], [0, 1], [1, 0], [1, -0.1], [1, 0], [1, 0], [0, 1]]
    tokens = canvas(values, (2, 4)).select(None)
    policy = built(ALGMConfig(local_block=0, global_block=2, threshold=0.9))
    assert [policy.decides_inside(i) for i in range(DEPTH)] == [True, False, True, False]
    # the left window has the directions 0, 6, -6 and 0 degrees; in the right one two are at 90
    merged, notes = policy.inside_block(0, tokens, Trace.start(tokens), Seen())
    assert notes["owner"][0].tolist() == [0, 0, 2, 3, 0, 0, 6, 7]
    torch.testing.assert_close(merged.patches[0, 0], torch.tensor([1.0, 0.0], dtype=torch.float64))
    # left are 0, 2, 3, 6, 7: the first set 0, 3, 7, the second 2, 6; 0 and 3 are like 6, 7 is like 2
    merged, notes = policy.inside_block(2, merged, Trace.start(tokens), Seen())
    assert notes["owner"][0].tolist() == [6, 6, 2, 6, 6, 6, 6, 2] and kept(merged) == [2, 6]


def test_expedit_computes_centres_and_rebuilds_tokens_from_the_nearest() -> None:
    values = [[0, 0], [0, 1], [8, 0], [8, 1]]
    tokens = canvas(values, (1, 4)).select(None)
    config = ExpeditConfig(first_block=1, side=0.5, neighbours=3, rounds=1, temperature=0.01, nearest=1)
    policy = built(config)
    chosen, notes = policy.before_block(1, tokens, Trace.start(tokens))
    # two cells of two tokens, in the places of their first ones; the weights are nearly zero and one
    assert kept(chosen) == [0, 2]
    expected = torch.tensor([[0.0, 0.5], [8.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(chosen.patches[0, [0, 2]], expected)
    assert notes["nearest"][0].tolist() == [[0], [0], [1], [1]]
    trace = Trace.start(tokens).record(tokens, {}, [False, True]).record(chosen, notes, [False, True])
    moved = chosen.patches.clone()
    moved[0, 0] += 1
    whole = policy.after_piece(chosen.replace_patches(moved), trace)
    torch.testing.assert_close(whole.patches[0], torch.stack([expected[0] + 1] * 2 + [expected[1]] * 2))
    # what an adapter adds between two pieces moves the centres
    again, _ = policy.before_block(2, whole.replace_patches(whole.patches + 10), trace)
    torch.testing.assert_close(again.patches[0, [0, 2]], torch.stack([expected[0] + 11, expected[1] + 10]))

    centres = torch.tensor([[[0.0], [3.0], [6.0]]])
    weights = torch.tensor([[[0.25, 0.75]]])
    assert rebuilt(centres, torch.tensor([[[2, 0]]]), weights).item() == pytest.approx(1.5)
    owner, valid = torch.tensor([[0, 0, 1]]), torch.tensor([[True, False, True]])
    assert pooled(torch.tensor([[[2.0], [4.0], [6.0]]]), owner, valid, 3)[0, :, 0].tolist() == [2, 6, 0]


def test_dynamicvit_gives_each_token_the_mean_of_those_that_are_left() -> None:
    predictor = Predictor(4).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    some = predictor(x, torch.tensor([[1.0, 0.0, 1.0]]))
    torch.testing.assert_close(some[:, [0, 2]], predictor(x[:, [0, 2]], torch.ones(1, 2)))
    local = predictor.local(x)
    mean = (local[:, 0, 2:] + local[:, 2, 2:]) / 2
    torch.testing.assert_close(some[0, 1], predictor.score(torch.cat([local[0, 1, :2], mean[0]])))
    assert predictor.per_token == 4 * 4 + 4 * 2 + 2 * 1 + 1 * 2


def test_dynamicvit_holds_every_image_to_its_shares_and_the_tokens_to_the_dense_ones() -> None:
    policy = built(DynamicViTConfig(first_block=1, shares=(0.5, 0.25, 0.25)), dim=4)
    assert policy.needs_teacher and not built(DynamicViTConfig(first_block=1, distill_weight=0), dim=4).needs_teacher
    tokens = canvas([[1, 0], [2, 0], [3, 0], [4, 0]], (2, 2))
    first, second = torch.tensor([[1.0, 1, 1, 0]]), torch.tensor([[1.0, 0, 0, 0]])
    trace = replace(Trace.start(tokens), aux=({"gate": first}, {"gate": second}), tokens=tokens)
    teacher = replace(trace, tokens=tokens.replace_patches(tokens.patches + 2))
    losses = policy.loss(trace, teacher=teacher)
    # shares of 3/4 and 1/4 for 1/2 and 1/4; and the one token that is left is 2 away in both channels
    assert losses["ratio"].item() == pytest.approx(2 * (0.25**2 + 0) / 2)
    assert losses["distill"].item() == pytest.approx(0.5 * 4)


def test_dynamicvit_drops_in_stages_and_never_brings_back() -> None:
    torch.manual_seed(0)
    vit = ViT(ViTConfig(grid=(4, 6), embed_dim=24, depth=DEPTH, num_heads=2)).eval()
    policy = vit.build_policy(DynamicViTConfig(first_block=1, shares=(0.5, 0.25, 0.25))).eval()
    canvases = vit.embed(torch.randn(2, 3, 64, 96))
    after, trace = vit.run_blocks(canvases, policy, Trace.start(canvases))
    assert trace.counts()[:, 0].tolist() == [24, 12, 6, 6]
    assert not (trace.keep[2] & ~trace.keep[1]).any()
    assert not after.patches[~trace.keep[-1]].any(), "features of dropped tokens are zero"
    policy.train()
    _, trace = vit(torch.randn(2, 3, 64, 96), policy)
    gates = [aux["gate"] for aux in trace.aux if "gate" in aux]
    assert len(gates) == 2 and not ((gates[1] > 0.5) & (gates[0] < 0.5)).any()


def test_cropr_learns_by_the_attention_of_its_queries_and_teaches_the_backbone_nothing() -> None:
    scorer = Scorer(4, queries=2, labels=3).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    products, values = scorer(x)
    real = torch.tensor([[True, True, True, True, False]])
    seen = (products[:, :, :4] / math.sqrt(4)).softmax(2).double() @ scorer.norm(x[:, :4])
    torch.testing.assert_close(
        scorer.labels_of(products, values, real), scorer.head((seen + scorer.mlp(seen)).mean(1)), atol=1e-6, rtol=1e-6
    )

    vit = ViT(ViTConfig(grid=(4, 6), embed_dim=24, depth=DEPTH, num_heads=2)).train()
    policy = vit.build_policy(CroprConfig(first_block=1, shares=(0.5, 0.25), labels=4)).train()
    _, trace = vit(torch.randn(2, 3, 64, 96), policy)
    assert trace.counts()[:, 0].tolist() == [24, 12, 12, 24], "all tokens are back in the last block"
    targets = [{"labels": torch.tensor([[0, 2], [255, 2]])}, {"labels": torch.tensor([9, -1])}]
    losses = policy.loss(trace, targets=targets)
    logits = [aux["labels"] for aux in trace.aux if "labels" in aux]
    there = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]])
    expected = sum(torch.nn.functional.binary_cross_entropy_with_logits(each.float(), there) for each in logits)
    torch.testing.assert_close(losses["labels"], expected)
    losses["labels"].backward()
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert not policy.loss(trace), "without targets there is nothing to learn"


@pytest.mark.parametrize("config", [EViTConfig, DynamicViTConfig, ATSConfig])
def test_what_is_gone_cannot_come_back(config: type[PolicyConfig]) -> None:
    refused("set preserve=True", config, rejoin=True)
    refused("shares are falling", config, shares=(0.5, 0.7))


def test_a_stage_that_is_left_alone_leaves_the_tokens_of_the_stage_before() -> None:
    policy = built(EViTConfig(first_block=1, shares=(0.7, 0.5, 0.3)))
    assert [(run.start, run.stop) for run in policy.ranges()] == [(1, 4), (2, 4), (3, 4)]
    assert policy.without([2]) == EViTConfig(first_block=1, shares=(0.7, 0.7, 0.3))
    assert policy.without([1, 3]) == EViTConfig(first_block=1, shares=(1.0, 0.5, 0.5))
