"""The papers' data sets: their classes are whole, and files that lie as they are unpacked are read as these classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sievit.config import ConfigError
from sievit.data.labels import LabelDataset
from sievit.data.presets import PRESETS, LabelPreset, Part, preset
from sievit.data.truth import Truth

SIZES = {
    "ade20k": 150,
    "coco_stuff10k": 171,
    "coco_stuff10k_ids": 171,
    "pascal_context59": 59,
    "pascal_context60": 60,
    "cityscapes": 19,
    "cityscapes_ids": 19,
}


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def unpack(root: Path, chosen: LabelPreset, stored: np.ndarray) -> None:
    """One image for each part with these labels, and a third one that belongs to neither where lists say which do."""
    for part, stem in ((chosen.train, "one"), (chosen.val, "deep/two")):
        for name in (stem, "other") if part.names else (stem,):
            save(root / part.images / f"{name}{chosen.image_suffix}", np.zeros((*stored.shape, 3), dtype=np.uint8))
            save(root / part.labels / f"{name}{chosen.label_suffix}", stored)
        if part.names:
            (root / part.names).parent.mkdir(parents=True, exist_ok=True)
            (root / part.names).write_text(f"{stem}\n")


def opened(root: Path, chosen: LabelPreset, part: Part) -> LabelDataset:
    truth = Truth(
        labels=root / part.labels,
        names=None if part.names is None else root / part.names,
        image_suffix=chosen.image_suffix,
        label_suffix=chosen.label_suffix,
        zero_is_ignored=chosen.zero_is_ignored,
    )
    return truth.open_labels(root / part.images, chosen.classes, values=chosen.values)


@pytest.mark.parametrize("name", PRESETS)
def test_classes_are_whole(name: str):
    chosen = preset(name)
    assert len(chosen.classes) == len(chosen.palette) == SIZES[name]
    assert len(set(chosen.classes)) == SIZES[name] and all(c == c.strip() and c for c in chosen.classes)
    assert chosen.values is None or len(set(chosen.values)) == SIZES[name]


@pytest.mark.parametrize("name", PRESETS)
def test_files_are_read_as_their_classes(name: str, tmp_path: Path):
    chosen, count = preset(name), SIZES[name]
    known = np.arange(count) + chosen.zero_is_ignored if chosen.values is None else np.array(chosen.values)
    unknown = [255] + [0] * (chosen.zero_is_ignored or chosen.values is not None)
    stored = np.array([*known, *unknown], dtype=np.uint8)[None]
    unpack(tmp_path, chosen, stored)
    for part, stem in ((chosen.train, "one"), (chosen.val, "deep/two")):
        data = opened(tmp_path, chosen, part)
        assert data.names == (stem,) and data.classes == chosen.classes
        assert data[0][1]["labels"].tolist() == [[*range(count), *[255] * len(unknown)]]


def test_where_the_lists_agree_with_what_is_known_elsewhere():
    stuff = preset("coco_stuff10k").classes
    assert (stuff[0], stuff[79]) == ("person", "toothbrush") and list(stuff[80:]) == sorted(stuff[80:])
    values = preset("coco_stuff10k_ids").values
    assert values is not None
    assert (values[0], values[79]) == (1, 90) and values[80:] == tuple(range(92, 183))
    context = preset("pascal_context60").classes
    assert context[0] == "background" and context[1:] == preset("pascal_context59").classes
    assert list(context[1:]) == sorted(context[1:])
    city = dict(zip(preset("cityscapes_ids").classes, preset("cityscapes_ids").values or (), strict=True))
    assert city["road"] == 7 and city["sky"] == 23 and city["car"] == 26 and city["bicycle"] == 33
    assert preset("ade20k").classes[:3] == ("wall", "building", "sky") and preset("ade20k").classes[-1] == "flag"


def test_colours_tell_classes_apart():
    for name in ("cityscapes", "pascal_context60", "coco_stuff10k"):
        assert len(set(preset(name).palette)) == SIZES[name]
    assert len(set(preset("ade20k").palette)) >= 149, "the data set itself has one colour twice"
    assert torch.tensor(preset("ade20k").palette).shape == (150, 3)


def test_a_data_set_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match="'cityscape'; did you mean 'cityscapes'"):
        preset("cityscape")
    with pytest.raises(ConfigError, match=r"images/training: no such folder"):
        opened(tmp_path, preset("ade20k"), preset("ade20k").train)
