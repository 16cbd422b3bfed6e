"""Segmenters from training to pictures, on the command line, and what a person can do wrong on the way."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sievit import cli
from sievit.config import ConfigError, to_json
from sievit.data.labels import LabelDataset
from sievit.data.scenes import CLASSES, generate
from sievit.data.semantic import SemanticAugmentConfig
from sievit.engine.batches import Batch, Losses
from sievit.engine.checkpoint import RunFolder, read_log
from sievit.engine.evaluate import compare, evaluate
from sievit.engine.initial import start_from
from sievit.engine.optim import freeze
from sievit.engine.recipe import Recipe, TrainConfig, open_data, with_classes
from sievit.engine.train import train
from sievit.heads import ATMConfig
from sievit.models.build import build, load, save
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter, SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig
from sievit.recipes import recipe as find_recipe
from sievit.tasks.segmentation import LabelsData
from sievit.vit import ViTConfig

NAMES = ("ground", *CLASSES)


def tiny(policy: DToPConfig | KeepAllConfig, classes: tuple[str, ...] = NAMES) -> SegmenterConfig:
    return SegmenterConfig(
        vit=ViTConfig(grid=(6, 6), patch_size=8, embed_dim=16, depth=4, num_heads=2, drop_path_rate=0.1),
        policy=policy,
        head=ATMConfig(channels=8, num_heads=2, num_layers=2),
        out_indices=(1, 2, 3),
        crop=(48, 48),
        stride=(32, 32),
        input=InputConfig(min_size=64, max_size=128, size_divisor=8),
        classes=classes,
    )


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    generate(root / "train", num_images=8, size=(64, 80), seed=1)
    generate(root / "val", num_images=3, size=(64, 80), seed=2)
    return root


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
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("model") / "dense.safetensors"
    save(build(tiny(KeepAllConfig())), path)
    return path


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
    freeze(model.vit, "vit")
    tokens, _ = model.vit(torch.rand(1, 3, 48, 48), model.policy)
    assert not tokens.x.requires_grad
    losses = model([torch.rand(3, 48, 48)], [{"labels": torch.zeros(48, 48, dtype=torch.int64)}]).losses
    torch.stack(list(losses.values())).sum().backward()
    assert all((p.grad is None) == n.startswith("net.vit.") for n, p in model.named_parameters())


def test_a_resumed_run_ends_with_the_same_weights(recipe: Recipe, run: RunFolder, tmp_path: Path, monkeypatch):
    from sievit.engine import train as engine

    original, out = engine._Run._step, tmp_path / "run"

    def failing(self, parts):
        if self.step == 2:
            raise KeyboardInterrupt
        return original(self, parts)

    monkeypatch.setattr(engine._Run, "_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out=out)
    monkeypatch.undo()
    train(None, out=out, resume=True)
    first, second = load(run.last_file).state_dict(), load(out / "last.safetensors").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dense_training_reaches_the_auxiliary_heads(recipe: Recipe):
    config = replace(recipe, model=replace(recipe.model, policy=KeepAllConfig()))
    model = build(config.model).train()
    dataset, _ = open_data(config)
    assert isinstance(dataset, LabelDataset)
    image, target = dataset[0]
    losses = model([image], [target]).losses
    assert {"class", "mask", "dice", "aux_0_class", "aux_1_dice"} <= losses.keys()
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_eval_ends_with_one_json_line_equal_to_brute_force(run: RunFolder, scenes: Path, capsys):
    args = ["eval", str(run.path), "--images", str(scenes / "val/images"), "--labels", str(scenes / "val/labels")]
    assert cli.main(args) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = load(run.path)
    assert isinstance(model, Segmenter)
    hits, unions = np.zeros(len(NAMES)), np.zeros(len(NAMES))
    for path in sorted((scenes / "val/images").glob("*.png")):
        said = model.predict([path])[0].numpy()
        truth = np.asarray(Image.open(scenes / "val/labels" / path.name))
        for k in range(len(NAMES)):
            hits[k] += np.sum((said == k) & (truth == k), dtype=np.float64)
            unions[k] += np.sum((said == k) | (truth == k), dtype=np.float64)
    seen = unions > 0
    assert figures["miou"] == pytest.approx(np.mean(hits[seen] / unions[seen]), abs=1e-5)
    assert figures["policy"] == "dtop"
    assert figures["images"] == 3
    assert 0 < sum(figures["left_at"]) <= 1
    assert figures["gflops_min"] <= figures["gflops"] <= figures["gflops_max"]


def test_thresholds_on_a_dense_checkpoint_are_direct_pruning(checkpoint: Path, scenes: Path, capsys):
    args = ["eval", str(checkpoint), "--images", str(scenes / "val/images"), "--labels", str(scenes / "val/labels")]
    figures, exits = {}, ["--policy", "dtop", "--set"]
    for name, more in {"dense": [], "never": [*exits, "thresholds=1"], "early": [*exits, "thresholds=0.1"]}.items():
        assert cli.main([*args, *more]) == 0
        figures[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "left_at" not in figures["dense"]
    assert figures["never"]["miou"] == figures["dense"]["miou"]
    assert sum(figures["never"]["left_at"]) == 0
    assert sum(figures["early"]["left_at"]) > 0.5
    assert figures["early"]["tokens"][-1] < figures["dense"]["tokens"][-1]
    assert cli.main([*args, "--policy", "random", "--set", "thresholds=0.5"]) == 2
    assert "'random' has no field 'thresholds'" in capsys.readouterr().err


def test_compare_takes_segmenters(checkpoint: Path, run: RunFolder, recipe: Recipe):
    _, val = open_data(recipe)
    figures = compare(load(checkpoint), load(run.path), val, limit=2)
    assert figures["dense"]["images"] == figures["sparse"]["images"] == 2
    assert "left_at" in figures["sparse"]
    assert figures["speedup"] > 0


def test_predict_writes_labels_and_pictures(run: RunFolder, scenes: Path, tmp_path: Path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    shutil.copy(scenes / "val/images/000000.png", images / "a.png")
    Image.fromarray(np.zeros((3, 90), dtype=np.uint8)).save(images / "flat.png")  # lower than a patch
    (images / "broken.png").write_bytes(b"\x89PNG but no more")
    assert cli.main(["predict", str(run.path), str(images), "--out", str(out)]) == 1
    assert "broken.png" in capsys.readouterr().err
    with Image.open(out / "labels/a.png") as labels:
        assert labels.mode == "P"
        values, palette = np.asarray(labels), labels.getpalette()
    expected = load(run.path).predict([images / "a.png"])[0]
    assert values.shape == (64, 80)
    assert np.array_equal(values, np.asarray(expected))
    with Image.open(out / "labels/flat.png") as flat:
        assert flat.size == (90, 3)
    classes = json.loads((out / "classes.json").read_text())
    assert [entry["name"] for entry in classes] == list(NAMES)
    assert palette is not None
    assert [tuple(palette[3 * i : 3 * i + 3]) for i in range(len(NAMES))] == [tuple(c["colour"]) for c in classes]
    assert {path.name for path in out.glob("*.png")} == {"a.png", "flat.png"}
    assert cli.main(["predict", str(run.path), str(images), "--out", str(out), "--ids", "ids.json"]) == 2


@pytest.mark.parametrize("broken", ["size", "value", "image"])
def test_a_broken_pair_costs_no_figure_of_the_others(broken: str, checkpoint: Path, scenes: Path, tmp_path, capsys):
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
    args = ["eval", str(checkpoint), "--images", str(folder / "images"), "--labels", str(folder / "labels")]
    assert cli.main([*args, "--batch-size", "3"]) == 1
    printed = capsys.readouterr()
    figures = json.loads(printed.out.splitlines()[-1])
    assert figures["images"] == 2
    assert str(victim) in figures["failures"][0]
    assert str(victim) in printed.err
    if broken == "value":
        assert "77" in figures["failures"][0]


def test_missing_partners_and_empty_folders_are_told_at_once(checkpoint: Path, scenes: Path, tmp_path, capsys):
    folder = tmp_path / "val"
    shutil.copytree(scenes / "val", folder)
    (folder / "labels/000001.png").unlink()
    args = ["eval", str(checkpoint), "--images", str(folder / "images"), "--labels", str(folder / "labels")]
    assert cli.main(args) == 2
    assert "000001" in capsys.readouterr().err
    for path in folder.glob("*/*.png"):
        path.unlink()
    assert cli.main(args) == 2
    assert "holds no" in capsys.readouterr().err


def test_kinds_of_models_and_data_do_not_mix(checkpoint: Path, scenes: Path, capsys, recipe: Recipe):
    images = ["--images", str(scenes / "val/images")]
    assert cli.main(["eval", str(checkpoint), *images, "--annotations", str(scenes / "val/annotations.json")]) == 2
    assert "--labels" in capsys.readouterr().err
    detector = find_recipe("nuclei_vit").model
    assert isinstance(detector, DetectorConfig)
    with pytest.raises(ConfigError, match="detector"):
        open_data(replace(recipe, model=detector))


def test_images_in_which_every_token_leaves_or_none(recipe: Recipe, scenes: Path):
    torch.manual_seed(0)
    model = build(tiny(DToPConfig(thresholds=(0.0,), keep_per_class=0)))
    _, val = open_data(recipe)
    figures = evaluate(model, val, batch_size=3)
    assert figures["left_at"][0] == 1.0
    assert figures["tokens"][-1] == 0
    assert 0 <= figures["miou"] <= 1
    never = evaluate(build(tiny(DToPConfig(thresholds=(1.0,)))), val)
    assert never["left_at"] == [0.0, 0.0, 0.0]


def test_a_one_class_image(tmp_path: Path):
    for name, value in (("images", 120), ("labels", 2)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((64, 64), value, dtype=np.uint8)).save(tmp_path / name / "plain.png")
    dataset = LabelDataset(tmp_path / "images", tmp_path / "labels", classes=NAMES)
    torch.manual_seed(0)
    figures = evaluate(build(tiny(DToPConfig(thresholds=(0.2,), keep_per_class=1))), dataset)
    assert figures["images"] == 1
    assert figures["mean_accuracy"] == figures["pixel_accuracy"]


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
    with pytest.raises(ConfigError, match="2 colours for 3 classes"):
        with_classes(recipe, palette=colours, num_classes=3)
    with pytest.raises(ConfigError, match="detector"):
        with_classes(find_recipe("nuclei_vit"), num_classes=2)


@pytest.mark.parametrize("name", ["nuclei_segvit", "nuclei_segvit_dtop"])
def test_small_recipes_build_and_are_small(name: str):
    recipe = find_recipe(name)
    model = build(recipe.model)
    assert isinstance(model, Segmenter)
    assert sum(p.numel() for p in model.parameters()) < 3.3e6
    json.dumps(to_json(recipe))


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
