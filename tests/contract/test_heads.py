"""What every registered semantic head has to do."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sievit.config import from_json, to_json
from sievit.heads import (
    ATMConfig,
    LinearConfig,
    MLPConfig,
    SemanticHead,
    SemanticHeadConfig,
    SETRNaiveConfig,
    SETRPUPConfig,
    build_head,
    semantic_heads,
)
from sievit.tokens import Prediction, Tokens
from tiny import attributes, scattered

GRID = (5, 7)
N = GRID[0] * GRID[1]
DIM, CLASSES = 24, 4
SMALL: dict[str, SemanticHeadConfig] = {
    "atm": ATMConfig(channels=12, num_heads=3, num_layers=2, mlp_ratio=2.0),
    "linear": LinearConfig(),
    "mlp": MLPConfig(hidden_dim=10),
    "setr_naive": SETRNaiveConfig(channels=10),
    "setr_pup": SETRPUPConfig(channels=8, num_convs=2),
}
"""A new head needs an entry here."""


@pytest.fixture(params=sorted(semantic_heads()))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def head(name: str) -> SemanticHead:
    """With random weights and running statistics."""
    torch.manual_seed(5)
    return scattered(build_head(SMALL[name], embed_dim=DIM, num_classes=CLASSES), 0.5)


def canvas(b: int = 3, *, num_prefix: int = 0) -> Tokens:
    x = torch.randn(b, num_prefix + N, DIM, generator=torch.Generator().manual_seed(2))
    return Tokens(x, GRID, num_prefix=num_prefix)


def some(b: int = 3) -> Tensor:
    """Of each image another number of tokens, of one of them none."""
    part = torch.rand(b, N, generator=torch.Generator().manual_seed(4)) < torch.tensor([[0.3], [0.7], [0.0]])[:b]
    assert part[0].any()
    return part


def close(a: Prediction, b: Prediction, *, atol: float = 1e-5) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for key, value in a.tensors.items():
        torch.testing.assert_close(value, b.tensors[key], atol=atol, rtol=1e-5, msg=key)


def test_the_form_of_what_it_says(head) -> None:
    for num_prefix in (0, 1):
        said = head(canvas(num_prefix=num_prefix))
        assert said.maps.shape == (3, CLASSES, N)
        assert said.classes is None or said.classes.shape == (3, CLASSES, 2)
        if said.fine is not None:
            scale = said.fine.shape[2] // GRID[0]
            assert said.fine.shape == (3, CLASSES, GRID[0] * scale, GRID[1] * scale)
        scores = said.scores()
        assert scores.shape == said.maps.shape
        assert (scores >= 0).all()
        assert (scores <= 1).all()


def test_the_prefix_is_not_judged(head) -> None:
    plain, more = canvas(), canvas(num_prefix=2)
    close(head(Tokens(more.x[:, 2:], GRID)), head(more))
    assert not torch.equal(head(plain).maps, head(more).maps)


def test_some_tokens_are_judged_as_all_are(head, name) -> None:
    """Heads that look at tokens together (ATM) see the chosen ones alone."""
    tokens, part = canvas(), some()
    with torch.inference_mode():
        previous, got = head(canvas(3)), head(tokens, part)
        over = head(tokens, part, replace(previous, maps=previous.maps + 1))
        full = head(tokens)
        for i in range(2):
            chosen = part[i]
            if name == "atm":
                alone = head(Tokens(tokens.x[i : i + 1, chosen], (1, int(chosen.sum()))))
                torch.testing.assert_close(got.classes[i], alone.classes[0], atol=1e-5, rtol=1e-5)
                expected = alone.maps[0]
            else:
                expected = full.maps[i, :, chosen]
            for said in (got, over):
                if said.fine is None:
                    torch.testing.assert_close(said.maps[i, :, chosen], expected, atol=1e-5, rtol=1e-5)
            if over.fine is None:
                torch.testing.assert_close(over.maps[i, :, ~chosen], previous.maps[i, :, ~chosen] + 1)
                assert not got.maps[i, :, ~chosen].any()
            else:
                here = chosen.view(GRID).repeat_interleave(4, 0).repeat_interleave(4, 1)
                assert full.fine is not None and previous.fine is not None
                torch.testing.assert_close(over.fine[i][:, here], full.fine[i][:, here], atol=1e-5, rtol=1e-5)
                assert torch.equal(over.fine[i][:, ~here], previous.fine[i][:, ~here])
    assert torch.equal(over.scores()[2], replace(previous, maps=over.maps).scores()[2])


def test_everybody_is_all_and_nobody_changes_nothing(head) -> None:
    tokens = canvas()
    with torch.inference_mode():
        previous, nobody = head(tokens), torch.zeros(3, N, dtype=torch.bool)
        close(head(tokens, ~nobody), previous)
        close(head(replace(tokens, x=tokens.x + 1), nobody, previous), previous, atol=1e-6)


def test_alone_equals_in_a_batch(head) -> None:
    tokens, part = canvas(), some()
    with torch.inference_mode():
        previous = head(canvas())
        for chosen in (None, part):
            together = head(tokens, chosen, previous)
            for i in range(3):
                own = None if chosen is None else chosen[i : i + 1]
                before = Prediction(**{key: value[i : i + 1] for key, value in previous.tensors.items()})
                alone = head(Tokens(tokens.x[i : i + 1], GRID), own, before)
                close(Prediction(**{k: v[i : i + 1] for k, v in together.tensors.items()}), alone)


def test_the_canvas_of_the_earlier_prediction_is_not_written_to(head) -> None:
    tokens, part = canvas(), some()
    with torch.no_grad():
        previous = head(tokens)
        before = {key: value.clone() for key, value in previous.tensors.items()}
        head(replace(tokens, x=tokens.x + 1), part, previous)
    assert all(torch.equal(value, before[key]) for key, value in previous.tensors.items())


@pytest.mark.parametrize("chosen", [False, True])
def test_gradients_reach_every_parameter(head, chosen: bool) -> None:
    head.train()
    tokens = canvas()
    x = tokens.x.clone().requires_grad_()
    prediction = head(replace(tokens, x=x), some() if chosen else None)
    labels = torch.randint(0, CLASSES, (3, 20, 28))
    labels[0, :5] = 255
    losses = head.losses(prediction, GRID, labels, 255)
    torch.stack(list(losses.values())).sum().backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        if not key.endswith(("k.bias", "bn.bias")):
            assert parameter.grad.any(), key
    assert x.grad is not None and x.grad.any()


def test_earlier_predictions_get_their_gradient(head, name) -> None:
    """Of the tokens that are not judged any more, through the canvas."""
    tokens, part = canvas(), some()
    with torch.no_grad():
        before = head(tokens)
    leaves = {key: value.clone().requires_grad_() for key, value in before.tensors.items()}
    said = head(tokens, part, Prediction(**leaves))
    said.maps.square().sum().backward()
    gradient = leaves["fine" if name == "setr_pup" else "maps"].grad
    assert gradient is not None
    if name != "setr_pup":
        assert torch.equal(gradient.abs().sum(1) > 0, ~part)


def test_state_dict_round_trip(head, name) -> None:
    torch.manual_seed(8)
    other = build_head(SMALL[name], embed_dim=DIM, num_classes=CLASSES).eval()
    other.load_state_dict(head.state_dict())
    with torch.inference_mode():
        close(other(canvas()), head(canvas()), atol=0)


def test_builds_from_its_json(name) -> None:
    assert name in SMALL, "tests need a small configuration of the new head"
    for config in (SMALL[name], semantic_heads()[name]()):
        assert from_json(SemanticHeadConfig, to_json(config)) == config


def test_nothing_is_written_during_a_pass(head) -> None:
    for training in (False, True):
        head.train(training)
        before = attributes(head)
        head(canvas(), some(), head(canvas()))
        assert attributes(head) == before


@pytest.mark.parametrize("chosen", [False, True])
def test_counted_cost_is_that_of_its_products(head, name, chosen: bool) -> None:
    """Against a count of the operations; on one image, so that nothing is padded."""
    tokens, part = canvas(1), some(1) if chosen else None
    kernel = sdpa_kernel(SDPBackend.MATH) if name == "atm" else nullcontext()
    with kernel, FlopCounterMode(display=False) as counter:
        head(tokens, part)
    products = counter.get_total_flops() / 2
    if name == "setr_pup":  # up-sampling, which torch does not count: four products per value
        products += sum(4 * N * 4 ** (i + 1) * 8 for i in range(2))
    judged = torch.tensor([N]) if part is None else part.sum(1)
    assert float(head.macs(judged, GRID)) == products


def test_counted_cost_is_per_image(head) -> None:
    both = head.macs(torch.tensor([3, 20]), GRID)
    assert both.shape == (2,)
    assert float(both[0]) == float(head.macs(torch.tensor([3]), GRID))
    assert float(both[1]) == float(head.macs(torch.tensor([20]), GRID))


def test_docstring_says_what_it_is(head) -> None:
    assert (type(head).__doc__ or "").strip()
