"""Generated scenes: repeatable, true to their annotations, varied, and written whole or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sievit.data.coco import CocoDetection
from sievit.data.scenes import CLASSES, draw, generate
from tiny import refused

SIZE = (128, 160)
DRAWN = [draw(seed=3, index=index, size=SIZE) for index in range(30)]


def test_a_scene_is_a_function_of_seed_index_and_size():
    again = draw(seed=3, index=7, size=SIZE)
    assert (again[0] == DRAWN[7][0]).all() and (again[2] == DRAWN[7][2]).all()
    assert [i.patch.box for i in again[1]] == [i.patch.box for i in DRAWN[7][1]]
    assert len({image.tobytes() for image, _, _ in DRAWN}) == len(DRAWN)
    assert (draw(seed=4, index=7, size=SIZE)[0] != DRAWN[7][0]).any()


def test_instances_and_labels_agree():
    for image, instances, labels in DRAWN:
        assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
        assert labels.shape == SIZE and labels.dtype == np.uint8
        seen = np.zeros(SIZE, dtype=np.uint8)
        for instance in instances:
            x0, y0, x1, y1 = instance.patch.box
            assert not seen[y0:y1, x0:x1][instance.patch.bits].any(), "two objects claim a pixel"
            seen[y0:y1, x0:x1][instance.patch.bits] = instance.label
        assert (seen == labels).all()


def test_scenes_vary_from_empty_to_crowded():
    counts = [len(instances) for _, instances, _ in DRAWN]
    assert min(counts) == 0 and max(counts) > 10 and len(set(counts)) > 5
    assert {i.label for _, instances, _ in DRAWN for i in instances} == set(range(1, len(CLASSES) + 1))
    assert np.std([image.mean() for image, _, _ in DRAWN]) > 15


@pytest.mark.parametrize("size", [(16, 16), (33, 200), (300, 17)])
def test_any_size(size: tuple[int, int]):
    for index in range(4):
        image, _, labels = draw(seed=0, index=index, size=size)
        assert image.shape == (*size, 3) and labels.shape == size


def test_files_are_a_coco_data_set(tmp_path: Path):
    for folder in ("a", "b"):
        generate(tmp_path / folder, num_images=6, size=SIZE, seed=3)
    data = CocoDetection(tmp_path / "a" / "images", tmp_path / "a" / "annotations.json")
    assert data.classes == CLASSES and len(data) == 6
    for index in range(6):
        image, target = data[index]
        drawn, instances, labels = DRAWN[index]
        assert ((image.numpy() * 255).round() == drawn.transpose(2, 0, 1)).all()
        assert target["boxes"].tolist() == [list(i.patch.box) for i in instances]
        assert target["labels"].tolist() == [i.label for i in instances]
        assert (np.asarray(Image.open(tmp_path / "a" / "labels" / f"{index:06d}.png")) == labels).all()
        for mask, label in zip(target["masks"].numpy(), target["labels"].tolist(), strict=True):
            assert (labels[mask > 0] == label).all()
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_a_killed_run_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def full_disk(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 7:
            os.ftruncate(descriptor, 10)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        generate(tmp_path, num_images=4, size=(32, 32))
    monkeypatch.undo()
    names = sorted(path.name for path in tmp_path.rglob("*.*"))
    assert names == sorted([f"00000{i}.png" for i in range(3)] * 2)
    generate(tmp_path, num_images=4, size=(32, 32))
    assert len(CocoDetection(tmp_path / "images", tmp_path / "annotations.json")) == 4


def test_numbers_that_make_no_sense_and_folders_in_use(tmp_path: Path):
    refused("size is 8; it has to be at least 16", draw, seed=0, index=0, size=(8, 64))
    refused("seed", draw, seed=-1, index=0, size=(64, 64))
    refused("num_images", generate, tmp_path, num_images=0)

    generate(tmp_path, num_images=1, size=(32, 32), seed=1)
    refused("holds a data set", generate, tmp_path, num_images=1, size=(32, 32), seed=1)
