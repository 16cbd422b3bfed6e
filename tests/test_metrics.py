"""Average precision is pycocotools', and mIoU its definition, whatever the data and however many processes have it."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from sievit.data.masks import Masks, encode, tight_patch
from sievit.engine.bootstrap import differences
from sievit.tasks import Metric
from sievit.tasks.metrics import FIGURES, CocoMetric, SegmentationMetric, coco_results, encode_masks
from tiny import refused

CATEGORY_IDS = (2, 5, 11)


def ellipse(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A mask of any of COCO's sizes: the sides go from 4 pixels to the whole image."""
    y, x = np.mgrid[: size[0], : size[1]]
    ry, rx = 2 + np.array(size) / 2 * rng.random(2) ** 2
    cy, cx = rng.random(2) * size
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def truth(rng: np.random.Generator, *, num_images: int, crowd: float = 0.15) -> dict[str, Any]:
    annotations, images = [], []
    for image_id in range(10, 10 + num_images):
        size = (int(rng.integers(40, 160)), int(rng.integers(40, 160)))
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": size[0], "width": size[1]})
        for _ in range(int(rng.integers(0, 9))):
            patch = tight_patch(ellipse(rng, size))
            if not patch.bits.any():
                continue
            x0, y0, x1, y1 = patch.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice(CATEGORY_IDS)),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(patch.bits.sum()),
                    "iscrowd": int(rng.random() < crowd),
                    "segmentation": encode(patch, size),
                }
            )
    categories = [{"id": number, "name": f"class {number}"} for number in CATEGORY_IDS]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def detections(rng: np.random.Generator, content: dict[str, Any], *, noise: int = 6) -> dict[int, dict[str, Any]]:
    """Shifted copies of the objects, some of them twice, of a wrong class or missing, and false alarms."""
    found = {}
    for image in content["images"]:
        size = (image["height"], image["width"])
        masks, labels = [], []
        for annotation in content["annotations"]:
            if annotation["image_id"] == image["id"]:
                dense = coco_mask.decode(annotation["segmentation"]).astype(bool)
                for _ in range(int(rng.integers(0, 3))):
                    masks.append(np.roll(dense, rng.integers(-2, 3, 2), (0, 1)))
                    labels.append(CATEGORY_IDS.index(annotation["category_id"]) + 1)
        for _ in range(int(rng.integers(0, noise))):
            masks.append(ellipse(rng, size))
            labels.append(int(rng.integers(1, 4)))
        stack = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *size), dtype=bool))
        boxes = Masks.from_dense(stack).boxes + torch.from_numpy(rng.normal(0, 0.5, (len(masks), 4))).float()
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = torch.from_numpy((rng.random(len(masks)) * 20).round() / 20).float()  # ties too
        found[image["id"]] = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "scores": scores,
                              "masks": stack[:, None].float()}  # fmt: skip
    return found


def reference(content: dict[str, Any], results: list[dict[str, Any]], kind: str, image_ids: list[int]) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(content)
        coco.createIndex()
        results = copy.deepcopy(results)
        if kind == "segm":
            for result in results:
                del result["bbox"]
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats)[:6].tolist()


def figures(values: dict[str, float], prefix: str) -> list[float]:
    return [values[f"{prefix}_{name}"] for name in FIGURES]


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6))
def test_equals_pycocotools(seed: int):
    rng = np.random.default_rng(seed)
    content = truth(rng, num_images=6)
    metric = CocoMetric(content)
    for image_id, detection in detections(rng, content).items():
        metric.update(image_id, detection)
    values, ids = metric.compute(), [image["id"] for image in content["images"]]
    if metric.results:
        assert figures(values, "box") == pytest.approx(reference(content, metric.results, "bbox", ids), abs=1e-9)
        assert figures(values, "mask") == pytest.approx(reference(content, metric.results, "segm", ids), abs=1e-9)
    json.loads(json.dumps(metric.results))


def drawn(content: dict[str, Any], found: dict[int, Any], draw: list[int]) -> tuple[dict[str, Any], dict[int, Any]]:
    """The data set in which each drawn image is one of its own."""
    images, objects, again = [], [], {}
    for new, place in enumerate(draw, start=100):
        image = content["images"][place]
        images.append({**image, "id": new})
        objects += [{**a, "image_id": new} for a in content["annotations"] if a["image_id"] == image["id"]]
        again[new] = found[image["id"]]
    objects = [{**each, "id": number} for number, each in enumerate(objects, start=1)]
    return {**content, "images": images, "annotations": objects}, again


