"""Segmenters from training to pictures, on the command line, and what a person can do wrong on the way."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sievit.data.scenes import CLASSES
from sievit.data.semantic import SemanticAugmentConfig
from sievit.engine.batches import Batch, Losses
from sievit.engine.checkpoint import RunFolder, read_log
from sievit.engine.initial import start_from
from sievit.engine.optim import freeze
from sievit.engine.recipe import Recipe, TrainConfig, open_data, with_classes
from sievit.engine.train import train
from sievit.models.build import build, load
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter, SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig, PolicyConfig
from sievit.recipes import recipe as find_recipe
from sievit.tasks.metrics import SegmentationMetric
from sievit.tasks.segmentation import LabelsData
from tiny import assert_same_weights, killed_at, refused, saved, tiny_segmenter, tiny_vit

NAMES = ("ground", *CLASSES)
Command = Callable[..., Any]


def tiny(policy: PolicyConfig, **changes: Any) -> SegmenterConfig:
    vit = tiny_vit(grid=(6, 6), patch_size=8, drop_path_rate=0.1)
    sizes = InputConfig(min_size=64, max_size=128, size_divisor=8)
    return tiny_segmenter(vit=vit, policy=policy, crop=(48, 48), stride=(32, 32), input=sizes, **changes)


@pytest.fixture(scope="module")
def scenes(scenes_of: Callable[..., Path]) -> Path:
    return scenes_of(8, (64, 80), val=3)


@pytest.fixture(scope="module")
def recipe(scenes: Path) -> Recipe:
    """DToP with a threshold that random heads reach."""
    return Recipe(
        model=tiny(DToPConfig(thresholds=(0.2,), keep_per_class=1)),
        data=LabelsData(
            train_images=Path("train/images"),
            train_labels=Path("train/labels"),
            val_images=Path("val/images"),
            val_labels=Path("val/labels"),
            root=scenes,
            augment=SemanticAugmentConfig(scales=(56, 72), crop=(48, 48), rot90=True, photometric=True),
        ),
        train=TrainConfig(
            steps=3,
            batch_size=4,
            lr=1e-3,
            head_lr=10.0,
            warmup_steps=2,
            schedule="poly",
            clip_norm=1.0,
            ema=0.9,
            log_every=1,
            workers=0,
            save_every=0.0,
            channels_last=False,
        ),
    )


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(recipe, out=out)
    return RunFolder(out)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, dense."""
    return saved(tiny(KeepAllConfig()), tmp_path_factory.mktemp("model") / "dense.safetensors", seed=3)


def judged(folder: Path) -> list[object]:
    """The options that name images and their labels."""
    return ["--images", folder / "images", "--labels", folder / "labels"]


def test_steps_end_a_run_inside_an_epoch(run: RunFolder):
    rows = run.log_file.read_text().splitlines()
    assert len(rows) == 1 + 3
    assert [row["step"] for row in read_log(run.val_file)] == ["2", "3"]
    assert {"miou", "left_at", "gflops_max"} <= run.metrics().keys()
    assert len(run.metrics()["iou"]) == len(NAMES)


def test_heads_are_trained_on_a_frozen_vit(recipe: Recipe, run: RunFolder, tmp_path: Path):
    """From the run's model, as somebody would who has a backbone of theirs."""
    start = replace(recipe.train, init_from=run.path, freeze="vit", ema=0.0)
    train(replace(recipe, train=start), out=tmp_path / "run")
    before, after = (dict(load(folder).state_dict()) for folder in (run.best_file, tmp_path / "run"))
    for name, value in before.items():
        if name.startswith("net.vit.") or value.ndim > 1:  # an attention's first bias has no gradient
            assert torch.equal(value, after[name]) == name.startswith("net.vit."), name


def test_a_segmenter_starts_from_one_of_other_classes(checkpoint: Path):
    model = build(tiny(KeepAllConfig(), classes=("sky", "sea")))
    assert start_from(model, checkpoint) == tuple(f"net.heads.{stage}.queries" for stage in range(3))


def test_a_frozen_vit_keeps_nothing_for_gradients():
    model = build(tiny(KeepAllConfig())).train()
    freeze(model, "vit")
    tokens, _ = model.vit(torch.rand(1, 3, 48, 48), model.policy)
    assert not tokens.x.requires_grad


def test_a_resumed_run_ends_with_the_same_weights(recipe: Recipe, run: RunFolder, tmp_path: Path):
    """Also where it is steps that end it."""
    killed_at(2, recipe, tmp_path / "run")
    train(None, out=tmp_path / "run", resume=True)
    assert_same_weights(load(tmp_path / "run/last.safetensors"), load(run.last_file))


def test_eval_ends_with_one_json_line_of_what_is_predicted(run: RunFolder, scenes: Path, command: Command):
    figures = command("eval", run.path, *judged(scenes / "val")).figures
    model = load(run.path)
    assert isinstance(model, Segmenter)
    metric = SegmentationMetric(len(NAMES))
    for path in sorted((scenes / "val/images").glob("*.png")):
        label = np.asarray(Image.open(scenes / "val/labels" / path.name))
        metric.update(model.predict([path])[0], torch.from_numpy(label.copy()))
    assert figures["miou"] == pytest.approx(metric.compute()["miou"], abs=1e-5)
    assert figures["policy"] == "dtop"
    assert figures["images"] == 3
    assert 0 < sum(figures["left_at"]) <= 1
    assert figures["gflops_min"] <= figures["gflops"] <= figures["gflops_max"]


