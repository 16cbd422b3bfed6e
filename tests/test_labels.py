"""Images and labels that belong together are found, read as they are stored, and what is wrong is named."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sievit.config import ConfigError
from sievit.data.dataset import collate
from sievit.data.label_files import read_names, read_palette
from sievit.data.labels import LabelDataset
from sievit.data.scenes import CLASSES, generate
from sievit.data.semantic import SemanticAugment, SemanticAugmentConfig

SIZE = (6, 9)


def write(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def truth(seed: int, classes: int = 4, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng([1, seed]).integers(0, classes, size, dtype=np.uint8)


def folders(root: Path, names: tuple[str, ...] = ("a", "b", "c")) -> tuple[Path, Path]:
    for seed, name in enumerate(names):
        write(root / "images" / f"{name}.png", picture(seed))
        write(root / "labels" / f"{name}.png", truth(seed))
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
    assert data.path(1) == images / "b.png" and data.label_path(1) == labels / "b.png" and data.source == str(labels)
    for index in range(3):
        image, target = data[index]
        assert image.dtype == torch.float32 and target["labels"].dtype == torch.int64
        assert np.array_equal((image * 255).round().byte().permute(1, 2, 0), picture(index))
        assert np.array_equal(target["labels"], truth(index)) and target["image_id"] == index


def test_pairs_of_nested_folders_with_suffixes(tmp_path: Path):
    """Cityscapes: other files of the same image stand beside those that are meant."""
    for seed, name in enumerate(("ulm/ulm_0_1", "bonn/bonn_7_2")):
        write(tmp_path / "leftImg8bit" / "train" / f"{name}_leftImg8bit.png", picture(seed))
        for kind, pixels in (("labelTrainIds", truth(seed)), ("color", picture(9)), ("instanceIds", truth(9))):
            write(tmp_path / "gtFine" / "train" / f"{name}_gtFine_{kind}.png", pixels)
    data = LabelDataset(
        tmp_path / "leftImg8bit" / "train",
        tmp_path / "gtFine" / "train",
        classes=4,
        image_suffix="_leftImg8bit.png",
        label_suffix="_gtFine_labelTrainIds.png",
    )
    assert data.names == ("bonn/bonn_7_2", "ulm/ulm_0_1")
    assert data.label_path(1).name == "ulm_0_1_gtFine_labelTrainIds.png"
    assert np.array_equal(data[1][1]["labels"], truth(0))


def test_other_extensions_and_one_folder_for_both(tmp_path: Path):
    write(tmp_path / "a.b.jpg", picture(0))
    write(tmp_path / "a.b.png", truth(0))
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


def test_many_classes_in_16_bits(tmp_path: Path):
    values = np.arange(54, dtype=np.uint16).reshape(SIZE) * 100
    values[0, 0] = 65535
    data = one(tmp_path, values, classes=6000, ignore_index=65535, cache_bytes=10**6)
    for _ in range(2):
        assert np.array_equal(data[0][1]["labels"], values)


def test_zero_is_ignored_as_in_ade20k(tmp_path: Path):
    values = np.array([[0, 1, 2, 3], [4, 255, 0, 1]], dtype=np.uint8)
    write(tmp_path / "images" / "a.png", picture(0, (2, 4)))
    write(tmp_path / "labels" / "a.png", values)
    where = (tmp_path / "images", tmp_path / "labels")
    data = LabelDataset(*where, classes=4, zero_is_ignored=True)
    assert data[0][1]["labels"].tolist() == [[255, 0, 1, 2], [3, 255, 255, 0]]
    data = LabelDataset(*where, classes=254, zero_is_ignored=True, ignore_index=254)
    with pytest.raises(ConfigError, match="value 255"):  # 254 is the last class, ignored only after it is read
        data[0]
    data = LabelDataset(*where, classes=256, zero_is_ignored=True, ignore_index=-100)
    assert data[0][1]["labels"].tolist() == [[-100, 0, 1, 2], [3, 254, -100, 0]]


def test_label_map(tmp_path: Path):
    data = one(tmp_path, truth(0), label_map={-1: 255, 1: 0, 3: 1, 2: 255}, classes=2)
    expected = np.array([255, 0, 255, 1])[truth(0)]
    assert np.array_equal(data[0][1]["labels"], expected)


def test_ignored_values_outside_of_bytes(tmp_path: Path):
    values = truth(0)
    assert (one(tmp_path / "x", values, classes=3, label_map={0: 0, 1: 1, 2: 2}, ignore_index=-100)[0][1]["labels"]
            == torch.from_numpy(np.where(values == 3, -100, values.astype(int)))).all()  # fmt: skip


def test_rgb_labels_by_palette(tmp_path: Path):
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


def test_rgb_labels_without_a_palette(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"a\.png: is an RGB image.*give a palette"):
        one(tmp_path, picture(0))[0]
    with pytest.raises(ConfigError, match=r"colour \(0, 0, 0\) stands for two classes"):
        one(tmp_path / "x", picture(0), palette=[(0, 0, 0)] * 4)[0]


def test_a_palette_for_pictures_leaves_values_alone(tmp_path: Path):
    data = one(tmp_path, truth(0), palette=[(9, 9, 9)] * 4)
    assert np.array_equal(data[0][1]["labels"], truth(0))


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


def test_workers_follow_the_epoch(tmp_path: Path):
    images, labels = folders(tmp_path)
    transform = SemanticAugment(SemanticAugmentConfig(crop=(4, 4)))
    data = LabelDataset(images, labels, classes=4, transform=transform)
    assert pickle.loads(pickle.dumps(data)).names == data.names  # workers may be spawned
    loader = DataLoader(data, 3, num_workers=1, collate_fn=collate, persistent_workers=True)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        for _, targets in loader:
            for index, target in enumerate(targets):
                assert torch.equal(target["labels"], data.sample(index, epoch=epoch)[1]["labels"])


def test_exif_does_not_turn_an_image_away_from_its_label(tmp_path: Path):
    """The labels tell which way up the image was annotated."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = picture(0)
    images, labels = tmp_path / "images", tmp_path / "labels"
    write(images / "stored.png", pixels, exif=exif)
    write(labels / "stored.png", truth(0))
    write(images / "upright.png", pixels, exif=exif)
    write(labels / "upright.png", truth(0, size=SIZE[::-1]))
    data = LabelDataset(images, labels, classes=4)
    assert np.array_equal((data[0][0] * 255).round().byte().permute(1, 2, 0), pixels)
    assert np.array_equal((data[1][0] * 255).round().byte().permute(1, 2, 0), np.rot90(pixels, -1))


