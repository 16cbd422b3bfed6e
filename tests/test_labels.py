"""Images and labels that belong together are found, read as they are stored, and what is wrong is named; the classes of
the papers' data sets are whole."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sievit.config import ConfigError
from sievit.data.label_files import read_names, read_palette
from sievit.data.labels import LabelDataset
from sievit.data.presets import PRESETS, LabelPreset, preset
from sievit.data.semantic import SemanticAugment, SemanticAugmentConfig
from sievit.data.truth import Truth
from tiny import random_pixels, refused, write_image

SIZE = (6, 9)


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return random_pixels(seed, *size, 3)


def truth(seed: int, classes: int = 4, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng([1, seed]).integers(0, classes, size, dtype=np.uint8)


def folders(root: Path, names: tuple[str, ...] = ("a", "b", "c")) -> tuple[Path, Path]:
    for seed, name in enumerate(names):
        write_image(root / "images" / f"{name}.png", picture(seed))
        write_image(root / "labels" / f"{name}.png", truth(seed))
    return root / "images", root / "labels"


def one(root: Path, label: np.ndarray | Image.Image, **options: Any) -> LabelDataset:
    """A data set of a single image with this label."""
    images, labels = folders(root, ("a",))
    stored = label if isinstance(label, Image.Image) else Image.fromarray(label)
    stored.save(labels / "a.png")
    options = {"classes": 4, **options}
    return LabelDataset(images, labels, **options)


def test_images_and_labels_as_they_are_stored(tmp_path: Path):
    images, labels = folders(tmp_path)
    data = LabelDataset(images, labels, classes=4)
    assert len(data) == 3 and data.names == ("a", "b", "c") and len(data.classes) == 4 and data.palette == ()
    assert pickle.loads(pickle.dumps(data)).names == data.names, "workers may be spawned"
    assert data.files(1) == (images / "b.png", labels / "b.png") and data.source == str(labels)
    for index in range(3):
        image, target = data[index]
        assert image.dtype == torch.float32 and target["labels"].dtype == torch.int64
        assert np.array_equal((image * 255).round().byte().permute(1, 2, 0), picture(index))
        assert np.array_equal(target["labels"], truth(index)) and target["image_id"] == index


def test_pairs_of_nested_folders_with_suffixes(tmp_path: Path):
    """Cityscapes: other files of the same image stand beside those that are meant."""
    for seed, name in enumerate(("ulm/ulm_0_1", "bonn/bonn_7_2")):
        write_image(tmp_path / "leftImg8bit" / "train" / f"{name}_leftImg8bit.png", picture(seed))
        for kind, pixels in (("labelTrainIds", truth(seed)), ("color", picture(9)), ("instanceIds", truth(9))):
            write_image(tmp_path / "gtFine" / "train" / f"{name}_gtFine_{kind}.png", pixels)
    data = LabelDataset(
        tmp_path / "leftImg8bit" / "train",
        tmp_path / "gtFine" / "train",
        classes=4,
        image_suffix="_leftImg8bit.png",
        label_suffix="_gtFine_labelTrainIds.png",
    )
    assert data.names == ("bonn/bonn_7_2", "ulm/ulm_0_1")
    assert data.files(1)[1].name == "ulm_0_1_gtFine_labelTrainIds.png"
    assert np.array_equal(data[1][1]["labels"], truth(0))


def test_other_extensions_and_one_folder_for_both(tmp_path: Path):
    write_image(tmp_path / "a.b.jpg", picture(0))
    write_image(tmp_path / "a.b.png", truth(0))
    data = LabelDataset(tmp_path, tmp_path, classes=4, image_suffix=".jpg", label_suffix=".png")
    assert data.names == ("a.b",) and np.array_equal(data[0][1]["labels"], truth(0))


@pytest.mark.parametrize("kind", ["palette", "16 bits", "32 bits", "bilevel", "grey tiff"])
def test_every_way_to_store_labels(tmp_path: Path, kind: str):
    values = truth(0, classes=2 if kind == "bilevel" else 4)
    label = Image.fromarray(values)
    if kind == "palette":
        label.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
        assert label.mode == "P"
    if kind == "16 bits":
        label = Image.fromarray(values.astype(np.uint16))
    if kind == "bilevel":
        label = Image.fromarray(values.astype(bool))
    data = one(tmp_path, label)
    if kind == "32 bits":
        label = Image.fromarray(values.astype(np.int32))
    if kind in ("grey tiff", "32 bits"):
        (tmp_path / "labels" / "a.png").unlink()
        label.save(tmp_path / "labels" / "a.TIF")
        data = LabelDataset(tmp_path / "images", tmp_path / "labels", classes=4)
    assert np.array_equal(data[0][1]["labels"], values)


def test_zero_is_ignored_as_in_ade20k(tmp_path: Path):
    values = np.array([[0, 1, 2, 3], [4, 255, 0, 1]], dtype=np.uint8)
    write_image(tmp_path / "images" / "a.png", picture(0, (2, 4)))
    write_image(tmp_path / "labels" / "a.png", values)
    where = (tmp_path / "images", tmp_path / "labels")
    data = LabelDataset(*where, classes=4, zero_is_ignored=True)
    assert data[0][1]["labels"].tolist() == [[255, 0, 1, 2], [3, 255, 255, 0]]
    data = LabelDataset(*where, classes=254, zero_is_ignored=True, ignore_index=254)
    with pytest.raises(ConfigError, match="value 255"):  # 254 is the last class, ignored only after it is read
        data[0]
    data = LabelDataset(*where, classes=256, zero_is_ignored=True, ignore_index=-100)
    assert data[0][1]["labels"].tolist() == [[-100, 0, 1, 2], [3, 254, -100, 0]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"label_map": {-1: 255, 1: 0, 3: 1, 2: 255}, "classes": 2}, (255, 0, 255, 1)),
        ({"label_map": {0: 0, 1: 1, 2: 2}, "classes": 3, "ignore_index": -100}, (0, 1, 2, -100)),
        ({"palette": [(9, 9, 9)] * 4}, (0, 1, 2, 3)),
    ],
    ids=["label map", "ignored outside of bytes", "a palette for pictures alone"],
)
def test_values_become_classes(tmp_path: Path, options: dict[str, Any], expected: tuple[int, ...]):
    assert np.array_equal(one(tmp_path, truth(0), **options)[0][1]["labels"], np.array(expected)[truth(0)])


def test_many_classes_and_an_ignored_value_in_16_bits(tmp_path: Path):
    values = np.arange(54, dtype=np.uint16).reshape(SIZE) * 100
    values[0, 0] = 65535
    data = one(tmp_path, values, classes=6000, ignore_index=65535, cache_bytes=10**6)
    for _ in range(2):
        assert np.array_equal(data[0][1]["labels"], values)
    with pytest.raises(ConfigError, match="value 65535"):
        one(tmp_path, values, classes=6000, ignore_index=65534)[0]


def test_rgb_labels_need_a_palette(tmp_path: Path):
    colours = np.array([[0, 0, 0], [128, 64, 128], [1, 0, 0], [0, 0, 1]], dtype=np.uint8)
    data = one(tmp_path, colours[truth(0)], palette=[tuple(c) for c in colours.tolist()])
    assert np.array_equal(data[0][1]["labels"], truth(0)) and data.palette[1] == (128, 64, 128)
    (tmp_path / "palette.txt").write_text("0 0 0 sky, clear\n128,64,128 road\n\n1 0 0 ignore\n0, 0, 1 car\n")
    data = one(tmp_path, colours[truth(0)], palette=tmp_path / "palette.txt", classes=None)
    assert data.classes == ("sky, clear", "road", "car") and len(data.palette) == 3
    assert np.array_equal(data[0][1]["labels"], np.array([0, 1, 255, 2])[truth(0)])
    (tmp_path / "palette.json").write_text(json.dumps(colours[[0, 1, 3]].tolist()))
    data = one(tmp_path, colours[truth(0)], palette=str(tmp_path / "palette.json"), classes=3)
    with pytest.raises(ConfigError, match=r"a\.png: colour \(1, 0, 0\) \(\d+ pixels\) is not in the palette"):
        data[0]

    with pytest.raises(ConfigError, match=r"a\.png: is an RGB image.*give a palette"):
        one(tmp_path, picture(0))[0]
    with pytest.raises(ConfigError, match=r"colour \(0, 0, 0\) stands for two classes"):
        one(tmp_path / "x", picture(0), palette=[(0, 0, 0)] * 4)[0]

    path = tmp_path / "file"
    path.write_text("[[0, 0], [1, 2, 3]]")
    refused("2 values where 3 are expected", read_palette, path)
    path.write_bytes(b"\xff\xfe\x00")
    refused("cannot be read", read_names, path)


@pytest.mark.parametrize("listing", ["stems", "files", "coco"])
def test_names_choose_and_order_the_images(tmp_path: Path, listing: str):
    images, labels = folders(tmp_path, ("a", "b", "deep/c"))
    (images / "b.png").unlink()  # not asked for, so not missed
    names = tmp_path / "names"
    if listing == "coco":
        names.write_text(
            json.dumps({"images": [{"id": 9, "file_name": "deep/c.png"}, {"id": 1, "file_name": "a.png"}]})
        )
    else:
        names.write_text("\ufeffdeep/c\r\na\r\n\r\n" if listing == "stems" else "deep/c.png\na.png")
    data = LabelDataset(images, labels, classes=4, names_file=names)
    assert data.names == ("deep/c", "a") and np.array_equal(data[0][1]["labels"], truth(2))


def test_an_epoch_decides_the_draws_and_nothing_else_does(tmp_path: Path):
    images, labels = folders(tmp_path)

    def build(cache_bytes: int) -> LabelDataset:
        transform = SemanticAugment(SemanticAugmentConfig(crop=(4, 4), photometric=True, noise=0.1))
        return LabelDataset(images, labels, classes=4, transform=transform, seed=3, cache_bytes=cache_bytes)

    plain, cached = build(0), build(2 * (3 + 1) * 54)
    for epoch in range(3):
        cached.set_epoch(epoch)
        for index in (2, 0, 1):
            image, target = cached[index]
            expected, truth_ = plain.sample(index, epoch=epoch)
            assert torch.equal(image, expected) and torch.equal(target["labels"], truth_["labels"])
    assert len(cached._cache) == 2 and not plain._cache, "two images fit"
    assert not torch.equal(plain.sample(0, epoch=0)[0], plain.sample(0, epoch=1)[0])
    plain.sample(0, epoch=0)[0].zero_()
    cached.sample(2, epoch=0)[1]["labels"].zero_()
    assert torch.equal(cached.sample(2, epoch=0)[1]["labels"], plain.sample(2, epoch=0)[1]["labels"]), (
        "the cache is not handed out"
    )


def test_exif_does_not_turn_an_image_away_from_its_label(tmp_path: Path):
    """The labels tell which way up the image was annotated."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = picture(0)
    images, labels = tmp_path / "images", tmp_path / "labels"
    write_image(images / "stored.png", pixels, exif=exif)
    write_image(labels / "stored.png", truth(0))
    write_image(images / "upright.png", pixels, exif=exif)
    write_image(labels / "upright.png", truth(0, size=SIZE[::-1]))
    data = LabelDataset(images, labels, classes=4)
    assert np.array_equal((data[0][0] * 255).round().byte().permute(1, 2, 0), pixels)
    assert np.array_equal((data[1][0] * 255).round().byte().permute(1, 2, 0), np.rot90(pixels, -1))


