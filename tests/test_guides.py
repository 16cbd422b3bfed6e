"""The guides, followed to the letter: their commands run one after the other, on small models and few photographs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from sievit.config import to_json
from sievit.engine.recipe import Recipe
from sievit.models.build import build, save
from sievit.models.detector import DetectorConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.policies import KeepAllConfig
from sievit.recipes import recipe
from sievit.tasks.segmentation import LabelsData
from sievit.vit import ViT
from test_docs import commands
from test_readme import SMALL
from tiny import scattered, tiny_head

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT / "examples" / "facade"
ANNOTATIONS = Path("annotations", "instances_val.json")
NAMES = ("IMG_0808_scaled_0", "IMG_0756_scaled_0")
METHODS = ("ablate", "methods", "--dense", "runs/facade_setr", "--recipe", "facade_setr.json", "--out", "runs/methods")

SHORTER = {
    "400": "1",
    "facade_setr": "facade_setr.json",
    "../shared/data": "examples",
    "--compile": "--compile=False",
    "512": "128",
    "4": "12",
}
"""Words of commands that would take long, or that are of other folders and labels."""
ABSENT = {"coco_dinov3_b", "svit_adapter_s.pth", "svit_s.safetensors"}
"""What needs COCO, or a file of the papers; converting is in test_released.py."""
SEGMENTER = {name: value for name, value in SMALL.items() if name.startswith(("train.", "model.vit."))} | {
    "model.head.channels": 8,
    "model.head.num-heads": 2,
}


def small(config: Any) -> Any:
    """The model with a narrow transformer and head, on images of 128 px."""
    vit = replace(config.vit, embed_dim=16, num_heads=2)
    inputs = replace(config.input, min_size=128, max_size=256)
    if isinstance(config, DetectorConfig):
        head = replace(tiny_head(), num_classes=config.head.num_classes, anchors=config.head.anchors)
        return replace(config, vit=vit, head=head, neck=replace(config.neck, out_channels=8), input=inputs)
    assert isinstance(config, SegmenterConfig)
    return replace(config, vit=vit, head=replace(config.head, channels=8), input=inputs)


def filled(model: Any) -> Any:
    """With a detector's scores that differ."""
    if isinstance(model.config, DetectorConfig):
        scattered(model.head, 0.1)
    return model


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout: the shipped models, the runs, and two of the photographs."""
    (tmp_path / "models").mkdir()
    for name, dense in (("facade_svit", "facade_vit"), ("facade_setr_dtop", "facade_setr")):
        model = small(recipe(name).model)
        save(filled(build(model)), tmp_path / "models" / f"{name}.safetensors")
        (tmp_path / "runs" / dense).mkdir(parents=True)
        save(filled(build(replace(model, policy=KeepAllConfig()))), tmp_path / "runs" / dense / "best.safetensors")
    facade = tmp_path / "examples" / "facade"
    for part, ending in (("images", "jpg"), ("labels", "png")):
        (facade / part / "val").mkdir(parents=True)
        for name in NAMES:
            shutil.copy(PHOTOGRAPHS / part / "val" / f"{name}.{ending}", facade / part / "val")
    content = json.loads((PHOTOGRAPHS / ANNOTATIONS).read_text(encoding="utf-8"))
    images = [image for image in content["images"] if Path(image["file_name"]).stem in NAMES]
    ids = {image["id"] for image in images}
    objects = [each for each in content["annotations"] if each["image_id"] in ids]
    (facade / ANNOTATIONS).parent.mkdir()
    (facade / ANNOTATIONS).write_text(json.dumps({**content, "images": images, "annotations": objects}))
    monkeypatch.setenv("SIEVIT_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("SIEVIT_DATA", "examples")
    monkeypatch.chdir(tmp_path)
    _of_the_reader()
    return tmp_path


def _of_the_reader() -> None:
    """Photographs with boxes and labels where the pages say that the reader's own may lie, and nuclei."""
    facade, my = Path("examples", "facade"), Path("my")
    for kind in ("images", "labels"):
        shown = "photos" if kind == "images" else kind
        for folder in (shown, my / kind / "train", my / kind / "val", my / "val" / kind):
            shutil.copytree(facade / kind / "val", folder)
        shutil.copytree(facade / kind / "val", my / kind, dirs_exist_ok=True)
    (my / "annotations").mkdir()
    for part in ("train", "val"):
        for folder in (my, my / "annotations"):
            shutil.copy(facade / ANNOTATIONS, folder / f"{part}.json")
    shutil.copytree(ROOT / "examples" / "nuclei", "examples/nuclei")
    shutil.copy("examples/nuclei/annotations/instances_val.json", "examples/nuclei/annotations/instances_train.json")
    dino = replace(recipe("boxes_dinov2_s").model.vit, embed_dim=16, num_heads=2)
    save_file(ViT(dino).state_dict(), "my_dino.safetensors")


def shortened(args: list[str]) -> list[str]:
    """The arguments of a command, for a small model and little work."""
    words = [SHORTER.get(word, word) for word in args]
    if args[:2] == ["ablate", "methods"] and not {"--dry-run", "--only"} & {*args}:
        words += ["--only", "tome"]
    if args[:2] == ["bench", "network"] and "fast.safetensors" in args:
        words += ["--policy", "random"]  # where nothing pays, as with models that small, the tuned one is dense
    if args[0] == "train" and args[1] != "facade_setr" and "--resume" not in args:
        detector = isinstance(recipe(args[1]).model, DetectorConfig)
        options = {f"--{name}": value for name, value in (SMALL if detector else SEGMENTER).items()}
        words += [f"{name}={value}" for name, value in options.items() if name not in args]
    return words


def brief(name: str) -> Recipe:
    """A recipe of segmentation with the small model, for one step."""
    found = recipe(name)
    assert isinstance(found.data, LabelsData)
    folders = {f"{part}_{kind}": Path(kind) / "val" for part in ("train", "val") for kind in ("images", "labels")}
    root = Path("examples", "facade")
    data = replace(found.data, root=root, augment=replace(found.data.augment, crop=(64, 64)), **folders)
    changes: dict[str, Any] = {
        "steps": 1,
        "batch_size": 2,
        "precision": "32-true",
        "val_images": 2,
        "vit_from": None,
        "freeze": "none",
    }
    return replace(found, model=small(found.model), data=data, train=replace(found.train, **changes))


PAGES = ("use", "export", "report", "compare-methods", "train", "tune", "prune-your-model", "weights")
"""Those on photographs of your own, on videos and on large jobs are in the tests of these."""


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_guide_can_be_followed(page: str, workplace: Path, command: Callable[..., Any]) -> None:
    steps = commands((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    lines = [(args, into) for program, args, into in steps if program == "sievit" and args[0] != "serve"]
    if page in ("report", "compare-methods"):
        Path("facade_setr.json").write_text(json.dumps(to_json(brief("facade_setr"))), encoding="utf-8")
        shutil.rmtree("runs/facade_setr")
        command("train", "facade_setr.json", "--out", "runs/facade_setr")
    if page == "report":
        command(*METHODS, "--steps", 1, "--only", "tome")
    for args, into in lines:
        if not ABSENT & {*args}:
            printed = command(*shortened(args))
            if into:
                Path(into).write_text(printed.out, encoding="utf-8")
    assert lines
