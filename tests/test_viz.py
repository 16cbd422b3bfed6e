"""Pictures: what is drawn where."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from sievit import viz


def detections(*, count: int = 1, score: float = 0.9, size: tuple[int, int] = (40, 60)) -> dict[str, Tensor]:
    """`count` objects on the pixels 10..30 x 10..20 of an image of `size`."""
    masks = torch.zeros(count, 1, *size, dtype=torch.bool)
    masks[:, :, 10:20, 10:30] = True
    return {
        "boxes": torch.tensor([[10.0, 10.0, 30.0, 20.0]]).repeat(count, 1),
        "labels": torch.ones(count, dtype=torch.long),
        "scores": torch.full((count,), score),
        "masks": masks,
    }


def test_objects_are_drawn_where_they_are_and_low_scores_are_not():
    image = torch.full((3, 40, 60), 0.5)
    drawn = np.asarray(viz.predictions(image, detections(), ["thing"], box=(600, 400)))
    assert drawn.shape == (400, 600, 3)
    touched = (drawn != 128).any(2)
    assert touched[105:195, 105:295].all()  # mask and box
    assert not touched[210:].any()
    assert not touched[:, 310:].any()
    assert not touched[:80].any()  # the label stands right above the box

    image = torch.full((3, 40, 60), 0.5)
    drawn = np.asarray(viz.predictions(image, detections(score=0.3), ["thing"], box=(60, 40)))
    assert (drawn == 128).all()


def test_mask_layouts_are_equal_masks_are_optional_and_images_may_be_grey():
    image = torch.rand(3, 40, 60)
    found = detections()
    flat = {**found, "masks": found["masks"][:, 0]}
    boxes_only = {name: value for name, value in found.items() if name != "masks"}
    four, three, none = (np.asarray(viz.predictions(image, d, ["a", "b"])) for d in (found, flat, boxes_only))
    assert (four == three).all()
    assert (four != none).any()

    grey = viz.to_pil(torch.rand(3, 40, 60)).convert("L")
    assert viz.predictions(grey, detections(), ["thing"]).mode == "RGB"


@pytest.mark.parametrize("count", [0, 3, 60])
def test_any_number_of_objects_and_boxes_at_the_border(count: int):
    image = torch.rand(3, 40, 60)
    found = detections(count=count)
    found["boxes"] += torch.tensor([-15.0, -12.0, 45.0, 30.0])  # beyond every side
    assert viz.predictions(image, found, ["thing"]).size == (960, 640)


def test_skipped_tokens_are_faded_at_their_place():
    keep = torch.ones(1, 80, 120, dtype=torch.bool)
    keep[:, :, :32] = False
    drawn = np.asarray(viz.keep_maps(torch.ones(3, 40, 60), keep, width=600))
    panel = drawn[22 : 22 + 400]
    assert (panel[:, 161:600] == 255).all()
    assert (panel[:, :159] < 200).all()


def test_heat_map_counts_blocks():
    keep = torch.tensor([[True, True], [True, False], [True, False], [True, False]])[:, None]
    pixels = np.asarray(viz.heat_map(torch.ones(3, 16, 32), keep.float().mean(0), box=(320, 160))).astype(int)
    assert (pixels[:, :160] == pixels[0, 0]).all()
    assert (pixels[:, 160:] == pixels[0, -1]).all()
    assert pixels[0, 0].sum() > pixels[0, -1].sum()


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_figure_takes_any_number_of_panels(count: int):
    image, keep = torch.rand(3, 40, 60), torch.rand(5, 6, 8) < 0.5
    panels = [viz.Panel(f"model {i}", "a note", partial(viz.label_map, image, torch.zeros(20, 30), viz.PALETTE))
              for i in range(count)]  # fmt: skip
    heat = viz.heat_panel(image, keep)
    drawn = viz.figure(image, [*panels, heat], below=[partial(viz.legend, [("a", None), ("b", viz.INK)])], columns=3)
    assert drawn.width == 1640
    assert np.asarray(drawn).std() > 0
