"""Views of images: boxes, masks, labels and pixels stay together, what a crop leaves is judged sensibly, and colours
change as said."""

import colorsys
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.config import from_json, to_json
from sievit.data.coco import CocoDetection
from sievit.data.masks import Masks
from sievit.data.semantic import (
    HUE,
    SATURATION,
    SemanticAugment,
    SemanticAugmentConfig,
    distort,
    shift_colours,
)
from sievit.data.transforms import Augment, AugmentConfig, View, apply_view, draw_view, jitter
from tiny import refused

PLAIN = AugmentConfig(flip=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(size: tuple[int, int], count: int, seed: int = 0) -> tuple[torch.Tensor, dict[str, Any]]:
    """An image whose pixels are their own coordinates, and random ellipses on it with tight boxes."""
    height, width = size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = torch.from_numpy(np.stack([y % 256, x % 256, (y + x) % 256]).astype(np.uint8))
    dense = np.zeros((count, height, width), dtype=np.uint8)
    for mask in dense:
        cy, cx = rng.random(2) * size
        ry, rx = 1.5 + rng.random(2) * np.array(size) / 3
        mask[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1] = 1
    dense = dense[dense.any((1, 2))]
    masks = Masks.from_dense(dense)
    target = {
        "boxes": masks.boxes,
        "labels": torch.arange(1, len(dense) + 1),
        "masks": masks,
        "iscrowd": torch.zeros(len(dense), dtype=torch.int64),
        "area": masks.dense().sum((1, 2)).float(),
        "image_id": 5,
    }
    return image, target


def extents(masks: torch.Tensor) -> torch.Tensor:
    return Masks.from_dense(masks).boxes


SIZES = st.tuples(st.integers(8, 60), st.integers(8, 60))
CONFIGS = st.builds(
    AugmentConfig,
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    vertical_flip=st.sampled_from([0.0, 0.5]),
    rot90=st.booleans(),
    crop=st.none() | st.tuples(st.integers(4, 50), st.integers(4, 50)),
    zoom=st.none() | st.just((0.5, 2.0)),
    min_visible=st.sampled_from([0.0, 0.1, 0.5]),
)


@settings(deadline=None, max_examples=120)
@given(SIZES, st.integers(0, 6), CONFIGS, st.integers(0, 10**6))
def test_boxes_masks_and_image_agree(size: tuple[int, int], count: int, config: AugmentConfig, seed: int):
    image, target = scene(size, count, seed)
    out, result = Augment(config)(image, target, generator(seed))
    height, width = out.shape[1:]
    boxes, masks = result["boxes"], result["masks"]
    k = len(boxes)
    assert out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1
    assert masks.shape == (k, height, width) and masks.dtype == torch.uint8
    assert len(result["labels"]) == len(result["iscrowd"]) == len(result["area"]) == k and result["image_id"] == 5
    if config.crop and config.zoom is None:
        shapes = (size, size[::-1]) if config.rot90 else (size,)
        assert (height, width) in {(min(config.crop[0], h), min(config.crop[1], w)) for h, w in shapes}
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
    assert (boxes[:, [0, 2]] <= width).all() and (boxes[:, [1, 3]] <= height).all()
    assert masks.flatten(1).any(1).all() and (result["area"] == masks.flatten(1).sum(1)).all()
    if config.zoom is None:
        assert torch.equal(extents(masks), boxes)
    else:  # nearest neighbour may miss a thin tip, but nothing lies outside of the box
        beyond = (extents(masks) - boxes) * torch.tensor([-1, -1, 1, 1])
        assert (beyond <= 0.501).all()


@settings(deadline=None, max_examples=60)
@given(SIZES, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_every_symmetry_twice_or_inverted_is_identity(
    size: tuple[int, int], flip: bool, vertical_flip: bool, transpose: bool, seed: int
):
    image, target = scene(size, 4, seed)
    view = View((0, 0, *size), size, flip, vertical_flip, transpose)
    turned = (size[1], size[0]) if transpose else size
    back_flips = (vertical_flip, flip) if transpose else (flip, vertical_flip)
    back = View((0, 0, *turned), turned, *back_flips, transpose)
    first = apply_view(view, target, size, min_visible=0, min_side=0)
    second = apply_view(back, first, turned, min_visible=0, min_side=0)
    assert torch.equal(back.image(view.image(image)), image)
    assert torch.equal(second["masks"], target["masks"].dense())
    assert torch.allclose(second["boxes"], target["boxes"])
    assert torch.equal(extents(first["masks"]), first["boxes"])


def test_quarter_turns_are_rotations():
    image, _ = scene((7, 11), 0)
    seen = set()
    for seed in range(60):
        out = draw_view(replace(PLAIN, rot90=True), (7, 11), generator(seed)).image(image)
        turns = [k for k in range(4) if torch.equal(out, torch.rot90(image, k, (1, 2)))]
        assert len(turns) == 1
        seen.update(turns)
    assert seen == {0, 1, 2, 3}


def test_crops_are_windows_of_the_image_everywhere_and_no_larger():
    image, target = scene((30, 40), 3)
    corners = set()
    for seed in range(200):
        out, _ = Augment(replace(PLAIN, crop=(20, 25)))(image, target, generator(seed))
        y, x = (int(v) for v in (out[:2, 0, 0] * 255).round())
        assert torch.equal((out * 255).round().to(torch.uint8), image[:, y : y + 20, x : x + 25])
        corners.add((y, x))
    assert {y for y, _ in corners} == set(range(11)) and {x for _, x in corners} == set(range(16))

    image, target = scene((30, 40), 3)
    out, result = Augment(replace(PLAIN, crop=(64, 35)))(image, target, generator())
    assert out.shape == (3, 30, 35) and len(result["boxes"]) > 0


def boxes_target(boxes: list[list[float]]) -> dict[str, Any]:
    k = len(boxes)
    values = torch.tensor(boxes).reshape(-1, 4)
    area = (values[:, 2] - values[:, 0]) * (values[:, 3] - values[:, 1])
    return {"boxes": values, "labels": torch.arange(1, k + 1), "iscrowd": torch.zeros(k), "area": area, "image_id": 1}


def test_slivers_are_dropped_and_what_fills_the_crop_is_kept():
    boxes = [
        [0.0, 0.0, 10.5, 10.0],  # half a pixel of it is left
        [0.0, 20.0, 15.0, 30.0],  # a third is left
        [-500.0, -500.0, 600.0, 600.0],  # far larger than the crop, and fills it
        [60.0, 60.0, 62.0, 62.0],  # outside
        [12.0, 12.0, 14.0, 14.0],  # small, and whole
    ]
    view = View((10, 10, 40, 40), (80, 40))
    target = apply_view(view, boxes_target(boxes), (100, 100), min_visible=0.1, min_side=1)
    assert target["labels"].tolist() == [2, 3, 5]
    assert target["boxes"].tolist() == [[0, 20, 5, 40], [0, 0, 40, 80], [2, 4, 4, 8]]
    assert target["area"].tolist() == pytest.approx([100, 3200, 8], rel=1e-4)


def test_objects_without_a_pixel_left_are_dropped():
    """The box of a ring's sector lies in the crop, the ring does not."""
    dense = np.zeros((1, 40, 40), dtype=np.uint8)
    dense[0, 0, :] = dense[0, :, 0] = 1
    target = boxes_target([[0.0, 0.0, 40.0, 40.0]]) | {"masks": torch.from_numpy(dense)}
    out = apply_view(View((10, 10, 30, 30), (30, 30)), target, (40, 40), min_visible=0.1, min_side=1)
    assert out["boxes"].shape == (0, 4) and out["masks"].shape == (0, 30, 30) and len(out["labels"]) == 0


def test_cut_objects_get_the_extents_of_their_masks_and_others_keep_their_boxes():
    dense = np.zeros((2, 40, 40), dtype=np.uint8)
    dense[0, 0:20, 0:10] = dense[0, 15:20, 0:30] = 1  # an L, of which the crop sees the lower bar alone
    dense[1, 25:30, 25:30] = 1
    boxes = boxes_target([[0.0, 0.0, 30.0, 20.0], [24.75, 25.0, 30.25, 30.0]])
    out = apply_view(View((5, 12, 35, 28), (35, 28)), boxes | {"masks": torch.from_numpy(dense)}, (40, 40),
                     min_visible=0.1, min_side=1)  # fmt: skip
    assert out["boxes"].tolist() == [[0, 10, 18, 15], [12.75, 20, 18.25, 25]]


@settings(deadline=None, max_examples=80)
@given(SIZES, st.integers(1, 1500), st.integers(0, 10**6))
def test_multi_scale_keeps_the_ratio(size: tuple[int, int], short: int, seed: int):
    config = replace(PLAIN, scales=(short,), max_size=200)
    out = draw_view(config, size, generator(seed)).size
    factor = min(short / min(size), 200 / max(size))
    assert all(abs(o - s * factor) <= 0.5 or o == 1 for o, s in zip(out, size, strict=True))


def test_the_papers_views():
    config = AugmentConfig.paper()
    shapes, first_rects = set(), 0
    for seed in range(300):
        view = draw_view(config, (480, 640), generator(seed))
        assert 480 <= min(view.size) <= 800 and max(view.size) <= 1333 and not view.vertical_flip
        y, x, h, w = view.rect
        assert 0 <= y <= y + h <= 480 and 0 <= x <= x + w <= 640
        assert math.isclose(view.size[0] / h, view.size[1] / w, rel_tol=0.01)
        first_rects += (h, w) != (480, 640)
        shapes.add(view.size)
    assert 100 < first_rects <= 170 and len(shapes) > 100
    assert {min(draw_view(replace(config, crop_first=0), (480, 640), generator(s)).size) for s in range(200)} == set(
        range(480, 801, 32)
    )


def test_zoom_is_even_on_a_logarithmic_scale():
    config = replace(PLAIN, zoom=(0.5, 2.0))
    heights = [draw_view(config, (100, 100), generator(seed)).size[0] for seed in range(400)]
    assert min(heights) >= 50 and max(heights) <= 200
    assert 160 < sum(h < 100 for h in heights) < 240


def test_jitter_changes_light_within_bounds():
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    assert torch.equal(jitter(PLAIN, image, generator()), image.float() / 255)
    assert torch.allclose(jitter(replace(PLAIN, invert=1.0), image, generator()), 1 - image.float() / 255)
    for name in ("brightness", "contrast", "gamma", "noise"):
        values = [jitter(replace(PLAIN, **{name: 0.2}), image, generator(seed)) for seed in range(8)]
        assert all(v.min() >= 0 and v.max() <= 1 for v in values)
        assert all(not torch.equal(a, b) for a, b in pairwise(values)), name
        assert all((v - image / 255).abs().mean() < 0.25 for v in values), name
    grey = replace(PLAIN, saturation=0.5)
    assert torch.allclose(jitter(grey, image, generator()), image.float() / 255, atol=1e-6), "grey stays grey"
    image[0] += 40
    assert not torch.allclose(jitter(grey, image, generator()), image.float() / 255)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (AugmentConfig, {"flip": 1.5}, r"flip is 1\.5"),
        (AugmentConfig, {"noise": -1}, "noise is -1"),
        (AugmentConfig, {"scales": (480,), "zoom": (0.5, 2.0)}, "use one of them"),
        (AugmentConfig, {"zoom": (2.0, 0.5)}, "smallest, largest"),
        (AugmentConfig, {"crop_first": 0.5}, "crop_first scales"),
        (AugmentConfig, {"crop": (0, 20)}, "at least 1"),
        (SemanticAugmentConfig, {"noise": -1}, "noise is -1"),
        (SemanticAugmentConfig, {"base": (512, 2048), "zoom": (0.5, 2.0)}, "use one of them"),
        (SemanticAugmentConfig, {"base": (2048, 512)}, r"base is the \(short, long\) edge"),
        (SemanticAugmentConfig, {"base": (0, 512)}, "base is 0"),
        (SemanticAugmentConfig, {"ratio_range": (2.0, 0.5)}, "smallest, largest"),
        (SemanticAugmentConfig, {"ratio_range": (0.0, 0.5)}, r"ratio_range is 0\.0"),
        (SemanticAugmentConfig, {"class_crops": 0.5}, "class_crops places the crop; give its size"),
        (SemanticAugmentConfig, {"cat_max_ratio": 0.0}, r"cat_max_ratio is 0\.0"),
        (SemanticAugmentConfig, {"hue": 200.0}, r"hue is 200\.0"),
    ],
)
def test_settings_that_make_no_sense(config: type[AugmentConfig], options: dict[str, Any], message: str):
    refused(message, config, **options)


