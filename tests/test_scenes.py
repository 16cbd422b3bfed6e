"""Generated scenes: repeatable, true to their annotations, varied, and written whole or not at all."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sievit.config import ConfigError
from sievit.data import scenes
from sievit.data.coco import CocoDetection
from sievit.data.scenes import draw, generate
from sievit.data.shapes import CLASSES

SIZE = (128, 160)
DRAWN = [draw(seed=3, index=index, size=SIZE) for index in range(40)]


def test_a_scene_is_a_function_of_seed_index_and_size():
    for index in (0, 7):
        image, instances, labels = draw(seed=3, index=index, size=SIZE)
        assert (image == DRAWN[index][0]).all() and (labels == DRAWN[index][2]).all()
        assert [i.patch.box for i in instances] == [i.patch.box for i in DRAWN[index][1]]
    assert len({image.tobytes() for image, _, _ in DRAWN}) == len(DRAWN)
    assert (draw(seed=4, index=0, size=SIZE)[0] != DRAWN[0][0]).any()


def test_instances_and_labels_agree():
    for image, instances, labels in DRAWN:
        assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
        assert labels.shape == SIZE and labels.dtype == np.uint8
        seen = np.zeros(SIZE, dtype=np.uint8)
        for instance in instances:
            x0, y0, x1, y1 = instance.patch.box
            assert 0 <= x0 < x1 <= SIZE[1] and 0 <= y0 < y1 <= SIZE[0]
            window = seen[y0:y1, x0:x1]
            assert not window[instance.patch.bits].any(), "two objects claim a pixel"
            window[instance.patch.bits] = instance.label
        assert (seen == labels).all()


def test_scenes_vary_from_empty_to_crowded():
    counts = [len(instances) for _, instances, _ in DRAWN]
    shares = [(labels > 0).mean() for _, _, labels in DRAWN]
    assert min(counts) == 0 and max(counts) > 15 and len(set(counts)) > 8
    assert 0.03 < np.mean(shares) < 0.3 and max(shares) > 0.25
    drawn = {instance.label for _, instances, _ in DRAWN for instance in instances}
    assert drawn == set(range(1, len(CLASSES) + 1))
    assert np.std([image.mean() for image, _, _ in DRAWN]) > 15, "light and ground differ"


def test_colour_does_not_tell_the_class():
    """The mean colour of an object is as good as useless: classes overlap almost entirely in it."""
    colours: dict[int, list[np.ndarray]] = {label: [] for label in range(1, len(CLASSES) + 1)}
    for image, instances, _ in DRAWN:
        for instance in instances:
            x0, y0, x1, y1 = instance.patch.box
            colours[instance.label].append(image[y0:y1, x0:x1][instance.patch.bits].mean(0))
    means = np.stack([np.mean(values, 0) for values in colours.values()])
    spread = np.mean([np.std(values, 0).mean() for values in colours.values()])
    assert np.abs(means - means.mean(0)).max() < spread


def test_objects_differ_from_the_ground():
    """Along the edge of an object the picture changes, except in the most camouflaged scenes."""
    contrasts = []
    for image, instances, labels in DRAWN:
        grey = image.astype(np.float32)
        for instance in instances:
            x0, y0, x1, y1 = instance.patch.box
            around = grey[max(0, y0 - 3) : y1 + 3, max(0, x0 - 3) : x1 + 3]
            free = labels[max(0, y0 - 3) : y1 + 3, max(0, x0 - 3) : x1 + 3] == 0
            if free.any():
                inside = grey[y0:y1, x0:x1][instance.patch.bits].mean(0)
                contrasts.append(np.abs(inside - around[free].mean(0)).max())
    assert np.median(contrasts) > 20 and np.quantile(contrasts, 0.05) > 3


@pytest.mark.parametrize("size", [(16, 16), (33, 200), (300, 17)])
def test_any_size(size: tuple[int, int]):
    for index in range(4):
        image, _, labels = draw(seed=0, index=index, size=size)
        assert image.shape == (*size, 3) and labels.shape == size


def test_files_are_a_coco_data_set(tmp_path: Path):
    calls: list[tuple[int, int]] = []
    generate(tmp_path / "a", num_images=6, size=SIZE, seed=3, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 6) for i in range(1, 7)]
    data = CocoDetection(tmp_path / "a" / "images", tmp_path / "a" / "annotations.json")
    assert data.classes == CLASSES and len(data) == 6
    for index in range(6):
        image, target = data[index]
        drawn, instances, labels = DRAWN[index]
        assert ((image.numpy() * 255).round() == drawn.transpose(2, 0, 1)).all()
        assert target["boxes"].tolist() == [list(i.patch.box) for i in instances]
        assert target["labels"].tolist() == [i.label for i in instances]
        semantic = np.asarray(Image.open(tmp_path / "a" / "labels" / f"{index:06d}.png"))
        assert (semantic == labels).all()
        for mask, label in zip(target["masks"].numpy(), target["labels"].tolist(), strict=True):
            assert (semantic[mask > 0] == label).all()
    generate(tmp_path / "b", num_images=6, size=SIZE, seed=3)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_a_complete_folder_is_left_and_another_one_refused(tmp_path: Path):
    generate(tmp_path, num_images=2, size=(32, 32), seed=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    generate(tmp_path, num_images=2, size=(32, 32), seed=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before
    with pytest.raises(ConfigError, match="holds another data set"):
        generate(tmp_path, num_images=2, size=(32, 32), seed=2)
    (tmp_path / "annotations.json").write_text("broken")
    with pytest.raises(ConfigError, match="holds another data set"):
        generate(tmp_path, num_images=2, size=(32, 32), seed=1)


def test_a_killed_run_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, num_images=4, size=(32, 32), progress=killed)
    assert not (tmp_path / "annotations.json").exists()

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
    for path in tmp_path.rglob("*.png"):
        Image.open(path).load()
    generate(tmp_path, num_images=4, size=(32, 32))
    assert len(json.loads((tmp_path / "annotations.json").read_text())["images"]) == 4


def test_numbers_that_make_no_sense(tmp_path: Path):
    with pytest.raises(ConfigError, match="at least 16 pixels"):
        draw(seed=0, index=0, size=(8, 64))
    with pytest.raises(ConfigError, match="seed"):
        draw(seed=-1, index=0, size=(64, 64))
    with pytest.raises(ConfigError, match="num_images"):
        generate(tmp_path, num_images=0)


def test_no_object_is_hidden_too_far():
    seen = []
    canvas_finish = scenes._Canvas.finish

    def finish(canvas, rng, conditions):
        seen.extend(
            np.count_nonzero(canvas.ids == i) / canvas.full[i] for i in range(len(canvas.labels)) if canvas.labels[i]
        )
        return canvas_finish(canvas, rng, conditions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes._Canvas, "finish", finish)
        for index in range(20):
            draw(seed=3, index=index, size=SIZE)
    assert min(seen) >= scenes.LEAST_VISIBLE and min(seen) < 0.8
