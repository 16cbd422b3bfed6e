"""Losses against loops in double precision, and labels that are not known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sievit.heads import LinearConfig, MLPConfig, SETRNaiveConfig
from sievit.heads.semantic import PixelHeadConfig, build_head
from sievit.losses import ATMLossConfig, PixelLossConfig, atm_loss, balanced, pixel_loss
from sievit.tokens import Prediction

K = 4
IGNORED = 255


def inputs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class and mask logits for labels (b, H, W), at half their resolution."""
    b, height, width = labels.shape
    classes = torch.randn(b, K, 2, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(b, K, height // 2, width // 2, dtype=torch.float64, requires_grad=True)
    return classes, maps


def random_labels(b: int = 3, height: int = 8, width: int = 12) -> Tensor:
    """Of one image every class, of one a single class, of one nothing known; some pixels unknown everywhere."""
    labels = torch.randint(0, K, (b, height, width))
    labels[1] = 2
    labels[:, :2, :5] = IGNORED
    labels[2] = IGNORED
    return labels


def loss_by_hand(classes: Tensor, maps: Tensor, labels: Tensor, config: ATMLossConfig) -> dict[str, float]:
    """Pixel by pixel."""
    big = F.interpolate(maps, labels.shape[1:], mode="bilinear", align_corners=False)
    total, weights, focals, dices = 0.0, 0.0, [], []
    for i in range(len(labels)):
        for k in range(K):
            present = bool((labels[i] == k).any())
            weight = 1.0 if present else config.no_object
            shares = classes[i, k].softmax(0)
            total += -weight * math.log(float(shares[0 if present else 1]))
            weights += weight
            if not present:
                continue
            each, overlap, sizes = [], 0.0, 0.0
            for value, label in zip(big[i, k].flatten().tolist(), labels[i].flatten().tolist(), strict=True):
                if label == IGNORED and config.ignored == "excluded":
                    continue
                p = 1 / (1 + math.exp(-value))
                if label == k:
                    each.append(-config.alpha * (1 - p) ** config.gamma * math.log(p))
                else:
                    each.append(-(1 - config.alpha) * p**config.gamma * math.log(1 - p))
                overlap += p * (label == k)
                sizes += p + (label == k)
            focals.append(sum(each) / len(each))
            dices.append(1 - (2 * overlap + 1) / (sizes + 1))
    masks = max(len(focals), 1)
    return {
        "class": config.class_weight * total / weights,
        "mask": config.mask_weight * sum(focals) / masks,
        "dice": config.dice_weight * sum(dices) / masks,
    }


@pytest.mark.parametrize(
    "config",
    [
        ATMLossConfig(),
        ATMLossConfig(ignored="background"),
        ATMLossConfig(class_weight=0.5, mask_weight=3.0, dice_weight=2.0, no_object=0.4, alpha=0.6, gamma=1.0),
    ],
)
def test_atm_loss_is_as_written_out(config: ATMLossConfig) -> None:
    labels = random_labels()
    classes, maps = inputs(labels)
    got = atm_loss(classes, maps, labels, config=config)
    expected = loss_by_hand(classes.detach(), maps.detach(), labels, config)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert float(got[name].detach()) == pytest.approx(value, rel=1e-5), name


def test_what_maps_say_of_unknown_pixels_does_not_matter() -> None:
    """Neither for the values nor for the gradients; the maps have the resolution of the labels here."""
    labels = random_labels()
    unknown = (labels == IGNORED)[:, None].expand(-1, K, -1, -1)
    results = []
    for noise in (0.0, 50.0):
        torch.manual_seed(1)
        classes = torch.randn(3, K, 2, requires_grad=True)
        maps = torch.randn(3, K, *labels.shape[1:], requires_grad=True)
        moved = maps + noise * torch.randn_like(maps) * unknown
        losses = [*atm_loss(classes, moved, labels).values(), pixel_loss(moved, labels)]
        gradients = torch.autograd.grad(torch.stack(losses).sum(), [classes, maps])
        assert not gradients[1][unknown].any()
        assert gradients[1][~unknown].any()
        results.append([*losses, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("ignored", ["excluded", "background"])
def test_nothing_is_known_of_any_image(ignored) -> None:
    labels = torch.full((2, 8, 12), IGNORED)
    classes, maps = inputs(labels)
    losses = atm_loss(classes, maps, labels, config=ATMLossConfig(ignored=ignored))
    assert float(losses["mask"].detach()) == float(losses["dice"].detach()) == 0
    total = torch.stack([*losses.values(), pixel_loss(maps, labels).double()]).sum()
    assert total.isfinite()
    total.backward()
    assert maps.grad is not None and not maps.grad.any()
    assert classes.grad is not None and classes.grad.isfinite().all()


@pytest.mark.parametrize("ignore_index", [255, -1, 100])
def test_the_label_that_is_ignored_is_a_matter_of_choice(ignore_index: int) -> None:
    labels = random_labels()
    classes, maps = inputs(labels)
    expected = [*atm_loss(classes, maps, labels).values(), pixel_loss(maps, labels)]
    labels[labels == IGNORED] = ignore_index
    got = atm_loss(classes, maps, labels, ignore_index=ignore_index)
    for a, b in zip([*got.values(), pixel_loss(maps, labels, ignore_index=ignore_index)], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_pixel_loss_is_the_mean_over_known_pixels() -> None:
    labels = random_labels()
    logits = torch.randn(3, K, 8, 12)
    shares = logits.log_softmax(1)
    places = (labels != IGNORED).nonzero().tolist()
    expected = -sum(float(shares[i, labels[i, y, x], y, x]) for i, y, x in places) / len(places)
    assert float(pixel_loss(logits, labels)) == pytest.approx(expected, rel=1e-5)


def test_the_cross_entropy_of_the_scores_that_decide() -> None:
    labels = random_labels(height=16, width=24)
    classes, maps = (value.detach() for value in inputs(labels))
    config = ATMLossConfig(pixel_weight=3.0, pixel=PixelLossConfig(balance=0.5, stride=4))
    maps = maps[..., :2, :3]  # a token of eight pixels; of four pixels one is looked at
    got = float(atm_loss(classes, maps, labels, config=config)["pixel"])
    scores = classes.softmax(-1)[..., :1, None] * maps.sigmoid()
    big = F.interpolate(scores.log(), (4, 6), mode="bilinear", align_corners=False).log_softmax(1)
    seen = labels[:, 2::4, 2::4]
    places = [(*place, int(seen[tuple(place)])) for place in (seen != IGNORED).nonzero().tolist()]
    share = {k: sum(label == k for *_, label in places) / len(places) for k in range(K)}
    each = [(share[k] ** -0.5, float(big[i, k, y, x])) for i, y, x, k in places]
    expected = -sum(weight * value for weight, value in each) / sum(weight for weight, _ in each)
    assert got == pytest.approx(3.0 * expected, rel=1e-4)
    assert "pixel" not in atm_loss(classes, maps, labels)


def test_balanced_weights() -> None:
    labels = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 3, IGNORED]])
    assert balanced(labels, 4, ignore_index=IGNORED, power=0.0).tolist() == [1, 1, 0, 1]
    weights = balanced(labels, 4, ignore_index=IGNORED, power=1.0)
    torch.testing.assert_close(weights * torch.tensor([6, 2, 1, 1]) / 9, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3]))
    assert not balanced(torch.full((1, 4), IGNORED), 4, ignore_index=IGNORED, power=0.5).any()


@pytest.mark.parametrize("config", [LinearConfig, MLPConfig, SETRNaiveConfig])
def test_token_heads_have_the_loss_of_their_configuration(config: type[PixelHeadConfig]) -> None:
    labels = random_labels(height=16, width=16)
    prediction = Prediction(torch.randn(3, K, 16))
    given = {}
    for loss in (PixelLossConfig(), PixelLossConfig(balance=1.0, stride=4)):
        head = build_head(config(loss=loss), embed_dim=8, num_classes=K)
        given[loss] = float(head.losses(prediction, (4, 4), labels, IGNORED)["pixel"])
        assert given[loss] == float(pixel_loss(prediction.maps.unflatten(2, (4, 4)), labels, config=loss))
    assert len(set(given.values())) == 2
