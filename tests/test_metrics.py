"""Average precision equals pycocotools', whatever the data, and however many processes collected it."""

import contextlib
import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sievit.config import ConfigError
from sievit.data.masks import Masks, encode, tight_patch
from sievit.tasks.metrics import FIGURES, CocoMetric, coco_results, encode_masks

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
                dense = _dense(annotation, size)
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


def _dense(annotation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    assert annotation["segmentation"]["size"] == list(size)
    return coco_mask.decode(annotation["segmentation"]).astype(bool)


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
    with pytest.raises(ConfigError, match="annotations: holds no objects to judge by"):
        CocoMetric({**content, "annotations": []})
    first, *others = {annotation["image_id"] for annotation in content["annotations"]}
    empty = CocoMetric({**content, "annotations": [a for a in content["annotations"] if a["image_id"] == first]})
    found = {"boxes": torch.tensor([[1.0, 2, 8, 9]]), "labels": [1], "scores": [0.5], "masks": torch.ones(1, 20, 20)}
    empty.update(others[0], found)
    assert set(empty.compute().values()) == {-1.0}


def test_boxes_alone():
    content = truth(np.random.default_rng(3), num_images=3)
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    with pytest.raises(ConfigError, match="masks cannot be judged"):
        CocoMetric(content)
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
    with pytest.raises(ConfigError, match="no image with the id 99"):
        metric.update(99, {"boxes": torch.zeros(0, 4), "labels": [], "scores": []})


def _collect(store: str, out: str, rank: int) -> None:
    """One of two processes, which both have image 12."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rng = np.random.default_rng(7)
    content = truth(rng, num_images=5)
    found = detections(rng, content)
    metric = CocoMetric(content)
    for image_id in ((10, 11, 12), (12, 13, 14))[rank]:
        metric.update(image_id, found[image_id])
    values = metric.compute()
    Path(out, f"{rank}.json").write_text(json.dumps([values, metric.results]))
    dist.destroy_process_group()


def test_several_processes_like_one(tmp_path: Path):
    run = [sys.executable, __file__, str(tmp_path / "store"), str(tmp_path)]
    processes = [subprocess.Popen([*run, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    rng = np.random.default_rng(7)
    content = truth(rng, num_images=5)
    metric = CocoMetric(content)
    for image_id, detection in detections(rng, content).items():
        metric.update(image_id, detection)
    for rank in range(2):
        values, results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert values == metric.compute() and results == metric.results


if __name__ == "__main__":
    _collect(sys.argv[1], sys.argv[2], int(sys.argv[3]))