def test_nuclei_split_by_the_coco_file(data_root: Path):
    root = data_root / "nuclei"
    sets = [
        LabelDataset(
            root / "images",
            root / "labels",
            classes=("background", "nucleus", "border"),
            names_file=root / "annotations" / f"instances_{split}.json",
        )
        for split in ("train", "val")
    ]
    assert [len(data) for data in sets] == [454, 108] and not set(sets[0].names) & set(sets[1].names)
    image, target = sets[1][0]
    assert image.shape[1:] == target["labels"].shape and target["labels"].unique().tolist() == [0, 1, 2]


Change = Callable[[Path], dict[str, Any]]
"""Does something wrong to the folders in a root, and returns options of the data set."""


def gone(path: Path) -> dict[str, Any]:
    path.unlink()
    return {}


def listed(root: Path, text: str, option: str = "names_file") -> dict[str, Any]:
    (root / "names.txt").write_text(text)
    return {option: root / "names.txt"}


def empty(root: Path, option: str) -> dict[str, Any]:
    (root / "empty").mkdir()
    return {option: root / "empty"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: {"images": root / "nowhere"}, r"nowhere: no such folder"),
        (lambda root: {"labels": root / "nowhere"}, r"nowhere: no such folder"),
        (lambda root: empty(root, "images"), r"empty: holds no images"),
        (lambda root: empty(root, "labels"), r"empty: holds no images"),
        (lambda root: gone(root / "labels/b.png"), r"images: 1 of 3 images have no label in .*labels: b \(.*; add the"),
        (
            lambda root: gone(root / "images/b.png"),
            r"1 of 3 labels have no image in .*images: b \(.*names_f",
        ),
        (lambda _: {"label_suffix": "_gt.png"}, r"labels: holds no label images that end with _gt\.png"),
        (
            lambda root: {"labels": write_image(root / "jpeg/a.jpg", truth(0)).parent},
            r"jpeg: .*JPEG changes",
        ),
        (
            lambda root: write_image(root / "images/a.jpg", picture(0)) and {},
            r"a\.jpg and .*a\.png: two images",
        ),
        (lambda root: listed(root, "a\nx\n"), r"names\.txt: 1 of its 2 names have no image in .*images: x"),
        (
            lambda root: {**gone(root / "labels/a.png"), **listed(root, "a\n")},
            r"1 of 1 images have no label .*: a",
        ),
        (lambda root: listed(root, "a\na.png\n"), r"names\.txt: names a more than once"),
        (lambda root: listed(root, "\n"), r"names\.txt: names no images"),
        (lambda root: {"names_file": root / "names.txt"}, r"names\.txt: cannot be read as a list of names"),
        (lambda root: listed(root, '{"images": [{"id": 1}]}'), r"names\.txt: .* has no 'file_name'"),
        (lambda _: {"ignore_index": 3}, r"ignore_index 3 is one of the 4 classes"),
        (lambda _: {"classes": None}, r"Give classes, their number or"),
        (lambda _: {"palette": [(0, 0, 0)]}, r"1 colours for 4 classes"),
        (lambda _: {"palette": [(0, 0, 256)] * 4}, "colours is 256"),
        (lambda root: listed(root, "0 0 0 sky\nroad\n", "palette"), r"names\.txt, line 2: 'road' is not"),
        (lambda root: listed(root, "", "palette"), r"names\.txt: holds no colours"),
        (lambda _: {"label_map": {1: 4}}, r"label_map: 1 becomes 4"),
        (lambda _: {"label_map": {1: 0}, "zero_is_ignored": True}, r"zero_is_ignored and label_map"),
    ],
)
def test_what_is_wrong_with_a_set_is_said_at_once(tmp_path: Path, change: Change, message: str):
    images, labels = folders(tmp_path)
    options: dict[str, Any] = {"images": images, "labels": labels, "classes": 4, **change(tmp_path)}
    refused(message, LabelDataset, **options)