def test_thresholds_on_a_dense_checkpoint_are_direct_pruning(checkpoint: Path, scenes: Path, command: Command):
    args, exits = ["eval", checkpoint, *judged(scenes / "val")], ["--policy", "dtop", "--set"]
    options = {"dense": [], "never": [*exits, "thresholds=1"], "early": [*exits, "thresholds=0.1"]}
    figures = {name: command(*args, *more).figures for name, more in options.items()}
    assert "left_at" not in figures["dense"]
    assert figures["never"]["miou"] == figures["dense"]["miou"]
    assert sum(figures["never"]["left_at"]) == 0
    assert sum(figures["early"]["left_at"]) > 0.5
    assert figures["early"]["tokens"][-1] < figures["dense"]["tokens"][-1]
    printed = command(*args, "--policy", "random", "--set", "thresholds=0.5", status=2)
    assert "'random' has no field 'thresholds'" in printed.err


def test_predict_writes_labels_and_pictures(run: RunFolder, scenes: Path, tmp_path: Path, command: Command):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    shutil.copy(scenes / "val/images/000000.png", images / "a.png")
    Image.fromarray(np.zeros((3, 90), dtype=np.uint8)).save(images / "flat.png")  # lower than a patch
    (images / "broken.png").write_bytes(b"\x89PNG but no more")
    assert "broken.png" in command("predict", run.path, images, "--out", out, status=1).err
    with Image.open(out / "labels/a.png.png") as labels:
        assert labels.mode == "P"
        values, palette = np.asarray(labels), labels.getpalette()
    expected = load(run.path).predict([images / "a.png"])[0]
    assert values.shape == (64, 80)
    assert np.array_equal(values, np.asarray(expected))
    with Image.open(out / "labels/flat.png.png") as flat:
        assert flat.size == (90, 3)
    classes = json.loads((out / "classes.json").read_text())
    assert [entry["name"] for entry in classes] == list(NAMES)
    assert palette is not None
    assert [tuple(palette[3 * i : 3 * i + 3]) for i in range(len(NAMES))] == [tuple(c["colour"]) for c in classes]
    assert {path.name for path in (out / "pictures").iterdir()} == {"a.png.png", "flat.png.png"}
    command("predict", run.path, images, "--out", out, "--ids", "ids.json", status=2)


@pytest.mark.parametrize("broken", ["size", "value", "image"])
def test_a_broken_pair_costs_no_figure_of_the_others(
    broken: str, checkpoint: Path, scenes: Path, tmp_path, command: Command
):
    folder = tmp_path / "val"
    shutil.copytree(scenes / "val", folder)
    victim = folder / "labels/000001.png"
    if broken == "size":
        Image.fromarray(np.zeros((10, 10), dtype=np.uint8)).save(victim)
    elif broken == "value":
        Image.fromarray(np.full((64, 80), 77, dtype=np.uint8)).save(victim)
    else:
        victim = folder / "images/000001.png"
        victim.write_bytes(victim.read_bytes()[:300])
    printed = command("eval", checkpoint, *judged(folder), "--batch-size", 3, status=1)
    assert printed.figures["images"] == 2
    assert str(victim) in printed.figures["failures"][0]
    assert str(victim) in printed.err
    if broken == "value":
        assert "77" in printed.figures["failures"][0]


def test_missing_partners_and_empty_folders_are_told_at_once(
    checkpoint: Path, scenes: Path, tmp_path, command: Command
):
    folder = tmp_path / "val"
    shutil.copytree(scenes / "val", folder)
    (folder / "labels/000001.png").unlink()
    args = ["eval", checkpoint, *judged(folder)]
    assert "000001" in command(*args, status=2).err
    for path in folder.glob("*/*.png"):
        path.unlink()
    assert "holds no" in command(*args, status=2).err


def test_kinds_of_models_and_data_do_not_mix(checkpoint: Path, scenes: Path, command: Command, recipe: Recipe):
    wrong = ["--images", scenes / "val/images", "--annotations", scenes / "val/annotations.json"]
    assert "--labels" in command("eval", checkpoint, *wrong, status=2).err
    detector = find_recipe("nuclei_vit").model
    assert isinstance(detector, DetectorConfig)
    refused("detector", open_data, replace(recipe, model=detector))


def test_own_classes_on_the_command_line(recipe: Recipe, tmp_path: Path):
    three = with_classes(recipe, num_classes=3, ignore_index=9)
    assert isinstance(three.model, SegmenterConfig)
    assert three.model.classes == ("class 0", "class 1", "class 2")
    assert three.model.ignore_index == 9
    colours = tmp_path / "palette.txt"
    colours.write_text("0 0 0 ground\n255 0 0 roof\n")
    two = with_classes(recipe, palette=colours)
    assert isinstance(two.model, SegmenterConfig)
    assert isinstance(two.data, LabelsData)
    assert two.model.classes == ("ground", "roof")
    assert two.model.palette == ((0, 0, 0), (255, 0, 0))
    assert two.data.palette == colours
    refused("2 colours for 3 classes", with_classes, recipe, palette=colours, num_classes=3)
    refused("detector", with_classes, find_recipe("nuclei_vit"), num_classes=2)


def test_selected_tokens_alone_are_for_gates_and_early_exits_train_as_ever(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
):
    model, modes = build(recipe.model).train(), []
    original = Segmenter.forward

    def spied(self: Segmenter, images: list, targets: Any = None, **options: Any) -> Any:
        modes.append(options["execution"].mode)
        return original(self, images, targets, **options)

    monkeypatch.setattr(Segmenter, "forward", spied)
    batch = Batch([torch.rand(3, 48, 48)], [{"labels": torch.zeros(48, 48, dtype=torch.int64)}], torch.device("cpu"))
    found = []
    for selected in (False, True):
        torch.manual_seed(0)
        found.append(Losses(model)(batch, selected=selected)[0])
    assert modes == ["auto", "auto"] and found[0] == found[1]
