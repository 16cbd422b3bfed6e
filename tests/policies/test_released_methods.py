"""The methods that others published, against what their released code gives (recorded by scripts/record_methods.py).

Where it gives something else than here, the test says what.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sievit.convert import from_timm
from sievit.policies import (
    ALGMConfig,
    ATSConfig,
    DynamicViTConfig,
    EViTConfig,
    ExpeditConfig,
    Policy,
    PolicyConfig,
    build_policy,
)
from sievit.policies.cropr import Scorer
from sievit.policies.dynamicvit import DynamicViT
from sievit.policies.expedit import pooled, squared_distances
from sievit.policies.selection import fused
from sievit.tokens import Tokens, Trace
from sievit.vit import ViT
from tiny import Seen

timm = pytest.importorskip("timm")
CODE = Path(__file__).parent / "released"


def recorded(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the code was given and gave, and its weights."""
    found, prefix = load_file(CODE / f"{name}.safetensors"), "weights."
    weights = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    return {key: value for key, value in found.items() if not key.startswith(prefix)}, weights


def backbone(weights: dict[str, Tensor]) -> ViT:
    sizes = {"img_size": 28, "patch_size": 2, "embed_dim": 8, "depth": 4, "num_heads": 2, "num_classes": 0}
    model = timm.models.VisionTransformer(**sizes)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return from_timm(model).eval()


def answer(vit: ViT, policy: Policy, images: Tensor) -> tuple[Tensor, Trace]:
    """The class token behind all blocks, and the trace."""
    with torch.inference_mode():
        after, trace = vit(images, policy)
    return after.x[:, 0], trace


def places(trace: Trace, index: int) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in trace.keep[index]]


def built(config: PolicyConfig) -> Policy:
    return build_policy(config, embed_dim=8, depth=4, num_heads=2).eval()


def test_dynamicvit_is_the_released_one() -> None:
    given, weights = recorded("dynamicvit")
    vit = backbone(weights)
    policy = vit.build_policy(DynamicViTConfig(first_block=1, shares=(0.5, 0.5, 0.25))).eval()
    assert isinstance(policy, DynamicViT)
    for stage, predictor in enumerate(policy.predictors):
        own = {name.replace("local", "in_conv").replace("score", "out_conv"): name for name in predictor.state_dict()}
        state = {name: weights[f"score_predictor.{stage}.{other}"] for other, name in own.items()}
        predictor.load_state_dict(state)
    found, trace = answer(vit, policy, given["images"])
    torch.testing.assert_close(found, given["class_token"], atol=1e-5, rtol=1e-5)
    best = given["scores"][..., 0].argsort(1, descending=True)[:, :98].sort(1).values
    assert places(trace, 1) == best.tolist()
    assert trace.counts()[:, 0].tolist() == [197, 99, 99, 50], "with the class token"


def test_evit_is_the_released_one_but_for_the_scale_of_the_fused_token() -> None:
    given, weights = recorded("evit")
    vit = backbone(weights)
    policy = vit.build_policy(EViTConfig(first_block=1, shares=(0.5, 0.5, 0.25), fuse=False)).eval()
    found, trace = answer(vit, policy, given["images"])
    torch.testing.assert_close(found, given["class_token"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trace.aux[1]["scores"], given["attention"])
    assert places(trace, 2) == given["chosen"].sort(1).values.tolist()

    tokens = Tokens(given["tokens"], (14, 14)).select(None)
    stage = built(EViTConfig(first_block=1, shares=(0.5,)))
    chosen, _ = stage.inside_block(1, tokens, Trace.start(tokens), Seen(attention=given["attention"]))
    assert chosen.keep is not None
    weight = (given["attention"] * ~chosen.keep).sum(1, keepdim=True)
    torch.testing.assert_close(chosen.extra[:, 0] * weight, given["fused"])


def test_evo_vit_represents_tokens_as_the_released_one() -> None:
    given, _ = recorded("evo_vit")
    found = fused(Tokens(given["tokens"], (2, 3)), torch.ones(2, 6, dtype=torch.bool), given["scores"])
    torch.testing.assert_close(found, given["representative"])


def test_ats_finds_tokens_as_significant_as_the_released_one() -> None:
    given, _ = recorded("ats")
    tokens = Tokens(given["values"].transpose(1, 2).flatten(2)[:, 1:], (4, 4)).select(None)
    seen = Seen(attention=given["attention"][:, :, 0, 1:].mean(1), norms=tokens.patches.norm(dim=2))
    _, notes = built(ATSConfig(first_block=0, shares=(0.5,))).inside_block(0, tokens, Trace.start(tokens), seen)
    torch.testing.assert_close(F.normalize(notes["scores"], p=1, dim=1), given["scores"])


def test_algm_merges_what_the_released_one_does() -> None:
    given, _ = recorded("algm")
    tokens = Tokens(given["tokens"], (6, 6)).select(None)
    for index, threshold, name in ((0, 0.7, "window"), (1, given["threshold"].item(), "pair")):
        policy = built(ALGMConfig(local_block=0, global_block=1, threshold=threshold))
        merged, _ = policy.inside_block(index, tokens, Trace.start(tokens), Seen())
        sizes = merged.sizes()
        assert merged.keep is not None and sizes is not None and sizes.max() > 1
        own = torch.cat([merged.patches[merged.keep], sizes[merged.keep][:, None]], 1)
        other = torch.cat([given[f"{name}s"][0], given[f"{name}_sizes"][0]], 1)
        torch.testing.assert_close(own[own[:, 0].argsort()], other[other[:, 0].argsort()])


def test_cropr_scores_tokens_as_the_released_one() -> None:
    given, weights = recorded("cropr")
    scorer = Scorer(8, queries=3, labels=2)
    names = {"norm": "attn_norm", "key": "k"}
    state = {f"{own}.{part}": weights[f"{of}.{part}"] for own, of in names.items() for part in ("weight", "bias")}
    scorer.load_state_dict({"queries": weights["queries"][0], **state}, strict=False)
    scorer.norm.eps = 1e-6
    with torch.inference_mode():
        products, _ = scorer(given["tokens"])
    torch.testing.assert_close(products.sum(1), given["scores"], atol=1e-5, rtol=1e-5)


def test_expedit_finds_the_centres_of_the_released_one_at_the_same_temperature() -> None:
    """The released one is an inverse and of the distances themselves, here it is relative to their mean."""
    given, _ = recorded("expedit")
    tokens = Tokens(given["tokens"], (6, 6)).select(None)
    rows = torch.arange(6)
    cell = ((rows // 2)[:, None] * 3 + rows // 2).flatten()
    start = pooled(tokens.patches, cell[None], tokens.valid_or_all(), 9)
    far = (cell[:, None] // 3 - torch.arange(9) // 3).abs().maximum((cell[:, None] % 3 - torch.arange(9) % 3).abs()) > 1
    mean = squared_distances(tokens.patches, start)[0][~far].mean().item()
    policy = built(ExpeditConfig(first_block=1, side=0.5, neighbours=3, rounds=1, temperature=1 / (0.2 * mean)))
    chosen, _ = policy.before_block(1, tokens, Trace.start(tokens))
    assert chosen.keep is not None
    torch.testing.assert_close(chosen.patches[chosen.keep], given["centres"][0], atol=1e-5, rtol=1e-5)
