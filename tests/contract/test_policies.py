"""What every registered policy has to do; DESIGN calls it the price of a new file."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sievit.config import ConfigError, from_json, to_json
from sievit.heads import ATMConfig, SemanticHead, build_head
from sievit.measure.flops import traced_macs
from sievit.policies import Policy, PolicyConfig, policies, policy_config
from sievit.tokens import Tokens, Trace
from sievit.vit import Execution, ViT, ViTConfig
from tiny import attributes, dense

GRID = (5, 7)
DEPTH = 6
WITHOUT_BLOCKS = {
    "first_block": 2,
    "shares": (0.6, 0.4),
    "targets": (0.6, 0.4),
    "thresholds": (0.5,),
    "keep_per_class": 1,
    "preserve": True,
    "share": 0.1,
    "global_block": 3,
    "threshold": 0.2,
    "side": 0.6,
}
"""Settings that leave tokens out on the tiny backbone, of the policies that have them."""
OUTSIDE = ("outside.contrast:Contrast",)
"""Policies of a user's own package."""
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "svit": {
        "reactivate": (True, False),
        "preserve": (True, False),
        "sample": (False, True),
        "static_shares": (None, (0.6, 0.3, 1.0, 0.5)),
        "dense_blocks": ((), (3, 5)),
        "threshold": (0.0, 0.1),
        "per_sample": (False, True),
        "budgets": (None, (0.5, 1.5)),
    },
    "svit ": {"gate_layers": (1, 2, 3), "gate_kernel": (1, 3)},
    "dtop": {
        "static_left": (None, (0.4, 0.6), (0.0, 0.5)),
        "rejoin": (False, True),
        "preserve": (False, True),
        "grade": ("max", "margin", "entropy"),
        "keep_per_class": (1, 0),
    },
    "dynamicvit": {"preserve": (False, True)},
    "evit": {"preserve": (False, True), "fuse": (True, False), "rejoin": (False, True)},
    "evo_vit": {"shares": ((0.5,), (1.0, 0.4))},
    "ats": {"preserve": (False, True)},
    "tome": {"share": (0.1, 0.5, 0.0), "rejoin": (False, True)},
    "algm": {"local_block": (0, 2), "threshold": (-1.0, 0.2)},
    "cropr": {"preserve": (True,), "rejoin": (False, True)},
    "expedit": {"side": (0.5, 1.0), "rejoin": (False, True)},
    "random": {"rejoin": (False, True), "propagate": (False, True)},
    "attention": {"propagate": (True,)},
    "spread": {"propagate": (False, True), "shares": ((0.6, 0.4), (1.0, 0.4))},
    "svit  ": {
        "propagate": (True,),
        "reactivate": (True, False),
        "dither": (None, "grid", "similarity"),
        "static_shares": (None, (0.6, 0.3, 1.0, 0.5)),
        "dense_blocks": ((), (3, 5)),
    },
    "svit   ": {
        "per_stage": (True,),
        "propagate": (True, False),
        "dither": (None, "similarity"),
        "static_shares": (None, (0.6, 0.6, 0.3, 0.3), (1.0, 1.0, 0.5, 0.5)),
        "dense_blocks": ((), (4, 5)),
    },
    "dtop ": {"propagate": (True,), "static_left": (None, (0.4, 0.6)), "preserve": (False, True), "rejoin": (True,)},
    "evit ": {"propagate": (True,), "preserve": (True,)},
}
"""Values of the options that change which tokens take part, their values, or what they see."""
EDITED = {"evo_vit", "expedit"}
"""Policies that change the values of tokens that no block computes."""


def configured(name: str, **options: Any) -> PolicyConfig:
    """The policy with settings that leave tokens out on the tiny backbone."""
    config = policy_config(name)
    fields = {field.name for field in dataclasses.fields(config)}
    wanted = {**WITHOUT_BLOCKS, **options}
    return dataclasses.replace(config, **{key: value for key, value in wanted.items() if key in fields})


def allowed() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of options that a policy's configuration allows."""
    for name, choices in ((name.strip(), choices) for name, choices in CHOICES.items()):
        for values in itertools.product(*choices.values()):
            options = dict(zip(choices, values, strict=True))
            try:
                built(name, backbone(), **options)
            except ConfigError:
                continue
            yield name, options


def backbone(class_token: bool = True) -> ViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = ViT(ViTConfig(grid=GRID, patch_size=4, embed_dim=24, depth=DEPTH, num_heads=3, class_token=class_token))
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return vit.eval()


def heads() -> dict[int, SemanticHead]:
    """Heads behind some blocks, whose scores spread over 0 to 1."""
    config = ATMConfig(channels=16, num_heads=2, num_layers=2)
    found = {
        block: build_head(config, embed_dim=24, num_classes=4).eval().requires_grad_(False)
        for block in (1, 3, DEPTH - 1)
    }
    for head in found.values():
        for key, parameter in head.named_parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=(3 if "cross_attn.q" in key else 1) * parameter.shape[1] ** -0.5)
            elif key == "class_embed.bias":
                parameter.data[0] += 2
    return found