def changed(*where: tuple[Any, int], dtype: type = np.uint8) -> np.ndarray:
    """Labels with other values at some positions."""
    values = truth(0).astype(dtype)
    for position, value in where:
        values[position] = value
    return values


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("labels", truth(0, size=(6, 8)), r"labels/a\.png: the labels are 8x6 pixels, their image .*/a\.png is 9x6"),
        (
            "labels",
            changed(((2, slice(3, 5)), 7)),
            r"labels/a\.png: value 7 \(2 pixels\) is none of the 4",
        ),
        ("labels", changed(((0, 0), -1), dtype=np.int32), r"labels/a\.png: value -1 \(1 pixels\)"),
        ("labels", 60, r"labels/a\.png: cannot be read as a label image"),
        ("images", 90, r"images/a\.png: cannot be read as an image"),
        ("labels", b"labels", r"labels/a\.png: cannot be read as a label image"),
        ("labels", None, r"labels/a\.png: no such label image"),
        ("images", None, r"images/a\.png: no such image"),
        ("labels", np.stack([truth(0)] * 2, axis=2), r"labels/a\.png: is an image of mode LA"),
        ("labels", truth(0).astype(np.float32), r"labels/a\.png: is an image of mode F"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_when_it_is_read(tmp_path: Path, file: str, content: Any, message: str):
    """The content is an image, bytes, so many bytes of the file, or nothing for no file."""
    data = LabelDataset(*folders(tmp_path, ("a", "b")), classes=4)
    path = tmp_path / file / "a.png"
    if content is None:
        path.unlink()
    elif isinstance(content, np.ndarray):
        write_image(path, content, format="png" if content.dtype == np.uint8 else "tiff")
    else:
        path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:content])
    with pytest.raises(ConfigError, match=message):
        data[0]
    assert np.array_equal(data[1][1]["labels"], truth(1)), "the others are as they were"


