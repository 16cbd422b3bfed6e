"""What a person gets to see of a model: its answers for his own images, its figures, and the demonstration."""

import json
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
from sievit.models.build import load
from sievit.models.detector import Detector
from sievit.models.segmenter import Segmenter
from sievit.policies import PolicyOptions
from sievit.report import detection, semantic
from sievit.tasks import task_of

EXAMPLES = Path("examples/nuclei")
"""The images of the demonstration, in the repository."""


def predict(
    model: Path,
    images: Path,
    /,
    *,
    out: Path,
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    score_threshold: float = 0.5,
    ids: Path | None = None,
    device: str = "auto",
) -> int:
    """Find objects in, or label every pixel of, an image or a folder of images.

    A detector writes results.json (COCO results) and images.json (which image has which id), a segmenter label images
    in labels/ and classes.json (what their values mean); both write one picture per image.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: an image, or a folder of images.
        out: folder for the results.
        policy: another policy.
        score_threshold: pictures show objects of at least this score; results.json holds all.
        ids: COCO annotation file whose image ids results.json shall use; by default 1, 2, ... by file name.
        device: cpu, cuda, cuda:1, or auto.

    Returns:
        The exit status: 1 when an image could not be read (the others are done all the same), else 0.
    """
    loaded = load(model, policy=policy, device=pick_device(device))
    if isinstance(loaded, Segmenter):
        if ids is not None:
            raise ConfigError(f"--ids {ids}: a segmenter labels pixels and writes no COCO results; leave it out")
        return semantic.predict(loaded, images, out)
    assert isinstance(loaded, Detector)
    return detection.predict(loaded, images, out, score_threshold=score_threshold, ids=ids)


def evaluate(
    model: Path,
    /,
    images: Path,
    *,
    truth: Truth = Truth(),  # noqa: B008
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    batch_size: int = 1,
    limit: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate a model; the last line of the output is one JSON object with every figure.

    Images that cannot be used are left out and listed in `failures`; the exit status is 1 then.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: folder that holds the images.
        truth: the annotations of the images.
        policy: another policy.
        batch_size: images that go through the network together.
        limit: only the first so many images.
        device: cpu, cuda, cuda:1, or auto.
    """
    loaded = load(model, policy=policy, device=pick_device(device))
    figures = run_evaluation(
        loaded,
        task_of(loaded.config).open(images, truth),
        batch_size=batch_size,
        limit=limit,
        skip_failures=True,
        console=Console(stderr=True),
    )
    return {**figures, "policy": kind_of(loaded.config.policy), "device": device_name(loaded.device)}


def demo(
    *,
    out: Path = Path("out/demo"),
    num_images: int = 32,
    pictures: int = 8,
    data_root: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Dense against sparse on images of nuclei: those of the data set, or the few in examples/.

    Writes pictures to nuclei and semantic/nuclei in the output folder, and prints tables.

    Args:
        out: folder for the pictures.
        num_images: at most so many, evenly spread over the validation set.
        pictures: how many images get a picture, per task.
        data_root: folder with nuclei/; default the environment's SIEVIT_DATA, else ../shared/data.
        device: cpu, cuda, cuda:1, or auto.

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