def built(name: str, vit: ViT, **options: Any) -> Policy:
    """The policy, with what it may need of a model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        behind = heads()
        torch.manual_seed(1)
        return vit.build_policy(configured(name, **options), heads=behind).eval()


def learnt(policy: Policy, trace: Trace) -> dict[str, Tensor]:
    """The losses of a policy, with targets that have labels, and the dense trace where it compares with one."""
    targets = [{"labels": torch.tensor([i, i + 1])} for i in range(len(trace.valid))]
    teacher = dataclasses.replace(trace) if policy.needs_teacher else None
    return policy.loss(trace, teacher=teacher, targets=targets)


NAMES = sorted([*policies(), *OUTSIDE])


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vit() -> ViT:
    return backbone()


@pytest.fixture
def policy(name: str, vit: ViT) -> Policy:
    return built(name, vit)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, GRID[0] * 4, GRID[1] * 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Forced(Policy):
    """A policy whose choice is replaced; what it computes and remembers is its own."""

    def __init__(self, policy: Policy, keep: bool) -> None:
        super().__init__()
        self.policy, self.keep = policy, keep
        self.decides_at, self.decides_inside, self.after_blocks = (
            policy.decides_at,
            policy.decides_inside,
            policy.after_blocks,
        )

    def rejoins_at(self, index: int) -> bool:
        return False

    def _forced(self, tokens: Tokens) -> Tokens:
        return tokens.select(torch.full_like(tokens.valid_or_all(), self.keep))

    def before_block(self, index: int, tokens: Tokens, trace: Trace):
        return self._forced(tokens), self.policy.before_block(index, tokens, trace)[1]

    def inside_block(self, index: int, tokens: Tokens, trace: Trace, projections: Any):
        return self._forced(tokens), self.policy.inside_block(index, tokens, trace, projections)[1]


def test_keeping_everything_is_the_dense_model(vit, policy, images) -> None:
    expected, _ = vit(images, dense(vit))
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
            assert torch.equal(*keep) and not aux
            torch.testing.assert_close(policy.after_piece(chosen, trace).x, tokens.x, atol=1e-5, rtol=1e-5)
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


EXECUTIONS = [Execution("packed"), Execution("packed", "batched"), *map(Execution, ("padded", "bucketed", "masked"))]


def check_modes(vit: ViT, policy: Policy, images: Tensor, *, alone: bool = True) -> None:
    """Every mode gives what `masked` gives, in a batch and alone."""
    reference, trace = vit(images, policy, execution=Execution("masked"))
    for execution in EXECUTIONS:
        got, own = vit(images, policy, execution=execution)
        assert all(torch.equal(a, b) for a, b in zip(trace.keep, own.keep, strict=True)), execution
        assert all(torch.equal(a, b) for a, b in zip(trace.mlp, own.mlp, strict=True)), execution
        torch.testing.assert_close(got.x, reference.x, atol=1e-5, rtol=1e-5)
        for a, b in zip(trace.predictions, own.predictions, strict=True):
            torch.testing.assert_close(a.tensors, b.tensors, atol=1e-5, rtol=1e-5)
        for i in range(len(images) if alone else 0):
            single, _ = vit(images[i : i + 1], policy, execution=execution)
            torch.testing.assert_close(single.x[0], reference.x[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("class_token", [True, False])
def test_alone_equals_in_a_batch_in_every_mode(name, images, class_token) -> None:
    vit = backbone(class_token)
    check_modes(vit, built(name, vit), images)


COMBINATIONS = list(allowed())


@pytest.mark.parametrize(
    ("name", "options"), COMBINATIONS, ids=[" ".join(map(str, o.values())) for _, o in COMBINATIONS]
)
def test_every_combination_of_options(name, options, vit, images) -> None:
    """Modes agree, padding is never computed, the cost is that of a real pass, and it learns."""
    policy = built(name, vit, **options)
    if not options.get("sample"):
        check_modes(vit, policy, images, alone=False)
    tokens = vit.embed(images, [(20, 28), (12, 16), (9, 28)])
    _, trace = vit.run_blocks(tokens, policy, Trace.start(tokens))
    assert not any((keep & ~trace.valid).any() for keep in (*trace.keep, *trace.mlp))
    check_cost(vit, policy, images[:1])
    policy.train()
    with torch.enable_grad():
        tokens, trace = vit(images, policy)
        assert trace.tokens is not None
        (tokens.x.square().mean() + sum(learnt(policy, trace).values())).backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


PADDED = [("dtop", {"preserve": True}), ("dtop", {"rejoin": True}), ("svit", {"static_shares": (0.6, 0.3, 1.0, 0.5)})]
"""Options with which padding is a matter of its own."""


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in NAMES), *PADDED],
    ids=str,
)
def test_padding_changes_nothing_and_is_never_computed(name, options, vit) -> None:
    policy = built(name, vit, **options)
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
    for mask in (*trace.keep, *trace.exited):
        assert not (mask & ~trace.valid).any()


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16-mixed"])
def test_gradients_reach_every_parameter_of_the_policy(mixed, vit, policy, images) -> None:
    policy.train()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        images = images.clone().requires_grad_()
        tokens, trace = vit(images, policy, [(20, 28), *[(12, 20)] * (len(images) - 1)])
        (tokens.x.square().mean() + sum(learnt(policy, trace).values())).backward()
    assert images.grad is not None and images.grad.isfinite().all()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_state_dict_round_trip(name, vit, policy, images) -> None:
    torch.manual_seed(9)
    other = built(name, vit).eval()
    other.load_state_dict(policy.state_dict())
    torch.testing.assert_close(vit(images, other)[0].x, vit(images, policy)[0].x, atol=0, rtol=0)


def test_a_pass_writes_neither_on_modules_nor_to_its_input(vit, policy, images) -> None:
    for training in (False, True):
        policy.train(training)
        before = attributes(vit, policy)
        vit(images, policy)
        assert attributes(vit, policy) == before

    tokens = vit.embed(images)
    before = tokens.x.clone()
    vit.run_blocks(tokens, policy, Trace.start(tokens))
    assert torch.equal(tokens.x, before)


def counted(vit: ViT, policy: Policy, images: Tensor) -> tuple[float, Trace]:
    """Multiply-adds of a real pass over the blocks, by torch's counter."""
    tokens = vit.embed(images)
    with FlopCounterMode(display=False) as counter:
        _, trace = vit.run_blocks(tokens, policy, Trace.start(tokens))
    return counter.get_total_flops() / 2, trace