def test_figures_of_drawn_images_are_those_of_a_data_set_of_them():
    rng = np.random.default_rng(5)
    content = truth(rng, num_images=8)
    found = detections(rng, content)
    for each in found.values():
        each["scores"] = torch.from_numpy(rng.random(len(each["scores"])))  # no ties, which are broken by place
    metric = CocoMetric(content)
    for image_id, detection in found.items():
        metric.update(image_id, detection)
    draws = np.array([range(8), [0, 0, 3, 5, 5, 5, 7, 2], [1, 2, 3, 4, 4, 3, 2, 1]])
    values = metric.resampled(draws)
    for place, draw in enumerate(draws.tolist()):
        other = CocoMetric(drawn(content, found, draw)[0])
        for image_id, detection in drawn(content, found, draw)[1].items():
            other.update(image_id, detection)
        whole = other.compute()
        assert {name: value[place] for name, value in values.items()} == pytest.approx(
            {name: whole[name] for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap50")}, abs=1e-9
        )
    assert len(set(values["mask_ap"])) == 3


def test_equals_pycocotools_on_real_data(data_root: Path):
    path = data_root / "coco-mini" / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    rng = np.random.default_rng(0)
    metric = CocoMetric(path)
    for image in content["images"]:
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        rows = [(a, metric.annotations.category_ids.index(a["category_id"]) + 1) for a in objects if rng.random() < 0.8]
        boxes = torch.tensor([a["bbox"] for a, _ in rows]).reshape(-1, 4).double()
        boxes[:, 2:] += boxes[:, :2] + torch.from_numpy(rng.normal(0, 3, (len(rows), 2)))
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        masks = np.zeros((len(rows), image["height"], image["width"]), dtype=bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
        scores = torch.from_numpy(rng.random(len(rows)))
        metric.update(image["id"], {"boxes": boxes, "labels": labels, "scores": scores, "masks": torch.tensor(masks)})
    values, ids = metric.compute(), [image["id"] for image in content["images"]]
    assert figures(values, "box") == pytest.approx(reference(content, metric.results, "bbox", ids), abs=1e-9)
    assert figures(values, "mask") == pytest.approx(reference(content, metric.results, "segm", ids), abs=1e-9)
    assert 0.2 < values["box_ap"] < 0.9


def perfect(content: dict[str, Any], image_id: int) -> dict[str, Any]:
    objects = [a for a in content["annotations"] if a["image_id"] == image_id and not a["iscrowd"]]
    boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([CATEGORY_IDS.index(a["category_id"]) + 1 for a in objects], dtype=torch.int64)
    masks = [a["segmentation"] for a in objects]
    return {"boxes": boxes, "labels": labels, "scores": torch.ones(len(objects)), "masks": masks}


def test_the_truth_scores_one_and_only_seen_images_count():
    content = truth(np.random.default_rng(1), num_images=8)
    metric = CocoMetric(content)
    for image in content["images"][:5]:
        metric.update(image["id"], perfect(content, image["id"]))
    values = metric.compute()
    assert values["box_ap"] == values["mask_ap"] == values["box_ap50"] == 1
    metric.update(content["images"][5]["id"], {"boxes": torch.zeros(0, 4), "labels": [], "scores": [], "masks": []})
    assert metric.compute()["box_ap"] < 1, "an image without detections has missed its objects"
    metric.reset()
    assert metric.results == [] and set(metric.compute().values()) == {-1.0}


def test_nothing_found_and_nothing_to_find():
    content = truth(np.random.default_rng(2), num_images=4)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    metric = CocoMetric(content)
    for image in content["images"]:
        metric.update(image["id"], nothing)
    assert metric.compute()["box_ap"] == metric.compute()["mask_ap"] == 0
    refused("annotations: holds no objects to judge by", CocoMetric, {**content, "annotations": []})
    first, *others = {annotation["image_id"] for annotation in content["annotations"]}
    empty = CocoMetric({**content, "annotations": [a for a in content["annotations"] if a["image_id"] == first]})
    found = {"boxes": torch.tensor([[1.0, 2, 8, 9]]), "labels": [1], "scores": [0.5], "masks": torch.ones(1, 20, 20)}
    empty.update(others[0], found)
    assert set(empty.compute().values()) == {-1.0}


def test_boxes_alone():
    content = truth(np.random.default_rng(3), num_images=3)
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    refused("masks cannot be judged", CocoMetric, content)
    metric = CocoMetric(content, with_masks=False)
    for image in content["images"]:
        detection = {"boxes": torch.tensor([[1.0, 2, 30, 30]]), "labels": [1], "scores": [0.5]}
        metric.update(image["id"], detection)
    values = metric.compute()
    assert set(values) == {f"box_{name}" for name in FIGURES}
    ids = [image["id"] for image in content["images"]]
    assert figures(values, "box") == pytest.approx(reference(content, metric.results, "bbox", ids), abs=1e-9)


def test_more_than_a_hundred_objects():
    boxes = [[x, y, 4, 4] for x in range(0, 150, 10) for y in range(0, 100, 10)]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 100, "width": 150}],
        "categories": [{"id": 1, "name": "dot"}],
        "annotations": [{"id": i, "image_id": 1, "category_id": 1, "bbox": b} for i, b in enumerate(boxes, start=1)],
    }
    found = torch.tensor(boxes, dtype=torch.float32)
    found[:, 2:] += found[:, :2]
    detection = {"boxes": found, "labels": torch.ones(150).long(), "scores": torch.linspace(1, 0.1, 150)}
    values = {}
    for limit in (100, 400):
        metric = CocoMetric(content, with_masks=False, max_detections=limit)
        metric.update(1, detection)
        values[limit] = metric.compute()["box_ap"]
    assert values[400] == 1 and values[100] == pytest.approx(67 / 101)


