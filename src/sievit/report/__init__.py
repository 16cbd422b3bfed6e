"""What a person gets to see of a model: its answers for his own images, its figures, and the demonstration."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sievit.config import ConfigError, kind_of
from sievit.data.coco import CocoDetection
from sievit.data.labels import LabelDataset
from sievit.data.scenes import generate
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import evaluate as run_evaluation
from sievit.engine.recipe import default_data_root
from sievit.files import write_atomically
from sievit.models.build import Model, load, model_file, read
from sievit.models.detector import Detector
from sievit.models.segmenter import Segmenter
from sievit.policies import DToPConfig, SViTConfig
from sievit.report import common, detection, semantic

DEMO_SIZE = (512, 512)
"""Height and width in pixels of the demonstration's scenes."""


def open_model(
    path: Path,
    *,
    policy: str | None = None,
    thresholds: tuple[float, ...] | None = None,
    budget: float | None = None,
    device: str = "auto",
) -> Model:
    """A checkpoint, the folder of a run, or a model that comes with the package.

    Args:
        policy: takes the place of the model's own.
        thresholds: of early exits; the policy is `dtop` then.
        budget: of gates that were trained for a range of budgets.

    Raises:
        ConfigError: see `sievit.load`; thresholds for another policy than `dtop`; or a budget that the model was not
            trained for.
    """
    path, where = common.find_model(path), pick_device(device)
    if budget is not None:
        own = read(model_file(path))[0].policy
        if not isinstance(own, SViTConfig) or own.budgets is None or policy not in (None, "svit") or thresholds:
            raise ConfigError(
                f"{path}: --budget is for gates that were trained for a range of them (--model.policy.budgets in "
                "training), without --policy or --thresholds"
            )
        return load(path, policy=replace(own, budget=budget), device=where)
    if thresholds is None:
        return load(path, policy=policy, device=where)
    if policy not in (None, "dtop"):
        raise ConfigError(f"--thresholds are those of the policy 'dtop', not of {policy!r}; leave out --policy")
    return load(path, policy=DToPConfig(thresholds=thresholds), device=where)


def predict(
    model_path: Path,
    images: Path,
    out: Path,
    *,
    policy: str | None = None,
    thresholds: tuple[float, ...] | None = None,
    budget: float | None = None,
    score_threshold: float = 0.5,
    ids: Path | None = None,
    device: str = "auto",
) -> int:
    """What a model says of an image or a folder of images; see `detection.predict` and `semantic.predict`.

    Returns:
        The exit status: 1 when an image could not be read (the others are done all the same), else 0.
    """
    model = open_model(model_path, policy=policy, thresholds=thresholds, budget=budget, device=device)
    if isinstance(model, Segmenter):
        if ids is not None:
            raise ConfigError(f"--ids {ids}: a segmenter labels pixels and writes no COCO results; leave it out")
        return semantic.predict(model, images, out)
    return detection.predict(model, images, out, score_threshold=score_threshold, ids=ids)


def evaluate(
    model_path: Path,
    images: Path,
    *,
    annotations: Path | None = None,
    labels: Path | None = None,
    label_files: semantic.LabelFiles = semantic.LabelFiles(),  # noqa: B008
    policy: str | None = None,
    thresholds: tuple[float, ...] | None = None,
    budget: float | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    max_detections: int = 100,
    device: str = "auto",
) -> dict[str, Any]:
    """Every figure of a model, see `engine.evaluate`; progress goes to standard error.

    Detectors are judged by COCO `annotations`, segmenters by a folder of `labels`. Images that cannot be
    used are left out, and listed in `failures`.
    """
    model = open_model(model_path, policy=policy, thresholds=thresholds, budget=budget, device=device)
    dataset: CocoDetection | LabelDataset
    if isinstance(model, Detector):
        if annotations is None or labels is not None:
            raise ConfigError(f"{model_path}: is a detector; give --annotations, a file in COCO's format")
        dataset = detection.open_annotations(model, images, annotations)
    else:
        if labels is None or annotations is not None:
            raise ConfigError(f"{model_path}: is a segmenter; give --labels, a folder of label images")
        dataset = semantic.open_labels(model, images, labels, label_files)
    figures = run_evaluation(
        model,
        dataset,
        batch_size=batch_size,
        limit=limit,
        max_detections=max_detections,
        skip_failures=True,
        console=Console(stderr=True),
    )
    return {**figures, "policy": kind_of(model.config.policy), "device": device_name(model.device)}