def panoptic(root: Path) -> dict[str, Any]:
    """A tiny panoptic set of one image; the content of its JSON."""
    ids = np.zeros((3, 4), dtype=np.int64)
    ids[0], ids[1], ids[2, :2] = 70000, 513, 3
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    write_image(root / "images" / "x.png", picture(0, (3, 4)))
    write_image(root / "masks" / "x.png", colours)
    segments = [
        {"id": 70000, "category_id": 7, "iscrowd": 0},
        {"id": 513, "category_id": 200},
        {"id": 3, "category_id": 7, "iscrowd": 1},
    ]
    return {
        "images": [{"id": 5, "file_name": "x.png", "height": 3, "width": 4}],
        "annotations": [{"image_id": 5, "file_name": "x.png", "segments_info": segments}],
        "categories": [
            {"id": 200, "name": "rug", "isthing": 0, "color": [1, 2, 3]},
            {"id": 7, "name": "train", "isthing": 1, "color": [4, 5, 6]},
        ],
    }


def test_panoptic_segments_are_labels_of_their_categories(tmp_path: Path):
    (tmp_path / "panoptic.json").write_text(json.dumps(panoptic(tmp_path)))
    data = LabelDataset(tmp_path / "images", tmp_path / "masks", panoptic=tmp_path / "panoptic.json")
    assert data.classes == ("rug", "train") and data.palette == ((1, 2, 3), (4, 5, 6)) and data.names == ("x",)
    image, target = data[0]
    assert target["labels"].tolist() == [[1] * 4, [0] * 4, [255] * 4], "crowds and pixels of no segment are ignored"
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0), picture(0, (3, 4)))