def test_results_are_coco_results():
    masks = torch.zeros(2, 1, 8, 9)
    masks[0, 0, 1:4, 2:6] = 0.9
    masks[1, 0, :2] = 0.5
    detection = {"boxes": torch.tensor([[2.0, 1, 6, 4], [0, 0, 9, 2]]), "labels": torch.tensor([3, 1]),
                 "scores": torch.tensor([0.75, 0.5]), "masks": masks}  # fmt: skip
    results = coco_results(detection, 42, CATEGORY_IDS)
    assert [(r["image_id"], r["category_id"], r["bbox"], r["score"]) for r in results] == [
        (42, 11, [2, 1, 4, 3], 0.75),
        (42, 2, [0, 0, 9, 2], 0.5),
    ]
    assert (coco_mask.decode(results[0]["segmentation"]) == (masks[0, 0] > 0.5).numpy()).all()
    assert not coco_mask.decode(results[1]["segmentation"]).any(), "0.5 is not over 0.5"
    assert encode_masks(masks[:, 0] > 0.5) == encode_masks(masks)
    json.dumps(results)


def test_an_unknown_image_is_named():
    metric = CocoMetric(truth(np.random.default_rng(0), num_images=2))
    refused("no image with the id 99", metric.update, 99, {"boxes": torch.zeros(0, 4), "labels": [], "scores": []})


# Labels of segmenters.


