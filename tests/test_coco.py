"""COCO files: everything the format allows comes out right, everything it forbids is named."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from sievit.config import ConfigError
from sievit.data.annotations import load_annotations
from sievit.data.coco import CocoDetection
from sievit.data.dataset import collate, sample_generator
from sievit.data.masks import Masks, decode, decode_counts, encode, tight_patch
from sievit.data.transforms import Augment, AugmentConfig
from sievit.heads.config import AnchorConfig
from sievit.tasks.detection import DetectionTask
from tiny import refused, tiny_detector, tiny_head

SIZE = (40, 50)
MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24))


def rle_of(box: tuple[int, int, int, int], *, compressed: bool) -> dict[str, Any]:
    x, y, w, h = box
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[y : y + h, x : x + w] = 1
    if compressed:
        rle = coco_mask.encode(np.asfortranarray(mask))
        return {"size": list(SIZE), "counts": rle["counts"].decode()}
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=0, append=0)), prepend=0).tolist()
    return {"size": list(SIZE), "counts": [*runs, SIZE[0] * SIZE[1] - sum(runs)]}


def content() -> dict[str, Any]:
    """Polygons, both RLE forms, a crowd, an image without objects, category ids with holes and out of order."""
    polygon = [[5, 5, 15, 5, 15, 25, 5, 25]]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIZE[1], "height": SIZE[0]} for i in (7, 3, 5)],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 4, "name": "ant"}, {"id": 17, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 17, "bbox": [5, 5, 10, 20], "segmentation": polygon, "area": 200,
             "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 90, "bbox": [20, 8, 6, 9], "iscrowd": 0, "area": 54,
             "segmentation": rle_of((20, 8, 6, 9), compressed=True)},
            {"id": 3, "image_id": 3, "category_id": 4, "bbox": [0, 0, 50, 40], "iscrowd": 1, "area": 2000,
             "segmentation": rle_of((0, 0, 50, 40), compressed=False)},
            {"id": 4, "image_id": 3, "category_id": 4, "bbox": [30, 10, 20.5, 10],
             "segmentation": rle_of((30, 10, 20, 10), compressed=False)},
        ],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in (7, 3, 5):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "instances.json").write_text(json.dumps(content()))
    return tmp_path


def ids(data: CocoDetection) -> list[int]:
    return [data[index][1]["image_id"] for index in range(len(data))]


def test_every_form_of_annotation(folder: Path):
    data = CocoDetection(folder, folder / "instances.json")
    assert data.classes == ("ant", "cat", "zebra") and data.category_ids == (4, 17, 90)
    assert ids(data) == [7, 3, 5] and data.sizes == (SIZE,) * 3 and data.with_masks
    image, target = data[0]
    assert image.shape == (3, *SIZE) and image.dtype == torch.float32
    assert (image == torch.from_numpy(np.array(Image.open(folder / "7.png"))).permute(2, 0, 1) / 255).all()
    assert target["labels"].tolist() == [2, 3] and target["image_id"] == 7
    assert target["boxes"].tolist() == [[5, 5, 15, 25], [20, 8, 26, 17]]
    assert target["masks"].shape == (2, *SIZE) and target["masks"].dtype == torch.uint8
    assert target["masks"].flatten(1).sum(1).tolist() == [200, 54]
    assert target["masks"][1, 8:17, 20:26].all() and target["masks"][0, 5:25, 5:15].all()


def test_images_without_objects_and_crowds(folder: Path):
    data = CocoDetection(folder, folder / "instances.json")
    _, target = data[2]
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, *SIZE) and len(target["labels"]) == 0
    assert data[1][1]["boxes"].tolist() == [[30, 10, 50, 20]], "clipped, and no crowd"
    with_crowds = CocoDetection(folder, folder / "instances.json", crowds=True)
    assert with_crowds[1][1]["iscrowd"].tolist() == [1, 0]
    assert with_crowds[1][1]["masks"][0].all()
    assert len(data.annotations.as_coco["annotations"]) == 4, "evaluation keeps the crowd"
    assert ids(CocoDetection(folder, folder / "instances.json", skip_empty=True)) == [7, 3]


def test_boxes_only(folder: Path):
    bare = content()
    for annotation in bare["annotations"]:
        del annotation["segmentation"]
    data = CocoDetection(folder, bare)
    assert not data.with_masks and "masks" not in data[0][1] and data[0][1]["area"].tolist() == [200, 54]
    message = r"annotation 1 has no segmentation and masks are needed.*with_masks=False"
    refused(message, CocoDetection, folder, bare, with_masks=True)
    mixed = content()
    mixed["annotations"][1]["segmentation"] = []
    refused(r"annotation 2 has no segmentation and others have one.*with_masks=False", CocoDetection, folder, mixed)
    assert "masks" not in CocoDetection(folder, mixed, with_masks=False)[0][1]


def test_a_broken_image_is_named(folder: Path):
    data = CocoDetection(folder, folder / "instances.json")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    (folder / "5.png").unlink()
    with pytest.raises(ConfigError, match=r"3\.png"):
        data[1]
    with pytest.raises(ConfigError, match=r"5\.png"):
        data[2]
    Image.new("RGB", (10, 10)).save(folder / "7.png")
    with pytest.raises(ConfigError, match="10x10 pixels, the annotation file says 50x40"):
        data[0]
    refused("no such folder of images", CocoDetection, folder / "gone", folder / "instances.json")


BROKEN_FILES = {
    "not there": (None, "cannot be read"),
    "not JSON": ("{]", "cannot be read as JSON"),
    "not text": (b"\xff\xfe\x00", "cannot be read as a JSON file"),
    "empty": ("", "cannot be read as JSON"),
    "a results file": ("[]", "results file"),
    "no images": ('{"annotations": [], "categories": []}', "has no 'images'"),
    "images no list": ('{"images": {}, "annotations": [], "categories": []}', "'images' is not a list"),
    "no categories": ('{"images": [], "annotations": [], "categories": []}', "'categories' is empty"),
    "no annotations": ('{"images": [], "categories": [{"id": 1, "name": "a"}]}', "has no 'annotations'"),
    "category without name": ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "id 1 of 'categories'"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_malformed_files(tmp_path: Path, case: str):
    text, message = BROKEN_FILES[case]
    path = tmp_path / "instances.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(rf"instances\.json.*{re.escape(message)}", load_annotations, path)


def change(key: str, place: int, **values: Any) -> dict[str, Any]:
    changed = content()
    changed[key][place].update(values)
    return changed


BROKEN_IMAGES = {
    "no file name": (change("images", 1, file_name=None), "id 3 of 'images'.*'file_name'"),
    "width as text": (change("images", 1, width="50"), "id 3 of 'images' has '50' as 'width'"),
    "no height": (change("images", 1, height=0), "id 3 of 'images' has 0 as 'height'"),
    "id as text": (change("images", 1, id="3"), "entry 1 .* of 'images'"),
    "image twice": (change("images", 1, id=7), "id 7 occurs more than once in 'images'"),
    "category twice": (change("categories", 1, id=90), "id 90 occurs more than once in 'categories'"),
}


@pytest.mark.parametrize("case", BROKEN_IMAGES)
def test_malformed_images_and_categories(case: str):
    refused(BROKEN_IMAGES[case][1], load_annotations, BROKEN_IMAGES[case][0])


DAMAGED = rle_of((20, 8, 6, 9), compressed=True)["counts"]
BROKEN_ANNOTATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown image": ({"image_id": 99}, "names the image 99"),
    "unknown category": ({"category_id": 99}, "names the category 99"),
    "zero area": ({"bbox": [3, 3, 0, 5]}, "zero area"),
    "negative width": ({"bbox": [3, 3, -4, 5]}, "zero area"),
    "outside": ({"bbox": [60, 3, 4, 5]}, "lies outside its 50x40 image 7"),
    "touching from outside": ({"bbox": [50, 3, 1, 5]}, "lies outside"),
    "sticking out": ({"bbox": [30, 3, 40, 5]}, "reaches 20 pixels outside"),
    "box of three": ({"bbox": [3, 3, 4]}, "as 'bbox'"),
    "box as text": ({"bbox": "3 3 4 4"}, "as 'bbox'"),
    "box of text": ({"bbox": [3, 3, 4, "5"]}, "as 'bbox'"),
    "box with NaN": ({"bbox": [3, 3, 4, float("nan")]}, "as 'bbox'"),
    "no box": ({"bbox": None}, "as 'bbox'"),
    "category as text": ({"category_id": "17"}, "no whole number 'category_id'"),
    "id used twice": ({"id": 1}, "used before"),
    "odd polygon": ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "polygon"),
    "short polygon": ({"segmentation": [[1, 2, 3, 4]]}, "polygon"),
    "polygon of text": ({"segmentation": [["a"] * 6]}, "polygon"),
    "flat polygon": ({"segmentation": [1, 2, 3, 4, 5, 6]}, "polygon"),
    "segmentation as text": ({"segmentation": "abc"}, "neither polygons nor RLE"),
    "RLE without size": ({"segmentation": {"counts": DAMAGED}}, "neither polygons nor RLE"),
    "RLE of another size": ({"segmentation": {"size": [9, 9], "counts": DAMAGED}}, r"size \[9, 9\]"),
    "RLE cut short": ({"segmentation": {"size": list(SIZE), "counts": DAMAGED[:-2]}}, "damaged mask"),
    "RLE with odd characters": ({"segmentation": {"size": list(SIZE), "counts": "\x01\x02"}}, "damaged mask"),
    "RLE not ASCII": ({"segmentation": {"size": list(SIZE), "counts": "äöü"}}, "damaged mask"),
    "RLE empty": ({"segmentation": {"size": list(SIZE), "counts": ""}}, "damaged mask"),
    "RLE too long": ({"segmentation": {"size": list(SIZE), "counts": [1000, 1000, 7]}}, "cover 2007 of 2000"),
    "RLE negative": ({"segmentation": {"size": list(SIZE), "counts": [-10, 2010]}}, "damaged mask"),
    "RLE of floats": ({"segmentation": {"size": list(SIZE), "counts": [1.5]}}, "neither a string nor a list"),
    "area as text": ({"area": "big"}, "as 'area'"),
    "iscrowd": ({"iscrowd": "no"}, "as 'iscrowd'"),
}


@pytest.mark.parametrize("case", BROKEN_ANNOTATIONS)
def test_invalid_annotations_are_named_or_skipped(case: str):
    values, message = BROKEN_ANNOTATIONS[case]
    broken = change("annotations", 1, **values)
    refused(rf'annotation {values.get("id", 2)} .*{message}.*invalid="skip"', load_annotations, broken)
    with pytest.warns(UserWarning, match="1 invalid annotations left out, first: "):
        kept = load_annotations(broken, invalid="skip")
    assert [a["id"] for a in kept.as_coco["annotations"]] == [1, 3, 4]


def test_annotations_are_objects_and_loading_leaves_the_content_alone():
    broken = content()
    broken["annotations"].append(5)
    refused(r"annotation number 4 .* is not an object", load_annotations, broken)

    before, given_content = content(), content()
    load_annotations(given_content)
    assert given_content == before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # Python 3.12 on fork
def test_one_seed_one_result_whatever_the_workers(folder: Path):
    def run(workers: int, *, seed: int = 0, epochs: int = 2) -> list[float]:
        config = AugmentConfig(zoom=(0.5, 1.5), crop=(24, 24), rot90=True, brightness=0.2, noise=0.1)
        data = CocoDetection(folder, folder / "instances.json", transform=Augment(config), seed=seed)
        loader = DataLoader(data, batch_size=2, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0)
        sums = []
        for epoch in range(epochs):
            data.set_epoch(epoch)
            for images, targets in loader:
                sums += [float(image.double().sum()) for image in images]
                sums += [float(target["masks"].sum()) for target in targets]
        return sums

    alone = run(0)
    assert run(0) == alone and run(1) == alone
    assert alone[:6] != alone[6:], "epochs differ"
    assert run(0, seed=1) != alone


def test_samples_depend_on_seed_epoch_and_index_alone(folder: Path):
    config = AugmentConfig(zoom=(0.5, 1.5), crop=(24, 24), noise=0.1)
    data = CocoDetection(folder, folder / "instances.json", transform=Augment(config), cache_bytes=10**6)
    first = data.sample(1, epoch=3)[0]
    torch.rand(5)
    data.sample(0, epoch=3)
    assert torch.equal(data.sample(1, epoch=3)[0], first), "also from the cache"
    seeds = {sample_generator(s, e, i).initial_seed() for s in range(4) for e in range(4) for i in range(4)}
    assert len(seeds) == 64


def test_the_cache_keeps_to_its_size_and_is_not_written_to(folder: Path):
    plain = CocoDetection(folder, folder / "instances.json")
    cached = CocoDetection(folder, folder / "instances.json", cache_bytes=13000)  # two images of 6000 and their masks
    for _ in range(2):
        for i in range(3):
            (a, s), (b, t) = plain[i], cached[i]
            assert torch.equal(a, b) and torch.equal(s["masks"], t["masks"]) and torch.equal(s["boxes"], t["boxes"])
            b.zero_()
            t["masks"].zero_()
    (folder / "7.png").unlink()
    (folder / "5.png").unlink()
    cached[0]
    with pytest.raises(ConfigError):
        cached[2]


@settings(deadline=None, max_examples=60)
@given(MASKS)
def test_rle_like_pycocotools(mask: np.ndarray):
    reference = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    size = (mask.shape[0], mask.shape[1])
    patch = decode({"size": list(size), "counts": reference["counts"].decode()}, size)
    assert (Masks((patch,), size).dense()[0].numpy() == mask).all()
    assert encode(patch, size)["counts"] == reference["counts"].decode()
    assert encode(tight_patch(mask), size)["counts"] == reference["counts"].decode()
    runs = decode_counts(reference["counts"]).tolist()
    assert (Masks((decode({"counts": runs}, size),), size).dense()[0].numpy() == mask).all()
    assert np.count_nonzero(patch.bits) == coco_mask.area(reference)
    if mask.any():
        x0, y0, x1, y1 = patch.box
        assert [x0, y0, x1 - x0, y1 - y0] == coco_mask.toBbox(reference).tolist()


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(bool, st.tuples(st.just(3), st.integers(1, 20), st.integers(1, 20))), st.data())
def test_rendering_is_indexing(dense: np.ndarray, data: st.DataObject):
    def index(size: int) -> np.ndarray:
        chosen = np.sort(data.draw(hnp.arrays(int, st.integers(0, 12), elements=st.integers(0, size - 1))))
        return chosen[::-1] if data.draw(st.booleans()) else chosen

    masks, rows, cols = Masks.from_dense(dense), index(dense.shape[1]), index(dense.shape[2])
    assert (masks.render(rows, cols).numpy() == dense[:, rows][:, :, cols]).all()
    assert (masks.dense().numpy() == dense).all()


def test_polygons_like_pycocotools():
    rng = np.random.default_rng(3)
    for _ in range(20):
        polygons = [(rng.random(2 * n) * 40).tolist() for n in rng.integers(3, 9, rng.integers(1, 4))]
        reference = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(copy.deepcopy(polygons), *SIZE)))
        assert (Masks((decode(polygons, SIZE),), SIZE).dense()[0].numpy() == reference).all()


def test_real_files(data_root: Path):
    for name, split in (("nuclei", "val"), ("coco-mini", "train"), ("coco-mini", "val")):
        root = data_root / name
        data = CocoDetection(root / "images", root / "annotations" / f"instances_{split}.json", crowds=True)
        for i in range(0, len(data), len(data) // 5):
            image, target = data[i]
            objects = data.annotations.objects[i]
            assert len(objects) == len(target["boxes"])
            for mask, annotation in zip(target["masks"].numpy(), objects, strict=True):
                rle: Any = annotation["segmentation"]
                if isinstance(rle, list) or isinstance(rle["counts"], list):
                    rle = coco_mask.frPyObjects(rle, *image.shape[1:])
                rle = coco_mask.merge(rle) if isinstance(rle, list) else rle
                assert (coco_mask.decode(rle) == mask).all()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        # to the model objects are twice as large: 12 pixels, and 60 to 80
        ((12, 80, 80, 80, 80), None),
        ((12, 12, 12, 12, 12), "50% of the training objects (mean over classes; tree 100%, pole 0%)"),
        ((300, 300, 300, 300, 300), "of 0.25 times the size it is 50%: --model.head.anchors.sizes.0 to .4, 75 75"),
    ],
)
def test_of_objects_that_no_anchor_fits_a_training_says_so(
    sizes: tuple[float, ...], said: str | None, tmp_path: Path
) -> None:
    images = [{"id": i, "file_name": f"{i}.png", "height": 32, "width": 48} for i in (1, 2)]
    boxes = [(1, 1, [2, 2, 30, 30]), (1, 1, [0, 0, 40, 30]), (2, 1, [0, 0, 38, 32]), (2, 2, [1, 1, 6, 6])]
    objects = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, "area": box[2] * box[3]}
        for i, (image, category, box) in enumerate(boxes)
    ]
    categories = [{"id": 1, "name": "tree"}, {"id": 2, "name": "pole"}]
    data = CocoDetection(tmp_path, {"images": images, "annotations": objects, "categories": categories})
    head = replace(tiny_head(), anchors=AnchorConfig(sizes=tuple((size,) for size in sizes)))
    config = tiny_detector(classes=("tree", "pole"), head=head)  # the short edge becomes 64
    remarks = DetectionTask(config).remarks(data)
    assert (not remarks) if said is None else said in remarks[0]
    data = CocoDetection(tmp_path, {"images": images, "annotations": [], "categories": categories})
    assert DetectionTask(config).remarks(data) == []
