"""Labels stay under their pixels whatever happens to the image, crops show something, and colours change as said."""

import colorsys
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.config import ConfigError, from_json, to_json
from sievit.data.semantic import (
    HUE,
    SATURATION,
    SemanticAugment,
    SemanticAugmentConfig,
    distort,
    shift_colours,
)
from sievit.data.transforms import View

PLAIN = SemanticAugmentConfig(flip=0.0, cat_max_ratio=1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose pixels tell where they are, and labels that tell it too: 256 * y + x."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([y, x, (y + x) // 2]).astype(np.uint8)
    return torch.from_numpy(image), torch.from_numpy((256 * y + x).astype(np.int32))


SIZES = st.tuples(st.integers(2, 90), st.integers(2, 90))
CROPS = st.none() | st.tuples(st.integers(1, 60), st.integers(1, 60))
SCALES = st.sampled_from(
    [
        {},
        {"base": (40, 160)},
        {"base": (30, 50), "ratio_range": (0.3, 3.0)},
        {"scales": (20, 45, 100), "max_size": 120},
        {"zoom": (0.4, 2.5)},
    ]
)


@settings(deadline=None, max_examples=200)
@given(SIZES, CROPS, SCALES, st.booleans(), st.sampled_from([0.2, 1.0]), st.integers(0, 10**6))
def test_labels_stay_under_their_pixels(
    size: tuple[int, int],
    crop: tuple[int, int] | None,
    scales: dict[str, Any],
    rot90: bool,
    cat_max_ratio: float,
    seed: int,
):
    image, labels = ramp(size)
    config = SemanticAugmentConfig(
        flip=0.5, vertical_flip=0.5, rot90=rot90, crop=crop, cat_max_ratio=cat_max_ratio, **scales
    )
    augment = SemanticAugment(config, ignore_index=-1)
    view = augment.draw_view(labels, generator(seed))
    out, target = augment(image, {"labels": labels, "image_id": 4}, generator(seed))
    found = target["labels"]
    assert out.shape[1:] == found.shape and target["image_id"] == 4 and found.dtype == torch.int64
    y, x = found // 256, found % 256
    shown = out * 255
    if view.size == view.rect[2:]:
        assert torch.equal(shown.round(), torch.stack([y, x, (y + x) // 2]).float())
    for coordinate, channel, axis in ((y, shown[0], 0), (x, shown[1], 1)):  # within half a pixel of the coarser grid
        step = max(1.0, view.rect[2 + axis] / view.size[axis])
        assert (coordinate - channel).abs().max() <= 0.5 * step + 0.51
    if crop is not None:
        assert out.shape[1] <= crop[0] and out.shape[2] <= crop[1], "also of an image that is turned"


@settings(deadline=None, max_examples=60)
@given(SIZES, st.booleans(), st.booleans(), st.booleans())
def test_labels_of_every_symmetry(size: tuple[int, int], flip: bool, vertical_flip: bool, transpose: bool):
    image, labels = ramp(size)
    view = View((0, 0, *size), size, flip, vertical_flip, transpose)
    shown = view.image(image).int()
    assert torch.equal(view.labels(labels), 256 * shown[0] + shown[1])


@settings(deadline=None, max_examples=60)
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 9), st.integers(1, 3)))
def test_tiny_images_are_resized_too(size: tuple[int, int], target: tuple[int, int]):
    image = torch.randint(0, 256, (*size, 3), generator=generator(), dtype=torch.uint8).permute(2, 0, 1)
    found = View((0, 0, *size), target).image(image)
    expected = triangle(size[0], target[0]) @ image.double() @ triangle(size[1], target[1]).T
    assert found.dtype == torch.uint8 and (found - expected).abs().max() <= 1.5


def triangle(source: int, target: int) -> torch.Tensor:
    """Weights (target, source) of a linear resize that averages what it makes smaller."""
    step = source / target
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * step
    pixels = torch.arange(source, dtype=torch.float64) + 0.5
    weights = (1 - (pixels - centres[:, None]).abs() / max(step, 1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def test_quarter_turns_are_rotations():
    image, labels = ramp((7, 11))
    seen = set()
    for seed in range(60):
        out, target = SemanticAugment(replace(PLAIN, rot90=True))(image, {"labels": labels}, generator(seed))
        turns = [k for k in range(4) if torch.equal(target["labels"], torch.rot90(labels, k).long())]
        assert len(turns) == 1 and torch.equal((out * 255).round(), torch.rot90(image, turns[0], (1, 2)).float())
        seen.update(turns)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_what_goes_in_stays_as_it_is_and_the_generator_decides(dtype: torch.dtype):
    image, labels = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8), torch.randint(0, 9, (40, 50), dtype=dtype)
    config = SemanticAugmentConfig(crop=(24, 24), base=(40, 160), photometric=True, contrast=0.2, noise=0.1, rot90=True)
    before = image.clone(), labels.clone()
    results = [SemanticAugment(config)(image, {"labels": labels}, generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(image, before[0]) and torch.equal(labels, before[1])
    for out, target in results:
        assert out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1 and out.is_contiguous()
        assert target["labels"].dtype == torch.int64
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1]["labels"], results[1][1]["labels"])
    assert results[0][0].shape != results[2][0].shape or not torch.equal(results[0][0], results[2][0])
    plain, target = SemanticAugment(PLAIN)(image, {"labels": labels}, generator())
    target["labels"].zero_()
    plain.zero_()
    assert torch.equal(image, before[0]) and torch.equal(labels, before[1]), "not even through the result"


def test_the_papers_scales_keep_the_ratio():
    config = SemanticAugmentConfig.paper(64)
    labels = torch.zeros(100, 150, dtype=torch.uint8)
    augment = SemanticAugment(replace(config, crop=None))
    sizes = [augment.draw_view(labels, generator(seed)).size for seed in range(300)]
    assert min(h for h, _ in sizes) >= 32 and max(h for h, _ in sizes) <= 128
    assert all(abs(w - 1.5 * h) <= 1.25 for h, w in sizes)
    assert 80 < sum(h < 64 for h, _ in sizes) < 125, "a third: the factor is uniform in 0.5 .. 2"
    long = torch.zeros(10, 400, dtype=torch.uint8)  # the long edge limits it
    widths = [augment.draw_view(long, generator(seed)).size[1] for seed in range(300)]
    assert 128 <= min(widths) < 150 and 480 < max(widths) <= 512


def test_crops_come_from_everywhere():
    image, labels = ramp((30, 40))
    corners = set()
    for seed in range(200):
        _, target = SemanticAugment(replace(PLAIN, crop=(20, 25)))(image, {"labels": labels}, generator(seed))
        corners.add(int(target["labels"][0, 0]))
        assert target["labels"].shape == (20, 25)
    assert {c // 256 for c in corners} == set(range(11)) and {c % 256 for c in corners} == set(range(16))


def test_a_crop_larger_than_the_image_is_the_image():
    image, labels = ramp((30, 40))
    out, target = SemanticAugment(replace(PLAIN, crop=(64, 35)))(image, {"labels": labels}, generator())
    assert out.shape == (3, 30, 35) and target["labels"].shape == (30, 35)
    out, _ = SemanticAugment(replace(PLAIN, crop=(64, 64)))(image, {"labels": labels}, generator())
    assert torch.equal((out * 255).round(), image.float())


def crops_of(labels: torch.Tensor, cat_max_ratio: float, ignore_index: int = 255) -> list[torch.Tensor]:
    image = torch.zeros(3, *labels.shape, dtype=torch.uint8)
    augment = SemanticAugment(replace(PLAIN, crop=(20, 20), cat_max_ratio=cat_max_ratio), ignore_index)
    return [augment(image, {"labels": labels}, generator(seed))[1]["labels"] for seed in range(100)]


def test_crops_of_a_single_class_are_drawn_again():
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    labels[20:36, 60:76] = 1
    first, chosen = (
        sum(float((crop == 0).float().mean()) <= 0.75 for crop in crops_of(labels, limit)) for limit in (1.0, 0.75)
    )
    assert 0 < first < 12 and chosen > 35, "eleven draws find what one crop in twenty shows"


def test_an_image_of_one_class_and_one_without_labels_are_cropped_all_the_same():
    assert all(crop.unique().tolist() == [3] for crop in crops_of(torch.full((50, 50), 3), 0.75))
    assert all(crop.unique().tolist() == [255] for crop in crops_of(torch.full((50, 50), 255), 0.75))


def test_ignored_pixels_are_not_among_those_that_a_class_fills():
    """In the left half a class fills all that is labelled, though that is little."""
    labels = torch.full((40, 100), 255)
    labels[:, 10:40:10] = 0
    labels[:, 50:] = torch.arange(50) % 4
    assert sum(int((crop == 2).any()) for crop in crops_of(labels, 0.75)) > 95
    assert sum(int((crop == 2).any()) for crop in crops_of(labels, 1.0)) < 85


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 2), st.floats(-180, 180), st.integers(0, 10**6))
def test_colours_shift_as_in_hsv(saturation: float, degrees: float, seed: int):
    image = torch.randint(0, 256, (3, 5, 6), generator=generator(seed), dtype=torch.uint8)
    image[:, 0, :3] = torch.tensor([[0, 255, 90], [0, 255, 90], [0, 255, 90]])  # greys, black and white
    image[:, 1, :3] = 255 * torch.eye(3)
    image = image.float() / 255
    out = shift_colours(image, saturation=saturation, degrees=degrees)
    for pixel, result in zip(image.flatten(1).T.tolist(), out.flatten(1).T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        expected = colorsys.hsv_to_rgb((h + degrees / 360) % 1, min(1.0, s * saturation), v)
        assert result == pytest.approx(expected, abs=2e-5)


def test_distortion_changes_each_property_half_of_the_time():
    image = torch.rand(3, 12, 12, generator=generator(9)) * 0.4 + 0.3
    outs = [distort(image.clone(), generator(seed)) for seed in range(400)]
    assert all(out.min() >= 0 and out.max() <= 1 for out in outs)
    assert 10 < sum(torch.equal(out, image) for out in outs) < 45, "one in sixteen"
    values = image.amax(0)
    ratios = [(out.amax(0) / values).mean() for out in outs]  # of brightness and contrast alone
    assert 70 < sum(math.isclose(r, 1, abs_tol=1e-6) for r in ratios) < 130, "a quarter has neither"
    assert min(ratios) < 0.6 and max(ratios) > 1.4
    assert max(ratios) <= 1.5 * 1.5


def test_grey_stays_grey_and_no_hue_means_none():
    grey = torch.rand(1, 6, 6, generator=generator()).repeat(3, 1, 1)
    colour = torch.rand(3, 6, 6, generator=generator())
    turned = 0
    for seed in range(40):
        out = distort(grey.clone(), generator(seed))
        assert (out.amax(0) - out.amin(0)).max() < 1e-6
        with_hue, without = (distort(colour.clone(), generator(seed), hue=hue) for hue in (HUE, 0.0))
        turned += not torch.allclose(with_hue, without, atol=1e-4)
        assert torch.equal(without.argmax(0)[without.amax(0) < 1], colour.argmax(0)[without.amax(0) < 1])
    assert 10 < turned < 30 and SATURATION[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, "flip is a probability"),
        ({"noise": -1}, "noise is at least 0"),
        ({"scales": (480,), "zoom": (0.5, 2.0)}, "use one of them"),
        ({"base": (512, 2048), "zoom": (0.5, 2.0)}, "use one of them"),
        ({"base": (2048, 512)}, r"base is the \(short, long\) edge"),
        ({"base": (0, 512)}, r"base is the \(short, long\) edge"),
        ({"ratio_range": (2.0, 0.5)}, "smallest, largest"),
        ({"ratio_range": (0.0, 0.5)}, "smallest, largest"),
        ({"cat_max_ratio": 0.0}, "cat_max_ratio is a share"),
        ({"hue": 200.0}, "hue is 0 to 180"),
        ({"crop": (0, 20)}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        SemanticAugmentConfig(**options)


def test_settings_survive_json():
    for config in (SemanticAugmentConfig.paper(480, base=(520, 520)), PLAIN, replace(PLAIN, zoom=(0.5, 2.0))):
        assert from_json(SemanticAugmentConfig, to_json(config)) == config
    assert SemanticAugmentConfig.paper(512).base == (512, 2048)