def demo(
    out: Path,
    *,
    num_images: int,
    pictures: int,
    seed: int,
    data_root: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """The shipped dense and sparse models on fresh scenes, and on nuclei where the data is there.

    Writes the scenes to `out`/data, pictures to `out`/scenes, `out`/nuclei and `out`/semantic, and prints tables.

    Returns:
        Of the detectors on scenes `dense` and `sparse` (box_ap, mask_ap, gflops, ms_per_image), `keep` per block,
        `speedup` and `images`, and the same of each data set in `datasets`; in `semantic` of the segmenters `dense` and
        `dtop` (miou, gflops, ms_per_image), `left_at` per stage, `speedup` and `images`, and again `datasets`.
    """
    console = Console()
    where = pick_device(device)
    drawn = out / "data" / f"scenes-{seed}-{num_images}"
    generate(drawn, num_images=num_images, size=DEMO_SIZE, seed=seed)
    nuclei = (default_data_root() if data_root is None else data_root) / "nuclei"
    listings: dict[str, Any] = {"scenes": drawn / "annotations.json"}
    roots = {"scenes": drawn, "nuclei": nuclei}
    if nuclei.is_dir():
        listings["nuclei"] = _thinned(nuclei / "annotations/instances_val.json", num_images)
    else:
        console.print(f"{nuclei} is not there: scenes only", style="dim")
    objects, pixels = {}, {}
    for name, listing in listings.items():
        dense, sparse = (load(common.shipped(f"{name}_{kind}"), device=where) for kind in ("vit", "svit"))
        assert isinstance(dense, Detector) and isinstance(sparse, Detector)
        dataset = CocoDetection(roots[name] / "images", listing, with_masks=False)
        objects[name] = detection.demonstrate(
            dense, sparse, dataset, out / name, pictures=pictures, device=device_name(where)
        )
        dense, sparse = (load(common.shipped(f"{name}_{kind}"), device=where) for kind in ("segvit", "segvit_dtop"))
        assert isinstance(dense, Segmenter) and isinstance(sparse, Segmenter)
        labels = LabelDataset.from_folders(
            roots[name] / "images",
            roots[name] / "labels",
            classes=dense.config.classes,
            names_file=_write_names(dataset, out / "data" / f"{name}.txt"),
        )
        pixels[name] = semantic.demonstrate(
            dense, sparse, labels, out / "semantic" / name, pictures=pictures, device=device_name(where)
        )
    console.print(f"pictures: {out}", soft_wrap=True)
    return {
        **objects["scenes"],
        "datasets": objects,
        "semantic": {**pixels["scenes"], "datasets": pixels},
        "device": device_name(where),
    }


def _thinned(annotations: Path, count: int) -> dict[str, Any]:
    """The content of a COCO file with `count` of its images, evenly spread."""
    content = json.loads(annotations.read_text(encoding="utf-8"))
    images = content["images"]
    kept = [images[i * len(images) // count] for i in range(count)] if count < len(images) else images
    ids = {image["id"] for image in kept}
    return {**content, "images": kept, "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}


def _write_names(dataset: CocoDetection, path: Path) -> Path:
    """The file names of a data set, one per line."""
    names = [str(dataset.path(i).relative_to(dataset.root)) for i in range(len(dataset))]
    write_atomically(path, ("\n".join(names) + "\n").encode())
    return path