def test_crowded_real_images(data_root: Path):
    config = AugmentConfig(rot90=True, zoom=(0.7, 1.5), crop=(320, 320))
    root = data_root / "nuclei"
    data = CocoDetection(root / "images", root / "annotations" / "instances_val.json", transform=Augment(config))
    crowded = sorted(range(len(data)), key=lambda i: -len(data.annotations.objects[i]))[:3]
    for index in crowded:
        image, target = data[index]
        assert max(image.shape[1:]) <= 320 and target["masks"].shape[1:] == image.shape[1:]
        assert len(target["boxes"]) > 0
        assert (extents(target["masks"]) - target["boxes"]).abs().max() <= 1.01


# Of labels.


PLAIN_LABELS = SemanticAugmentConfig(flip=0.0, cat_max_ratio=1.0)


def ramp(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose pixels tell where they are, and labels that tell it too: 256 * y + x."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([y, x, (y + x) // 2]).astype(np.uint8)
    return torch.from_numpy(image), torch.from_numpy((256 * y + x).astype(np.int32))


ANY_SIZES = st.tuples(st.integers(2, 90), st.integers(2, 90))
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
@given(ANY_SIZES, CROPS, SCALES, st.booleans(), st.sampled_from([0.2, 1.0]), st.integers(0, 10**6))
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
    plain, target = SemanticAugment(PLAIN_LABELS)(image, {"labels": labels}, generator())
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


def crops_of(labels: torch.Tensor, cat_max_ratio: float, ignore_index: int = 255) -> list[torch.Tensor]:
    image = torch.zeros(3, *labels.shape, dtype=torch.uint8)
    augment = SemanticAugment(replace(PLAIN_LABELS, crop=(20, 20), cat_max_ratio=cat_max_ratio), ignore_index)
    return [augment(image, {"labels": labels}, generator(seed))[1]["labels"] for seed in range(100)]


def test_crops_of_a_single_class_are_drawn_again_but_not_for_ever():
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    labels[20:36, 60:76] = 1
    first, chosen = (
        sum(float((crop == 0).float().mean()) <= 0.75 for crop in crops_of(labels, limit)) for limit in (1.0, 0.75)
    )
    assert 0 < first < 12 and chosen > 35, "eleven draws find what one crop in twenty shows"

    assert all(crop.unique().tolist() == [3] for crop in crops_of(torch.full((50, 50), 3), 0.75))
    assert all(crop.unique().tolist() == [255] for crop in crops_of(torch.full((50, 50), 255), 0.75))


def test_crops_of_a_rare_class():
    labels = torch.zeros(60, 80, dtype=torch.uint8)
    labels[3:5, 70:72] = 1
    labels[50:, :] = 255
    often = SemanticAugment(replace(PLAIN_LABELS, crop=(20, 20), class_crops=1.0))
    never = SemanticAugment(replace(PLAIN_LABELS, crop=(20, 20)))
    seen = {}
    for name, augment in (("often", often), ("never", never)):
        views = (augment.draw_view(labels, torch.Generator().manual_seed(seed)) for seed in range(200))
        seen[name] = sum(bool((view.labels(labels) == 1).any()) for view in views)
    assert 0 < seen["never"] < 20 and 70 < seen["often"] < 130, "every second crop, for there are two classes"
    unknown = torch.full((30, 30), 255, dtype=torch.uint8)
    assert often.draw_view(unknown, torch.Generator()).size == (20, 20)


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


def test_settings_survive_json():
    for config in (replace(AugmentConfig.paper(), crop=(320, 320), noise=0.1), PLAIN):
        assert from_json(AugmentConfig, to_json(config)) == config
    of_labels = replace(PLAIN_LABELS, zoom=(0.5, 2.0))
    for config in (SemanticAugmentConfig.paper(480, base=(520, 520)), PLAIN_LABELS, of_labels):
        assert from_json(SemanticAugmentConfig, to_json(config)) == config
    assert SemanticAugmentConfig.paper(512).base == (512, 2048)