def label_pairs(seed: int, classes: int, count: int = 4, ignored: float = 0.2) -> list[tuple[Tensor, Tensor]]:
    """Predicted and true labels of a few images of different sizes; some classes are rare or missing."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        size = tuple(int(edge) for edge in rng.integers(1, 12, 2))
        true = np.minimum(rng.geometric(0.4, size) - 1, classes - 1)
        predicted = np.where(rng.random(size) < 0.6, true, rng.integers(0, classes, size))
        true = np.where(rng.random(size) < ignored, 255, true)
        result.append((torch.from_numpy(predicted), torch.from_numpy(true)))
    return result


def judged(pairs: list[tuple[Tensor, Tensor]], classes: int) -> dict:
    metric = SegmentationMetric(classes)
    for predicted, true in pairs:
        metric.update(predicted, true)
    return metric.compute()


def brute_force(pairs: list[tuple[Tensor, Tensor]], classes: int) -> dict:
    """Class by class over the pixels of all images, in float64."""
    predicted = np.concatenate([p.numpy().ravel() for p, _ in pairs])
    true = np.concatenate([t.numpy().ravel() for _, t in pairs])
    predicted, true = predicted[true != 255], true[true != 255]
    iou, accuracy = [], []
    for label in range(classes):
        both = np.float64(((predicted == label) & (true == label)).sum())
        either = np.float64(((predicted == label) | (true == label)).sum())
        iou.append(float(both / either) if either else -1.0)
        if (true == label).any():
            accuracy.append(float(both / np.float64((true == label).sum())))
    known = [value for value in iou if value >= 0]
    return {
        "miou": sum(known) / len(known) if known else -1.0,
        "pixel_accuracy": float((predicted == true).mean()) if len(true) else -1.0,
        "mean_accuracy": sum(accuracy) / len(accuracy) if accuracy else -1.0,
        "iou": iou,
    }


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 10**6))
def test_figures_are_those_of_the_definition(classes: int, count: int, ignored: float, seed: int):
    pairs = label_pairs(seed, classes, count, ignored)
    found, expected = judged(pairs, classes), brute_force(pairs, classes)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    assert judged(pairs[::-1], classes) == found


def test_the_data_set_is_judged_and_a_class_that_is_nowhere_does_not_count():
    true = torch.tensor([[0, 0, 1, 1]])
    found = judged([(torch.tensor([[0, 0, 1, 3]]), true)], 4)
    assert found["iou"] == [1.0, 0.5, -1.0, 0.0]
    assert found["miou"] == 0.5 and found["mean_accuracy"] == 0.75 and found["pixel_accuracy"] == 0.75

    zero = torch.zeros(1, 1, dtype=torch.int64)
    pairs = [(zero, zero), (torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]]))]
    assert judged(pairs, 2)["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_ignored_pixels_and_nothing_at_all():
    true = torch.tensor([[255, 255], [0, 1]], dtype=torch.uint8)
    found = judged([(torch.tensor([[1, 0], [0, 1]], dtype=torch.int32), true)], 2)
    assert found["miou"] == found["pixel_accuracy"] == 1.0
    nothing = {"miou": -1.0, "pixel_accuracy": -1.0, "mean_accuracy": -1.0, "iou": [-1.0, -1.0]}
    assert SegmentationMetric(2).compute() == nothing
    assert judged([(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))], 2) == nothing
    metric = SegmentationMetric(2, ignore_index=-100)
    metric.update(torch.tensor([[0, 7]]), torch.tensor([[0, -100]]))  # what is predicted there does not matter
    assert metric.compute()["miou"] == 1.0


def test_reset_and_compute_leave_no_trace():
    metric = SegmentationMetric(2)
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[1, 1]]))
    assert metric.compute() == metric.compute()
    assert metric.matrix.dtype == torch.int64 and metric.matrix.tolist() == [[0, 0], [1, 1]]
    metric.reset()
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    assert metric.compute()["miou"] == 1.0
    json.dumps(metric.compute())


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        ([[0, 1]], [[0], [1]], r"predicted labels \(1, 2\) and true labels \(2, 1\) differ"),
        ([[0, 2]], [[0, 1]], "predicted label 2 is none of the 2 classes"),
        ([[0, -1]], [[0, 1]], "predicted label -1 is none of the 2 classes"),
        ([[0, 1]], [[0, 3]], "true label 3 is none of the 2 classes"),
        ([[0, 1]], [[0, -2]], "true label -2 is none of the 2 classes"),
    ],
)
def test_labels_that_do_not_fit_change_nothing(predicted: list, true: list, message: str):
    metric = SegmentationMetric(2)
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    before = metric.compute()
    refused(message, metric.update, torch.tensor(predicted), torch.tensor(true))
    assert metric.compute() == before
    refused("at least 1", SegmentationMetric, 0)


def test_labels_of_drawn_images():
    pairs = label_pairs(11, 5, count=6)
    metric = SegmentationMetric(5)
    for pair in pairs:
        metric.update(*pair)
    draws = np.array([[0, 0, 1, 4, 5, 5], [3, 3, 3, 3, 3, 3], range(6)])
    values = metric.resampled(draws)
    for place, draw in enumerate(draws.tolist()):
        whole = judged([pairs[i] for i in draw], 5)
        assert {name: value[place] for name, value in values.items()} == {
            name: pytest.approx(whole[name]) for name in ("miou", "pixel_accuracy")
        }


def coins(chances: np.ndarray, rng: np.random.Generator) -> Metric:
    """A metric whose images are right with these chances."""
    hits = (rng.random(len(chances)) < chances).astype(float)
    return Metric(lambda *_: None, dict, lambda draws: {"hits": hits[draws].mean(1)})


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        chances = rng.random(100)  # easy and hard images
        pair = coins(chances * 0.8, rng), coins(chances, rng)
        difference, low, high = differences(*pair, images=100, draws=300, seed=seed)["hits"]
        assert low <= difference <= high
        held += low <= 0.2 * chances.mean() <= high
    assert 0.90 * 200 <= held <= 0.99 * 200
    same = coins(rng.random(100), rng)
    assert differences(same, same, images=100)["hits"] == [0, 0, 0], "paired: the same images for both"


def several_processes(folder: Path, rank: int) -> None:
    """What each of two processes does (test_distributed.py): both have image 12, and every other pair of labels."""
    rng = np.random.default_rng(7)
    content = truth(rng, num_images=5)
    found = detections(rng, content)
    metric, labels = CocoMetric(content), SegmentationMetric(5)
    for image_id in ((10, 11, 12), (12, 13, 14))[rank]:
        metric.update(image_id, found[image_id])
    for pair in label_pairs(3, 5, count=7)[rank::2]:
        labels.update(*pair)
    values = labels.compute()
    assert labels.compute() == values
    (folder / f"{rank}.json").write_text(json.dumps([metric.compute(), metric.results, values]))


def one_process() -> list[Any]:
    rng = np.random.default_rng(7)
    content = truth(rng, num_images=5)
    metric = CocoMetric(content)
    for image_id, detection in detections(rng, content).items():
        metric.update(image_id, detection)
    return [metric.compute(), metric.results, judged(label_pairs(3, 5, count=7), 5)]