def of_segment(**changes: Any) -> Callable[[Path, Any], Any]:
    return lambda _, content: content["annotations"][0]["segments_info"][1].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_segment(id=514), r"masks/x\.png: segment 513 \(4 pixels\) is not among"),
        (lambda root, _: write_image(root / "masks/x.png", truth(0, size=(3, 4))), r"masks/x\.png: has one channel"),
        (lambda root, _: gone(root / "masks/x.png"), r"masks: 1 of the 1 panoptic PNGs that .* lists are missing: x\."),
        (lambda root, _: gone(root / "images/x.png"), r"images: 1 of the 1 images that .* lists are missing: x\.png"),
        (of_segment(category_id=8), r"segment of image 5 has the category 8"),
        (lambda _, c: c["annotations"][0].update(image_id=6), r"names the image 6"),
        (lambda _, c: c["annotations"].extend(c["annotations"]), r"image_id 5 occurs more than once"),
        (lambda _, c: c["images"].append({"id": 6, "file_name": "y.png"}), r"1 images have no annotation: y\.png"),
        (lambda _, c: c["categories"].append(c["categories"][0]), r"id 200 occurs more than once"),
        (
            lambda _, c: c.update(annotations=[{"id": 1, "image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1]}]),
            r"image_id 5 of 'annotations' has no 'file_name'",
        ),
        (lambda _, c: c["annotations"][0].__delitem__("segments_info"), r"has no 'segments_info'"),
        (lambda root, _: [{"image_id": 5}], r"results file"),
        (lambda root, _: "{", r"cannot be read as JSON"),
        (
            lambda root, _: write_image(root / "images/x.png", picture(0)),
            r"x\.png: the labels are 4x3 .*image .* 9x6",
        ),
    ],
)
def test_broken_panoptic_sets(tmp_path: Path, change: Callable[[Path, Any], Any], message: str):
    """A change of the content or the files, or (a list, a text) other content."""
    content: Any = panoptic(tmp_path)
    other = change(tmp_path, content)
    content = other if isinstance(other, list | str) else content
    (tmp_path / "panoptic.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        LabelDataset(tmp_path / "images", tmp_path / "masks", panoptic=tmp_path / "panoptic.json")[0]


def test_real_panoptic_files(data_root: Path):
    """The areas that COCO states are those of the labels."""
    root = data_root / "coco-mini"
    source = root / "annotations" / "panoptic_val.json"
    data = LabelDataset(root / "images", root / "annotations" / "panoptic_val", panoptic=source)
    content = json.loads(source.read_text())
    order = [category["id"] for category in content["categories"]]
    assert len(data) == 27 and len(data.classes) == 133 and data.classes[0] == "person"
    for index, annotation in enumerate(content["annotations"][:6]):
        areas = dict.fromkeys(range(133), 0)
        for segment in annotation["segments_info"]:
            areas[order.index(segment["category_id"])] += 0 if segment["iscrowd"] else segment["area"]
        labels = data[index][1]["labels"]
        counts = torch.bincount(labels[labels != 255], minlength=133).tolist()
        assert counts == list(areas.values())


# The papers' data sets.


SIZES = {
    "ade20k": 150,
    "coco_stuff10k": 171,
    "coco_stuff10k_ids": 171,
    "pascal_context59": 59,
    "pascal_context60": 60,
    "cityscapes": 19,
    "cityscapes_ids": 19,
}


def unpack(root: Path, chosen: LabelPreset, stored: np.ndarray) -> None:
    """One image for each part with these labels, and a third one that belongs to neither where lists say which do."""
    files = chosen.files(root)
    for part, stem in (("train", "one"), ("val", "deep/two")):
        black = np.zeros((*stored.shape, 3), dtype=np.uint8)
        images, labels, names = (files[f"{part}_{what}"] for what in ("images", "labels", "names"))
        assert images is not None and labels is not None
        for name in (stem, "other") if names else (stem,):
            write_image(images / f"{name}{chosen.image_suffix}", black)
            write_image(labels / f"{name}{chosen.label_suffix}", stored)
        if names:
            names.parent.mkdir(parents=True, exist_ok=True)
            names.write_text(f"{stem}\n")


def opened(root: Path, chosen: LabelPreset, part: str) -> LabelDataset:
    files = chosen.files(root)
    images = files[f"{part}_images"]
    assert images is not None
    truth = Truth(
        labels=files[f"{part}_labels"],
        names=files[f"{part}_names"],
        image_suffix=chosen.image_suffix,
        label_suffix=chosen.label_suffix,
        zero_is_ignored=chosen.zero_is_ignored,
    )
    return truth.open_labels(images, chosen.classes, values=chosen.values)


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
    for part, stem in (("train", "one"), ("val", "deep/two")):
        data = opened(tmp_path, chosen, part)
        assert data.names == (stem,) and data.classes == chosen.classes
        assert data[0][1]["labels"].tolist() == [[*range(count), *[255] * len(unknown)]]


def test_the_lists_agree_with_what_is_known_elsewhere_and_colours_tell_classes_apart():
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

    for name in ("cityscapes", "pascal_context60", "coco_stuff10k"):
        assert len(set(preset(name).palette)) == SIZES[name]
    assert len(set(preset("ade20k").palette)) >= 149, "the data set itself has one colour twice"
    assert torch.tensor(preset("ade20k").palette).shape == (150, 3)


def test_a_data_set_that_is_not_there(tmp_path: Path):
    refused("'cityscape'; did you mean 'cityscapes'", preset, "cityscape")
    refused(r"images/training: no such folder", opened, tmp_path, preset("ade20k"), "train")