def cost(vit: ViT, policy: Policy, trace: Trace) -> float:
    """The same from a trace: blocks, the policy's own products, and the heads that it asks."""
    behind: dict[int, Any] = getattr(policy, "heads", {})
    computed = [(block, behind[block]) for block in trace.head_blocks]
    of_heads = sum(head.macs(trace.keep[block].sum(1), trace.grid).sum().item() for block, head in computed)
    return traced_macs(vit.config, trace).sum().item() + policy.cost(trace).sum().item() + of_heads


def check_cost(vit: ViT, policy: Policy, images: Tensor) -> None:
    """The cost of a trace is the count of the pass."""
    real, trace = counted(vit, policy, images)
    assert cost(vit, policy, trace) == pytest.approx(real, rel=1e-9)


@pytest.mark.parametrize("class_token", [True, False])
def test_the_cost_is_the_count_of_a_real_pass(name, images, class_token) -> None:
    vit = backbone(class_token)
    policy = built(name, vit)
    check_cost(vit, policy, images[:1])
    below = traced_macs(vit.config, vit(images, policy)[1]) < traced_macs(vit.config, vit(images, dense(vit))[1])
    assert below.all() != (name == "keep_all")
    policy = built(name, vit, thresholds=(1 - 1e-9,))  # where tokens leave, none does
    forced = Forced(policy, keep=True)
    forced.after_piece = policy.after_piece  # what it costs is counted too
    dense_pass, trace = counted(vit, forced, images[:1])
    notes = tuple(policy.dense_notes(index, vit.embed(images[:1])) for index in range(DEPTH + 1))
    assert cost(vit, policy, dataclasses.replace(trace, aux=notes)) == pytest.approx(dense_pass, rel=1e-9)


@pytest.mark.parametrize("neck", ["adapter", "pieces"])
def test_the_canvas_is_whole_after_every_piece_of_the_loop(name, vit, policy, images, neck) -> None:
    """Tokens that are left out keep the value that they have, merged ones have that of their owner, and values that a
    policy edits outside of a block are there in the next piece."""
    tokens = vit.embed(images)
    trace = Trace.start(tokens)
    for start in range(0, DEPTH, 2):
        before = tokens
        tokens, trace = vit.run_blocks(tokens, policy, trace, start=start, stop=start + 2)
        assert tokens.owner is None
        owner = next((aux["owner"] for aux in reversed(trace.aux) if "owner" in aux), None)
        if owner is not None:
            torch.testing.assert_close(
                tokens.patches, tokens.patches.gather(1, owner[..., None].expand_as(tokens.patches))
            )
        rested = trace.valid & ~(trace.keep[start] | trace.mlp[start] | trace.keep[start + 1] | trace.mlp[start + 1])
        if owner is None:
            assert name in EDITED or policy.propagates or torch.equal(tokens.patches[rested], before.patches[rested])
        if neck == "adapter":  # which adds to all tokens
            tokens = tokens.replace_patches(tokens.patches + 0.1)


def test_builds_from_its_json_and_names_its_source(name, vit) -> None:
    config = configured(name)
    assert from_json(PolicyConfig, to_json(config)) == config

    doc = type(built(name, vit)).__doc__ or ""
    assert "SViT" in doc or "DToP" in doc or "arXiv" in doc or doc.startswith("Control"), doc
