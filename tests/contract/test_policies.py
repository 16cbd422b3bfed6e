"""What every registered policy has to do; DESIGN calls it the price of a new file."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from sievit.config import from_json, to_json
from sievit.heads import ATMConfig, build_head
from sievit.measure.flops import blocks_gflops
from sievit.policies import KeepAllConfig, Policy, PolicyConfig, build_policy, policies
from sievit.tokens import Tokens, Trace
from sievit.vit import Execution, ViT, ViTConfig

GRID = (5, 7)
DEPTH = 6


OPTIONS: dict[str, dict[str, Any]] = {
    "svit static": {"static_shares": (0.6, 0.3, 1.0, 0.5), "multiple": 4},
    "svit dense blocks": {"dense_blocks": (3, 5)},
    "svit threshold": {"threshold": 0.1},
    "svit budgets": {"budgets": (0.5, 1.5), "budget": 0.7},
    "dtop static": {"static_left": (0.4, 0.6), "multiple": 2},
    "dtop static rejoin": {"static_left": (0.0, 0.5), "rejoin": True},
    "dtop preserve": {"preserve": True},
    "dtop rejoin": {"rejoin": True},
    "dtop entropy": {"grade": "entropy", "thresholds": (0.2,)},
    "dtop margin": {"grade": "margin", "thresholds": (0.2,)},
}
"""Options of a policy that change which tokens take part or what they see."""


def configured(name: str) -> PolicyConfig:
    """The policy with settings that leave tokens out on the tiny backbone."""
    cls = policies()[name.split()[0]]
    names = {field.name for field in dataclasses.fields(cls)}
    wanted = {"first_block": 2, "shares": (0.6, 0.4), "targets": (0.6, 0.4), "thresholds": (0.5,), "keep_per_class": 1}
    wanted |= OPTIONS.get(name, {})
    return cls(**{key: value for key, value in wanted.items() if key in names})


def built(name: str, vit: ViT) -> Policy:
    """The policy, with heads behind some blocks and the backbone's attention for those that ask."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = ATMConfig(channels=16, num_heads=2, num_layers=2)
        heads = {block: build_head(config, embed_dim=24, num_classes=4).eval() for block in (1, 3, DEPTH - 1)}
        for head in heads.values():
            for key, parameter in head.named_parameters():  # so that scores spread over 0 to 1
                if parameter.ndim == 2:
                    torch.nn.init.normal_(
                        parameter, std=(3 if "cross_attn.q" in key else 1) * parameter.shape[1] ** -0.5
                    )
                elif key == "class_embed.bias":
                    parameter.data[0] += 2
    return build_policy(configured(name), embed_dim=24, depth=DEPTH, heads=heads, project=vit.project)


@pytest.fixture(params=sorted([*policies(), *OPTIONS]))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    vit = ViT(ViTConfig(grid=GRID, patch_size=4, embed_dim=24, depth=DEPTH, num_heads=3, class_token=True))
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit.eval()


@pytest.fixture
def policy(name: str, vit: ViT) -> Policy:
    torch.manual_seed(1)
    return built(name, vit).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, GRID[0] * 4, GRID[1] * 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def dense() -> Policy:
    return build_policy(KeepAllConfig(), embed_dim=24, depth=DEPTH)


class Forced(Policy):
    """A policy whose choice is replaced; everything else is its own."""

    def __init__(self, policy: Policy, keep: bool) -> None:
        super().__init__()
        self.policy, self.keep = policy, keep

    def decides_at(self, index: int) -> bool:
        return self.policy.decides_at(index)

    def before_block(self, index: int, tokens: Tokens, trace: Trace):
        tokens, aux = self.policy.before_block(index, tokens, trace)
        return tokens.select(torch.full_like(tokens.valid_or_all(), self.keep)), aux


def test_keeping_everything_is_the_dense_model(vit, policy, images) -> None:
    expected, _ = vit(images, dense())
    got, trace = vit(images, Forced(policy, keep=True))
    assert all(keep.all() for keep in trace.keep)
    torch.testing.assert_close(got.x, expected.x, atol=1e-5, rtol=1e-5)


def test_where_it_decides_nothing_its_last_choice_stands(vit, policy, images) -> None:
    """Blocks between two decisions run as one; asked there all the same, the policy has nothing new to say."""
    together, _ = vit(images, policy)
    tokens = vit.embed(images)
    trace, asked = Trace.start(tokens), 0
    for index in range(DEPTH):
        chosen, aux = policy.before_block(index, tokens, trace)
        if not policy.decides_at(index):
            asked += 1
            keep = [tokens.valid_or_all() if t.keep is None else t.keep for t in (tokens, chosen)]
            assert torch.equal(*keep) and not aux and torch.equal(chosen.x, tokens.x)
        tokens, trace = vit.run_blocks(tokens, policy, trace, start=index, stop=index + 1)
    assert policy.decides_at(0) and (asked or policy.decides_at(1))
    torch.testing.assert_close(vit.norm(tokens.x), together.x, atol=1e-5, rtol=1e-5)


