"""Annotation files that are damaged, odd or meant to harm: each ends in the right figures or in a clear error."""

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from hostile.mutate import mutate, spoilt
from hostile.small import SIZE, content, panoptic
from sievit.config import ConfigError
from sievit.data.annotations import load_annotations
from sievit.data.coco import CocoDetection
from sievit.data.label_files import read_names, read_palette
from sievit.data.labels import LabelDataset
from sievit.data.masks import ROUNDING, Masks, decode
from sievit.data.truth import Truth
from sievit.tasks.detection import CocoData, DetectionTask
from sievit.tasks.metrics import CocoMetric
from tiny import tiny_detector

ALWAYS_THE_SAME: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in (1, 2, 3):
        Image.new("RGB", SIZE[::-1], (40 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def written(folder: Path, document: Any) -> Path:
    path = folder / "instances.json"
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return path


def found(image: int) -> dict[str, Any]:
    """Detections in an image of `content`: its objects, some of them moved, and one that is not there."""
    objects = [a for a in content()["annotations"] if a["image_id"] == image]
    boxes = torch.tensor([[1.0, 1, 4, 4], *(a["bbox"] for a in objects)])
    boxes[2:, :2] += 1
    boxes[1:, 2:] += boxes[1:, :2]
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    labels = torch.tensor([2, *(a["category_id"] for a in objects)])
    return {"boxes": boxes, "labels": labels, "scores": 1 / torch.arange(1, len(boxes) + 1), "masks": masks}


def figures(document: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What a metric says of the detections of three images, and the results to write."""
    metric = CocoMetric(document)
    for place, image in enumerate(document["images"], start=1):
        metric.update(image["id"], found(place))
    return metric.compute(), metric.results


def use(path: Path, images: Path, **options: Any) -> None:
    """All that is done with an annotation file."""
    data = CocoDetection(images, path, **options)
    image_ids = [data[index][1]["image_id"] for index in range(len(data))]
    metric = CocoMetric(data.annotations, with_masks=data.with_masks)
    detection = found(1)
    for image_id in image_ids:
        metric.update(image_id, {**detection, "labels": torch.ones_like(detection["labels"])})
    assert all(-1 <= value <= 1 for value in metric.compute().values())


# ids


def numbered(
    image: Callable[[int], Any] = int, category: Callable[[int], Any] = int, annotation: Callable[[int], Any] = int
) -> dict[str, Any]:
    """The content with other ids in the same order."""
    document = content()
    for record in document["images"]:
        record["id"] = image(record["id"])
    for record in document["categories"]:
        record["id"] = category(record["id"])
    for record in document["annotations"]:
        record["id"] = annotation(record["id"])
        record["image_id"], record["category_id"] = image(record["image_id"]), category(record["category_id"])
    return document


ODD_IDS: dict[str, dict[str, Callable[[int], int]]] = {
    "annotations from 0": {"annotation": lambda i: i - 1},
    "negative annotations": {"annotation": lambda i: i - 4},
    "annotations over 64 bits": {"annotation": lambda i: 2**64 + i},
    "images from 0": {"image": lambda i: i - 1},
    "negative images": {"image": lambda i: i - 3},
    "images over 63 bits": {"image": lambda i: 2**63 + i},
    "images over 64 bits": {"image": lambda i: 2**70 + i},
    "images that are one float": {"image": lambda i: 2**53 + i},
    "categories from 0": {"category": lambda i: i - 1},
    "negative categories": {"category": lambda i: i - 5},
    "categories over 64 bits": {"category": lambda i: 2**70 + i},
}


@pytest.mark.parametrize("case", ODD_IDS)
def test_odd_ids_change_no_figure_and_are_written_as_they_are(case: str, images: Path):
    document = numbered(**ODD_IDS[case])
    clean, clean_results = figures(content())
    values, results = figures(document)
    assert values == clean and 0 < clean["mask_ap"] < 1 and 0 < clean["box_ap"] < 1
    image, category = ODD_IDS[case].get("image", int), ODD_IDS[case].get("category", int)
    assert [r["image_id"] for r in results] == [image(r["image_id"]) for r in clean_results]
    assert [r["category_id"] for r in results] == [category(r["category_id"]) for r in clean_results]
    data = CocoDetection(images, document)
    assert [data[i][1]["image_id"] for i in range(3)] == [image(i) for i in (1, 2, 3)]


def test_perfect_results_on_ids_from_0_score_one():
    document = numbered(image=lambda i: i - 1, category=lambda i: i - 1, annotation=lambda i: i - 1)
    metric = CocoMetric(document)
    for image in document["images"]:
        objects = [a for a in document["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in objects]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = Masks(tuple(decode(a["segmentation"], SIZE) for a in objects), SIZE).dense()
        labels = torch.tensor([a["category_id"] + 1 for a in objects])
        metric.update(
            image["id"], {"boxes": boxes, "labels": labels, "scores": torch.ones(len(objects)), "masks": masks}
        )
    values = metric.compute()
    assert values["box_ap"] == values["mask_ap"] == 1


@pytest.mark.parametrize("key", ["images", "categories", "annotations"])
@pytest.mark.parametrize("value", [True, 1.0, "1", None, 10**400], ids=["bool", "float", "text", "none", "huge"])
def test_an_id_that_is_no_whole_number_is_named(key: str, value: Any):
    document = content()
    document[key][0]["id"] = value
    with pytest.raises(ConfigError, match=r"(entry 0|number 0|annotation).* has no whole number 'id'"):
        load_annotations(document)


def test_areas_count_as_the_file_gives_them_and_as_pycocotools_counts_them():
    document = content()
    for annotation in document["annotations"]:
        annotation["area"] = 5000
    values, _ = figures(document)
    assert values["box_ap_medium"] > -1 and values["box_ap_small"] == -1, "sizes are those of the file"


@pytest.mark.parametrize("area", [-1, 1e11, math.nan, math.inf, True])
def test_an_area_that_the_evaluation_would_leave_out_is_an_error(area: float):
    document = content()
    document["annotations"][1]["area"] = area
    with pytest.raises(ConfigError, match=r"annotation 2 has .* as 'area'"):
        load_annotations(document)


def test_nothing_to_judge_by_is_said_of_the_file(tmp_path: Path, images: Path):
    for annotations in ([], content()["annotations"][2:3]):
        path = written(tmp_path, {**content(), "annotations": annotations})
        data = Truth(annotations=path).open_boxes(images, (1, 2))
        with pytest.raises(ConfigError, match=r"instances\.json: holds no objects to judge by"):
            CocoMetric(data.annotations, with_masks=False)


# polygons, run lengths and sizes


def test_polygons_far_outside_are_errors_before_they_are_drawn():
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("far_polygons.py"))],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300, "megabytes"


def test_polygons_that_stick_out_a_little_are_drawn_as_pycocotools_draws_them():
    rng = np.random.default_rng(3)
    for _ in range(30):
        polygon = (rng.random((5, 2)) * [SIZE[1] + 2 * ROUNDING, SIZE[0] + 2 * ROUNDING] - ROUNDING).ravel().tolist()
        reference = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([copy.copy(polygon)], *SIZE)))
        assert (Masks((decode([polygon], SIZE),), SIZE).dense()[0].numpy() == reference).all()
    document = content()
    document["annotations"][0]["segmentation"] = [[-ROUNDING, 1, 10, 1, 10, 7]]
    load_annotations(document)
    document["annotations"][0]["segmentation"] = [[-ROUNDING - 0.1, 1, 10, 1, 10, 7]]
    with pytest.raises(
        ConfigError, match=r"annotation 1 has polygons that reach 2\.1 pixels outside .* of 16x12 pixels"
    ):
        load_annotations(document)
    document["annotations"][0]["segmentation"] = [[17, 1, 18, 1, 18, 7]]
    with pytest.raises(ConfigError, match=r"annotation 1 has polygons that lie outside an image of 16x12 pixels"):
        load_annotations(document)


def test_polygons_of_real_data_are_as_pycocotools_draws_them(data_root: Path):
    content = json.loads((data_root / "coco-mini" / "annotations" / "instances_val.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    polygons = [a for a in content["annotations"] if isinstance(a["segmentation"], list)]
    for annotation in polygons[::9]:
        size = sizes[annotation["image_id"]]
        reference = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], *size)))
        assert (Masks((decode(annotation["segmentation"], size),), size).dense()[0].numpy() == reference).all()


PIXELS = SIZE[0] * SIZE[1]
BROKEN_RUNS: dict[str, Any] = {
    "no pair": {"size": 5, "counts": [PIXELS]},
    "size of floats": {"size": [12.0, 16.0], "counts": [PIXELS]},
    "size of bools": {"size": [True, True], "counts": [1]},
    "huge size": {"size": [2**70, 2**70], "counts": [2**140]},
    "over 64 bits": {"size": list(SIZE), "counts": [2**70]},
    "over and under": {"size": list(SIZE), "counts": [2**70, PIXELS - 2**70]},
    "sums that wrap": {"size": list(SIZE), "counts": [2**62, 2**62, 2**62, 2**62, PIXELS]},
    "floats": {"size": list(SIZE), "counts": [float(PIXELS)]},
    "bools": {"size": list(SIZE), "counts": [True, PIXELS - 1]},
    "not a number": {"size": list(SIZE), "counts": [math.nan]},
    "too few": {"size": list(SIZE), "counts": [PIXELS - 1]},
    "none": {"size": list(SIZE), "counts": []},
    "lists": {"size": list(SIZE), "counts": [[PIXELS]]},
    "an object": {"size": list(SIZE), "counts": {"0": PIXELS}},
    "a huge run": {"size": list(SIZE), "counts": "oooooooooooooooooO"},
}


@pytest.mark.parametrize("case", BROKEN_RUNS)
def test_broken_run_lengths_are_named(case: str):
    document = content()
    document["annotations"][1]["segmentation"] = BROKEN_RUNS[case]
    with pytest.raises(ConfigError, match="annotation 2 has"):
        load_annotations(document)
    if case not in ("no pair", "size of floats", "size of bools", "an object"):
        with pytest.raises(ValueError, match="run"):
            decode(BROKEN_RUNS[case], SIZE)


@pytest.mark.parametrize(
    "size", [(10**9, 10**9), (2**31, 1), (1, 2**70), (1e300, 5), (12.0, 16), (True, True), (-1, 5)]
)
def test_a_size_that_no_image_has_is_an_error_before_anything_is_made_of_it(size: tuple[Any, Any]):
    document = content()
    document["images"][0].update(height=size[0], width=size[1])
    document["annotations"][0].update(bbox=[0, 0, 1e9, 1e9], segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]])
    with pytest.raises(ConfigError, match=r"image 1 has|entry with id 1 of 'images' has .* as '(height|width)'"):
        load_annotations(document)


def test_a_size_that_the_file_does_not_have_is_an_error_before_masks_are_made(images: Path):
    document = content()
    document["images"][0].update(height=40_000, width=50_000)
    document["annotations"] = [
        {
            **document["annotations"][0],
            "bbox": [0, 0, 50_000, 40_000],
            "segmentation": {"size": [40_000, 50_000], "counts": [0, 2 * 10**9]},
        }
    ]
    with pytest.raises(ConfigError, match=r"1\.png: the image is 16x12 pixels, the annotation file says 50000x40000"):
        CocoDetection(images, document)[0]


# files


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path):
    mark = b"\xef\xbb\xbf"
    assert load_annotations(written(tmp_path, mark + json.dumps(content()).encode())).classes == ("class 1", "class 2")
    names, palette, listed = tmp_path / "names.txt", tmp_path / "palette.txt", tmp_path / "palette.json"
    names.write_bytes(mark + b"a\r\nb\r\n")
    palette.write_bytes(mark + b"1 2 3 road\r\n")
    listed.write_bytes(mark + b"[[1, 2, 3]]")
    assert read_names(names) == ["a", "b"]
    assert read_palette(palette).names == ("road",) and read_palette(listed).colours == ((1, 2, 3),)


DEEP = b"[" * 100_000
ODD_FILES = {
    "no text": (b"\x80\x81\xff", "cannot be read as a JSON file .*UTF-8"),
    "16 bits": ("{}".encode("utf-16"), "cannot be read as a JSON file .*UTF-8"),
    "nested lists": (DEEP, "cannot be read as JSON"),
    "nested objects": (b'{"a":' * 100_000, "cannot be read as JSON"),
    "nested and closed": (b'{"images": ' + DEEP + b"]" * 100_000 + b"}", "cannot be read as JSON"),
    "a key twice": (b'{"images": [], "images": []}', "the key 'images' more than once"),
    "a key twice below": (b'{"images": [{"id": 1, "id": 2}]}', "the key 'id' more than once"),
    "endless digits": (b'{"images": [{"id": ' + b"9" * 5000 + b"}]}", "cannot be read as JSON"),
    "not a number": (b'{"images": [{"id": NaN}]}', "entry 0 .* of 'images' has no whole number 'id'"),
    "infinite": (b'{"images": [{"id": 1, "file_name": "a", "width": Infinity}]}', "has inf as 'width'"),
}


@pytest.mark.parametrize("case", ODD_FILES)
def test_a_file_that_is_no_json_of_numbers_is_named(case: str, tmp_path: Path):
    data, message = ODD_FILES[case]
    with pytest.raises(ConfigError, match=rf"instances\.json: .*{message}"):
        load_annotations(written(tmp_path, data))


NO_COLOURS = (b"\x80\x81", b"[[1, 2, 1e999]]", b"[[1, 2, 3.7]]", b"[[1, 2, true]]", DEEP, b"[1]", b"1 2 300")


@pytest.mark.parametrize("data", [*NO_COLOURS, b"[[1, 2, " + b"9" * 5000 + b"]]", b"9" * 5000 + b" 1 1"])
def test_a_palette_of_no_colours_is_named(data: bytes, tmp_path: Path):
    (tmp_path / "palette").write_bytes(data)
    with pytest.raises(ConfigError, match="palette"):
        read_palette(tmp_path / "palette")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path, content())

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "read_text", refused)
    for reader in (load_annotations, read_names, read_palette):
        with pytest.raises(ConfigError, match=r"instances\.json.*Permission denied\); you may not read it") as raised:
            reader(path)
        assert "damaged" not in str(raised.value) and "replace" not in str(raised.value)


# advice


def test_the_advice_is_what_the_caller_can_do(tmp_path: Path, images: Path):
    document = content()
    document["annotations"][0]["bbox"] = [0, 0, 0, 0]
    path = written(tmp_path, document)
    with pytest.raises(ConfigError, match=r'zero area.*; correct the file, or pass invalid="skip" to leave'):
        CocoDetection(images, path)
    with pytest.raises(ConfigError, match=r"; correct the file$") as raised:
        Truth(annotations=path).open_boxes(images, (1, 2))
    assert "invalid" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"; correct the file, or --data\.invalid skip to leave"):
        CocoDetection(images, path, advice={"invalid": "--data.invalid skip"})


def test_errors_on_what_to_judge_by_name_options_and_no_kind_of_model(images: Path):
    truths = (Truth(), Truth(labels=images), Truth(annotations=images), Truth(annotations=images, labels=images))
    for truth in truths:
        for opened in (truth.open_boxes, truth.open_labels):
            with pytest.raises(ConfigError) as raised:
                opened(images, ())
            assert "detector" not in str(raised.value) and "segmenter" not in str(raised.value)


@pytest.mark.parametrize("options", [{"ignore_index": 2**40}, {"label_map": {2**70: 0}}, {"label_map": {-(2**31): 0}}])
def test_values_that_no_pixel_has_are_an_error(options: dict[str, Any], images: Path):
    with pytest.raises(ConfigError, match="32 bits"):
        LabelDataset(images, images, classes=1, **options)


def test_training_says_how_its_command_leaves_annotations_out(tmp_path: Path, images: Path):
    document = content()
    document["annotations"][0]["bbox"] = [0, 0, 0, 0]
    path = written(tmp_path, document)
    data = CocoData(train_images=images, train_annotations=path, val_images=images, val_annotations=path)
    with pytest.raises(ConfigError, match=r"or --data\.invalid skip to leave such annotations out"):
        DetectionTask(tiny_detector(classes=("class 1", "class 2"))).open_training(data, tmp_path, seed=0)


# any change of any value


@settings(max_examples=100, **ALWAYS_THE_SAME)
@given(st.randoms())
def test_a_changed_file_is_used_or_named(random: Random):
    check_mutated(random)


def check_mutated(random: Random) -> None:
    """A mutated annotation file is used to the end, or refused with an error that names it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in (1, 2, 3):
            Image.new("RGB", SIZE[::-1], (40 * i, 0, 0)).save(Path(folder, f"{i}.png"), compress_level=0)
        document = mutate(content(), random)
        data = document if random.randrange(4) else spoilt(document, random)
        path = written(Path(folder), data)
        for options in ({}, {"invalid": "skip"}):
            try:
                use(path, Path(folder), **options)
            except ConfigError as error:
                names(error, folder)


def names(error: ConfigError, folder: str) -> None:
    """The error tells which file is meant."""
    assert folder in str(error), error


@settings(max_examples=80, **ALWAYS_THE_SAME)
@given(st.randoms())
def test_a_changed_panoptic_file_is_used_or_named(random: Random):
    check_mutated_panoptic(random)


def check_mutated_panoptic(random: Random) -> None:
    """As `check_mutated`, of COCO's panoptic format."""
    with tempfile.TemporaryDirectory() as folder:
        ids = np.full((2, 4), 513)
        ids[0] = 70000
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
        Path(folder, "masks").mkdir()
        for path in (Path(folder, "x.png"), Path(folder, "masks", "x.png")):
            Image.fromarray(colours).save(path)
        path = written(Path(folder), mutate(panoptic(), random))
        try:
            data = LabelDataset(Path(folder), Path(folder, "masks"), panoptic=path)
            for index in range(len(data)):
                data[index]
        except ConfigError as error:
            names(error, folder)


def test_a_segment_of_no_colour_is_no_name_for_pixels_of_no_segment(tmp_path: Path):
    document = panoptic()
    document["annotations"][0]["segments_info"][0]["id"] = 0
    with pytest.raises(ConfigError, match="id 0 of the 'segments_info' of image 5 has 0 as 'id'"):
        LabelDataset(tmp_path, tmp_path, panoptic=written(tmp_path, document))
