"""What a person gets to see of a model: its answers for his own images, its figures, and the demonstration."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sievit.config import ConfigError, kind_of
from sievit.data.coco import CocoDetection
from sievit.data.labels import LabelDataset
from sievit.data.truth import Truth
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import evaluate as run_evaluation
from sievit.engine.recipe import default_data_root
from sievit.files import write_atomically
from sievit.hub.fetch import REPOSITORY
from sievit.models.base import Model
from sievit.models.build import load, model_file, read
from sievit.models.detector import Detector
from sievit.models.segmenter import Segmenter
from sievit.policies import DToPConfig, SViTConfig
from sievit.report import detection, semantic
from sievit.tasks import task_of

EXAMPLES = Path("examples/nuclei")
"""The images of the demonstration, in the repository."""


def open_model(
    path: Path,
    *,
    policy: str | None = None,
    thresholds: tuple[float, ...] | None = None,
    budget: float | None = None,
    device: str = "auto",
) -> Model:
    """A model by its file, the folder of its run, or its name; see `sievit.load`.

    Args:
        policy: takes the place of the model's own.
        thresholds: of early exits; the policy is `dtop` then.
        budget: of gates that were trained for a range of budgets.

    Raises:
        ConfigError: see `sievit.load`; thresholds for another policy than `dtop`; or a budget that the model was not
            trained for.
    """
    where = pick_device(device)
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
    assert isinstance(model, Detector)
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
    files = {name: getattr(label_files, name) for name in vars(label_files)}
    truth = Truth(annotations=annotations, labels=labels, max_detections=max_detections, **files)
    dataset = task_of(model.config).open(images, truth)
    figures = run_evaluation(
        model,
        dataset,
        batch_size=batch_size,
        limit=limit,
        skip_failures=True,
        console=Console(stderr=True),
    )
    return {**figures, "policy": kind_of(model.config.policy), "device": device_name(model.device)}


def demo(
    out: Path, *, num_images: int, pictures: int, data_root: Path | None = None, device: str = "auto"
) -> dict[str, Any]:
    """The shipped dense and sparse models on validation images of nuclei.

    The images are those of the data set `nuclei` below the folder of data sets; where it is not there, the few of
    examples/nuclei. Writes pictures to `out`/nuclei and `out`/semantic/nuclei, and prints tables.

    Returns:
        Of the detectors `dense` and `sparse` (box_ap, mask_ap, gflops, ms_per_image), `keep` per block, `speedup` and
        `images`, and the same of each data set in `datasets`; in `semantic` of the segmenters `dense` and `dtop` (miou,
        gflops, ms_per_image), `left_at` per stage, `speedup` and `images`, and again `datasets`.

    Raises:
        ConfigError: no images, or a model that is not there.
    """
    console, where = Console(), pick_device(device)
    name, root = "nuclei", _nuclei(data_root)
    console.print(f"images: {root}", soft_wrap=True, markup=False, highlight=False)
    listing = out / f"{name}.json"
    _write_thinned(root / "annotations/instances_val.json", listing, num_images)
    dataset = CocoDetection(root / "images", listing, with_masks=False)
    dense, sparse = (load(f"nuclei_{model}", device=where) for model in ("vit", "svit"))
    assert isinstance(dense, Detector) and isinstance(sparse, Detector)
    objects = detection.demonstrate(dense, sparse, dataset, out / name, pictures=pictures, device=device_name(where))
    dense, sparse = (load(f"nuclei_{model}", device=where) for model in ("segvit", "segvit_dtop"))
    assert isinstance(dense, Segmenter) and isinstance(sparse, Segmenter)
    labels = LabelDataset(root / "images", root / "labels", classes=dense.config.classes, names_file=listing)
    pixels = semantic.demonstrate(
        dense, sparse, labels, out / "semantic" / name, pictures=pictures, device=device_name(where)
    )
    console.print(f"pictures: {out}", soft_wrap=True, markup=False, highlight=False)
    return {
        **objects,
        "datasets": {name: objects},
        "semantic": {**pixels, "datasets": {name: pixels}},
        "device": device_name(where),
    }


def _nuclei(data_root: Path | None) -> Path:
    """The folder of nuclei: of the data sets, else of the examples."""
    folder = (default_data_root() if data_root is None else data_root) / "nuclei"
    examples = [] if data_root is not None else [REPOSITORY / EXAMPLES, EXAMPLES]
    for root in (folder, *examples):
        if root.is_dir():
            return root
    raise ConfigError(f"{folder}: no such folder; give --data-root, or run in the repository, which has examples")


def _write_thinned(annotations: Path, path: Path, count: int) -> None:
    """Copy a COCO file with `count` of its images, evenly spread."""
    content = json.loads(annotations.read_text(encoding="utf-8"))
    images = content["images"]
    kept = [images[i * len(images) // count] for i in range(count)] if count < len(images) else images
    ids = {image["id"] for image in kept}
    content |= {"images": kept, "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content).encode())
