"""Views of images: boxes, masks and pixels stay together, and what a crop leaves of an object is judged sensibly."""

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

from sievit.config import ConfigError, from_json, to_json
from sievit.data.coco import CocoDetection
from sievit.data.masks import Masks
from sievit.data.transforms import Augment, AugmentConfig, View, apply_view, draw_view, jitter

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
        "area": masks.areas,
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


def test_crops_are_windows_of_the_image_everywhere():
    image, target = scene((30, 40), 3)
    corners = set()
    for seed in range(200):
        out, _ = Augment(replace(PLAIN, crop=(20, 25)))(image, target, generator(seed))
        y, x = (int(v) for v in (out[:2, 0, 0] * 255).round())
        assert torch.equal((out * 255).round().to(torch.uint8), image[:, y : y + 20, x : x + 25])
        corners.add((y, x))
    assert {y for y, _ in corners} == set(range(11)) and {x for _, x in corners} == set(range(16))


def test_a_crop_larger_than_the_image_is_the_image():
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
    ("options", "message"),
    [
        ({"flip": 1.5}, "flip is a probability"),
        ({"noise": -1}, "noise is at least 0"),
        ({"scales": (480,), "zoom": (0.5, 2.0)}, "use one of them"),
        ({"zoom": (2.0, 0.5)}, "smallest, largest"),
        ({"crop_first": 0.5}, "crop_first scales"),
        ({"crop": (0, 20)}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**options)


def test_settings_survive_json():
    config = replace(AugmentConfig.paper(), crop=(320, 320), noise=0.1)
    assert from_json(AugmentConfig, to_json(config)) == config
    assert from_json(AugmentConfig, to_json(PLAIN)) == PLAIN


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