def test_keeping_nothing_leaves_grid_tokens_alone(vit, policy, images) -> None:
    before = vit.embed(images)
    got, trace = vit(images, Forced(policy, keep=False))
    assert not any(keep.any() for keep in trace.keep)
    assert trace.counts().eq(vit.num_prefix).all()
    torch.testing.assert_close(got.patches, before.patches, atol=0, rtol=0)
    assert not torch.equal(got.x[:, :1], before.x[:, :1]), "prefix tokens always take part"


@pytest.mark.parametrize("mode", ["packed", "padded", "bucketed", "masked"])
@pytest.mark.parametrize("attention", ["per_image", "batched"])
def test_alone_equals_in_a_batch_in_every_mode(vit, policy, images, mode, attention) -> None:
    reference, trace = vit(images, policy, execution=Execution(mode="masked"))
    got, got_trace = vit(images, policy, execution=Execution(mode=mode, attention=attention))
    assert all(torch.equal(a, b) for a, b in zip(trace.keep, got_trace.keep, strict=True))
    torch.testing.assert_close(got.x, reference.x, atol=1e-5, rtol=1e-5)
    for i in range(len(images)):
        alone, _ = vit(images[i : i + 1], policy, execution=Execution(mode=mode, attention=attention))
        torch.testing.assert_close(alone.x[0], reference.x[i], atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing_and_is_never_computed(vit, policy) -> None:
    sizes = [(20, 28), (12, 16), (9, 28)]
    torch.manual_seed(5)
    pictures = [torch.randn(1, 3, -(-h // 4) * 4, -(-w // 4) * 4) for h, w in sizes]
    batch = torch.zeros(3, 3, 20, 28)
    for canvas, picture in zip(batch, pictures, strict=True):
        canvas[:, : picture.shape[2], : picture.shape[3]] = picture[0]
    together, trace = vit(batch, policy, sizes)
    for i, (picture, size) in enumerate(zip(pictures, sizes, strict=True)):
        alone, own = vit(picture, policy, [size])
        h, w = alone.grid
        torch.testing.assert_close(together.map()[i, :, :h, :w], alone.map()[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.x[i, 0], alone.x[0, 0], atol=1e-5, rtol=1e-5)
        assert torch.equal(trace.counts()[:, i], own.counts()[:, 0])
    for keep in trace.keep:
        assert not (keep & ~trace.valid).any()


def test_gradients_reach_every_parameter_of_the_policy(vit, policy, images) -> None:
    policy.train()
    with torch.enable_grad():
        tokens, trace = vit(images, policy)
        (tokens.x.square().mean() + sum(policy.loss(trace).values())).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_state_dict_round_trip(name, vit, policy, images) -> None:
    torch.manual_seed(9)
    other = built(name, vit).eval()
    other.load_state_dict(policy.state_dict())
    torch.testing.assert_close(vit(images, other)[0].x, vit(images, policy)[0].x, atol=0, rtol=0)


def test_forward_writes_nothing_on_modules(vit, policy, images) -> None:
    def attributes(module: torch.nn.Module) -> list[tuple[str, object]]:
        return [(f"{n}.{k}", v) for n, m in module.named_modules() for k, v in vars(m).items() if k[0] != "_"]

    for training in (False, True):
        policy.train(training)
        before = [copy.copy(attributes(m)) for m in (vit, policy)]
        vit(images, policy)
        assert [attributes(m) for m in (vit, policy)] == before


def test_the_input_canvas_is_not_written_to(vit, policy, images) -> None:
    tokens = vit.embed(images)
    before = tokens.x.clone()
    vit.run_blocks(tokens, policy, Trace.start(tokens))
    assert torch.equal(tokens.x, before)


def test_counted_cost_falls_with_the_tokens(vit, policy, images, name) -> None:
    _, trace = vit(images, policy)
    _, full = vit(images, dense())
    cost, most = blocks_gflops(vit.config, trace), blocks_gflops(vit.config, full)
    assert (cost == most).all() if name == "keep_all" else (cost < most).all()
    assert (policy.macs(trace) >= 0).all()


def test_builds_from_its_json(name) -> None:
    config = configured(name)
    assert from_json(PolicyConfig, to_json(config)) == config


def test_docstring_names_its_source(name, vit) -> None:
    doc = type(built(name, vit)).__doc__ or ""
    assert "SViT" in doc or "DToP" in doc or "arXiv" in doc or doc.startswith("Control"), doc