def test_generated_scenes_are_read(tmp_path: Path):
    generate(tmp_path, num_images=3, size=(48, 64), seed=4)
    data = LabelDataset(
        tmp_path / "images",
        tmp_path / "labels",
        classes=("ground", *CLASSES),
        names_file=tmp_path / "annotations.json",
    )
    annotations = json.loads((tmp_path / "annotations.json").read_text())["annotations"]
    for index in range(3):
        image, target = data[index]
        assert image.shape == (3, 48, 64)
        present = {a["category_id"] for a in annotations if a["image_id"] == index + 1}
        assert set(target["labels"].unique().tolist()) - {0} == present
    assert annotations, "a series without any object shows nothing"


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


def broken(tmp_path: Path, how: str) -> dict[str, Any]:
    """Options of a data set that something is wrong with."""
    images, labels = folders(tmp_path)
    options: dict[str, Any] = {"images": images, "labels": labels, "classes": 4}
    names = tmp_path / "names.txt"
    match how:
        case "no image folder":
            options["images"] = tmp_path / "nowhere"
        case "no label folder":
            options["labels"] = tmp_path / "nowhere"
        case "empty image folder":
            options["images"] = tmp_path / "empty"
            (tmp_path / "empty").mkdir()
        case "empty label folder":
            options["labels"] = tmp_path / "empty"
            (tmp_path / "empty").mkdir()
        case "no label":
            (labels / "b.png").unlink()
        case "no image":
            (images / "b.png").unlink()
        case "nothing ends so":
            options["label_suffix"] = "_gt.png"
        case "jpeg labels":
            options["labels"] = tmp_path / "jpeg"
            write(tmp_path / "jpeg" / "a.jpg", truth(0))
        case "one name twice":
            write(images / "a.jpg", picture(0))
        case "listed image is missing":
            names.write_text("a\nx\n")
            options["names_file"] = names
        case "listed label is missing":
            (labels / "a.png").unlink()
            names.write_text("a\n")
            options["names_file"] = names
        case "listed twice":
            names.write_text("a\na.png\n")
            options["names_file"] = names
        case "empty list":
            names.write_text("\n")
            options["names_file"] = names
        case "no list":
            options["names_file"] = names
        case "not coco":
            names.write_text('{"images": [{"id": 1}]}')
            options["names_file"] = names
        case "ignored class":
            options["ignore_index"] = 3
        case "no classes":
            options["classes"] = None
        case "short palette":
            options["palette"] = [(0, 0, 0)]
        case "no colour":
            options["palette"] = [(0, 0, 256)] * 4
        case "palette line":
            names.write_text("0 0 0 sky\nroad\n")
            options["palette"] = names
        case "empty palette":
            names.write_text("")
            options["palette"] = names
        case "map to no class":
            options["label_map"] = {1: 4}
        case "two meanings":
            options.update(label_map={1: 0}, zero_is_ignored=True)
    return options


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no image folder", r"nowhere: no such folder"),
        ("no label folder", r"nowhere: no such folder"),
        ("empty image folder", r"empty: holds no images"),
        ("empty label folder", r"empty: holds no images"),
        ("no label", r"images: 1 of 3 images have no label in .*labels: b \(.*; add the labels"),
        ("no image", r"labels: 1 of 3 labels have no image in .*images: b \(.*names_file"),
        ("nothing ends so", r"labels: holds no label images that end with _gt\.png"),
        ("jpeg labels", r"jpeg: holds no label images .*JPEG changes values"),
        ("one name twice", r"a\.jpg and .*a\.png: two images of one name"),
        ("listed image is missing", r"names\.txt: 1 of its 2 names have no image in .*images: x"),
        ("listed label is missing", r"1 of 1 images have no label in .*labels: a"),
        ("listed twice", r"names\.txt: names a more than once"),
        ("empty list", r"names\.txt: names no images"),
        ("no list", r"names\.txt: the list of names cannot be read"),
        ("not coco", r"names\.txt: .* has no 'file_name'"),
        ("ignored class", r"ignore_index 3 is one of the 4 classes"),
        ("no classes", r"Give classes, their number or"),
        ("short palette", r"1 colours for 4 classes"),
        ("no colour", r"\(0, 0, 256\) is not a colour"),
        ("palette line", r"names\.txt, line 2: 'road' is not"),
        ("empty palette", r"names\.txt: holds no colours"),
        ("map to no class", r"label_map: 1 becomes 4"),
        ("two meanings", r"zero_is_ignored and label_map"),
    ],
)
def test_what_is_wrong_with_a_set_is_said_at_once(tmp_path: Path, how: str, message: str):
    with pytest.raises(ConfigError, match=message):
        LabelDataset(**broken(tmp_path, how))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("size", r"labels/a\.png: the labels are 8x6 pixels, their image .*images/a\.png is 9x6"),
        ("value", r"labels/a\.png: value 7 \(2 pixels\) is none of the 4 classes and not ignored \(255\)"),
        ("negative", r"labels/a\.png: value -1 \(1 pixels\)"),
        ("truncated label", r"labels/a\.png: cannot be read as a label image"),
        ("truncated image", r"images/a\.png: cannot be read as an image"),
        ("text", r"labels/a\.png: cannot be read as a label image"),
        ("vanished label", r"labels/a\.png: no such label image"),
        ("vanished image", r"images/a\.png: no such image"),
        ("transparency", r"labels/a\.png: is an image of mode LA"),
        ("float", r"labels/a\.png: is an image of mode F"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_when_it_is_read(tmp_path: Path, how: str, message: str):
    images, labels = folders(tmp_path, ("a", "b"))
    image, label, values = images / "a.png", labels / "a.png", truth(0)
    data = LabelDataset(images, labels, classes=4)
    match how:
        case "size":
            write(label, truth(0, size=(6, 8)))
        case "value":
            values[2, 3:5] = 7
            write(label, values)
        case "negative":
            wide = values.astype(np.int32)
            wide[0, 0] = -1
            Image.fromarray(wide).save(label, format="tiff")
        case "truncated label":
            label.write_bytes(label.read_bytes()[:60])
        case "truncated image":
            image.write_bytes(image.read_bytes()[:90])
        case "text":
            label.write_text("labels")
        case "vanished label":
            label.unlink()
        case "vanished image":
            image.unlink()
        case "transparency":
            Image.fromarray(values).convert("LA").save(label)
        case "float":
            Image.fromarray(values.astype(np.float32)).save(label, format="tiff")
    with pytest.raises(ConfigError, match=message):
        data[0]
    assert np.array_equal(data[1][1]["labels"], truth(1)), "the others are as they were"


def test_the_ignored_value_is_no_class_even_where_it_could_be(tmp_path: Path):
    values = truth(0)
    values[0, 0] = 255
    assert one(tmp_path, values)[0][1]["labels"][0, 0] == 255
    with pytest.raises(ConfigError, match="value 255"):
        one(tmp_path, values, ignore_index=254)[0]


def test_names_and_palettes_that_cannot_be_read(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("[[0, 0], [1, 2, 3]]")
    with pytest.raises(ConfigError, match="is not a list of"):
        read_palette(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_names(path)


PANOPTIC_CATEGORIES = [
    {"id": 200, "name": "rug", "isthing": 0, "color": [1, 2, 3]},
    {"id": 7, "name": "train", "isthing": 1, "color": [4, 5, 6]},
]


def panoptic(root: Path) -> dict[str, Any]:
    """A tiny panoptic set of one image; the content of its JSON."""
    ids = np.zeros((3, 4), dtype=np.int64)
    ids[0], ids[1], ids[2, :2] = 70000, 513, 3
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    write(root / "images" / "x.png", picture(0, (3, 4)))
    write(root / "masks" / "x.png", colours)
    segments = [
        {"id": 70000, "category_id": 7, "iscrowd": 0},
        {"id": 513, "category_id": 200},
        {"id": 3, "category_id": 7, "iscrowd": 1},
    ]
    return {
        "images": [{"id": 5, "file_name": "x.png", "height": 3, "width": 4}],
        "annotations": [{"image_id": 5, "file_name": "x.png", "segments_info": segments}],
        "categories": PANOPTIC_CATEGORIES,
    }


def test_panoptic_segments_are_labels_of_their_categories(tmp_path: Path):
    (tmp_path / "panoptic.json").write_text(json.dumps(panoptic(tmp_path)))
    data = LabelDataset(tmp_path / "images", tmp_path / "masks", panoptic=tmp_path / "panoptic.json")
    assert data.classes == ("rug", "train") and data.palette == ((1, 2, 3), (4, 5, 6)) and data.names == ("x",)
    image, target = data[0]
    assert target["labels"].tolist() == [[1] * 4, [0] * 4, [255] * 4], "crowds and pixels of no segment are ignored"
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0), picture(0, (3, 4)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unlisted segment", r"masks/x\.png: segment 513 \(4 pixels\) is not among"),
        ("grey mask", r"masks/x\.png: has one channel"),
        ("no mask", r"masks: 1 of the 1 panoptic PNGs that .* lists are missing: x\.png"),
        ("no image", r"images: 1 of the 1 images that .* lists are missing: x\.png"),
        ("unknown category", r"segment of image 5 has the category 8"),
        ("unknown image", r"names the image 6"),
        ("image twice", r"image_id 5 occurs more than once"),
        ("no annotation", r"1 images have no annotation: y\.png"),
        ("category twice", r"id 200 occurs more than once"),
        ("instances file", r"image_id 5 of 'annotations' has no 'file_name'"),
        ("no segments", r"has no 'segments_info'"),
        ("results file", r"results file"),
        ("no json", r"is not a JSON file"),
        ("size", r"masks/x\.png: the labels are 4x3 pixels, their image .* is 9x6"),
    ],
)
def test_broken_panoptic_sets(tmp_path: Path, how: str, message: str):
    content: Any = panoptic(tmp_path)
    match how:
        case "unlisted segment":
            del content["annotations"][0]["segments_info"][1]
        case "grey mask":
            write(tmp_path / "masks" / "x.png", truth(0, size=(3, 4)))
        case "no mask":
            (tmp_path / "masks" / "x.png").unlink()
        case "no image":
            (tmp_path / "images" / "x.png").unlink()
        case "unknown category":
            content["annotations"][0]["segments_info"][1]["category_id"] = 8
        case "unknown image":
            content["annotations"][0]["image_id"] = 6
        case "image twice":
            content["annotations"] *= 2
        case "no annotation":
            content["images"].append({"id": 6, "file_name": "y.png"})
        case "category twice":
            content["categories"] = PANOPTIC_CATEGORIES + PANOPTIC_CATEGORIES[:1]
        case "instances file":
            content["annotations"] = [{"id": 1, "image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1]}]
        case "no segments":
            del content["annotations"][0]["segments_info"]
        case "results file":
            content = [{"image_id": 5}]
        case "size":
            write(tmp_path / "images" / "x.png", picture(0))
    (tmp_path / "panoptic.json").write_text("{" if how == "no json" else json.dumps(content))
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
