"""A sweep evaluates what `evaluate` does, keeps what is finished, and says what went wrong."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sievit import cli
from sievit.config import ConfigError
from sievit.data.labels import LabelDataset
from sievit.data.scenes import CLASSES, generate
from sievit.engine.evaluate import evaluate
from sievit.heads import ATMConfig, MaskRCNNConfig
from sievit.models.build import build, load, save
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter, SegmenterConfig
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import DToPConfig, KeepAllConfig
from sievit.report import sweep as module
from sievit.report.plot import draw_curves
from sievit.report.sweep import Curve, ExitOptions, Labelled, sweep, with_policy
from sievit.vit import ViTConfig

NAMES = ("ground", *CLASSES)
CONFIG = SegmenterConfig(
    vit=ViTConfig(grid=(6, 6), patch_size=8, embed_dim=32, depth=4, num_heads=2),
    policy=DToPConfig(thresholds=(0.9,), keep_per_class=0),
    head=ATMConfig(channels=8, num_heads=2, num_layers=2),
    out_indices=(1, 2, 3),
    input=InputConfig(min_size=96, max_size=128, size_divisor=8),
    classes=NAMES,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    root = tmp_path_factory.mktemp("data")
    generate(root, num_images=3, size=(48, 64), seed=1)
    return Labelled(images=root / "images", labels=root / "labels")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; about a quarter of the tokens is graded above 0.9, three quarters above 0.7."""
    torch.manual_seed(0)
    model = build(CONFIG)
    assert isinstance(model, Segmenter)
    with torch.no_grad():
        for head in model.net.heads:
            for name in ("layers.1.cross_attn.q.weight", "layers.1.cross_attn.k.weight", "class_embed.weight"):
                head.get_parameter(name).mul_(40)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save(model, path)
    return path


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the evaluations that are run, and a failure in each that holds "0.1"."""
    titles: list[str] = []

    def counting(model: Segmenter, dataset: LabelDataset, *, title: str, **options: object) -> dict:
        titles.append(title)
        if "0.1" in title:
            raise RuntimeError("out of memory")
        return evaluate(model, dataset, title=title, **options)  # ty: ignore[invalid-argument-type]

    monkeypatch.setattr(module, "evaluate", counting)
    return titles


def test_points_are_those_of_evaluate(data: Labelled, checkpoint: Path, tmp_path: Path):
    result = sweep(checkpoint, data, (0.7, 0.9), tmp_path, timed_images=2)
    points = result["points"]
    assert [point["threshold"] for point in points] == [1.0, 0.9, 0.7]
    dataset = LabelDataset(data.images, data.labels, classes=NAMES)
    for point, policy in zip(
        points,
        (KeepAllConfig(), *(DToPConfig(thresholds=(t,), keep_per_class=0) for t in (0.9, 0.7))),
        strict=True,
    ):
        alone = evaluate(load(checkpoint, policy=policy), dataset)
        for name in ("miou", "gflops", "gflops_std", "gflops_min", "gflops_max", "keep", "images"):
            assert point[name] == alone[name], (point["threshold"], name)
        assert point.get("left_at") == alone.get("left_at")
        assert point["ms_per_image"] > 0
    assert 0.1 < points[1]["left_at"][0] < points[2]["left_at"][0] < 0.9
    assert points[2]["gflops"] < points[1]["gflops"]


def test_files_say_the_same(data: Labelled, checkpoint: Path, tmp_path: Path):
    result = sweep(checkpoint, data, (0.2,), tmp_path, limit=2, timed_images=1)
    assert json.loads((tmp_path / "sweep.json").read_text()) == result
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["threshold"]) for row in rows] == [1.0, 0.2]
    assert [float(row["miou"]) for row in rows] == [point["miou"] for point in result["points"]]
    assert float(rows[1]["left_at_0"]) == result["points"][1]["left_at"][0] > 0
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(2**24) or ()) > 20


def test_what_is_finished_is_not_computed_again(
    data: Labelled, checkpoint: Path, tmp_path: Path, evaluated: list[str], capsys: pytest.CaptureFixture[str]
):
    first = sweep(checkpoint, data, (0.2,), tmp_path, limit=2, timed_images=1)
    assert evaluated == ["DToP 1", "DToP 0.2"]
    again = sweep(checkpoint, data, (0.2,), tmp_path, limit=2, timed_images=1)
    assert evaluated == ["DToP 1", "DToP 0.2"]
    assert again == first, "times included"
    assert "2 of 2 points are in" in capsys.readouterr().err
    more = sweep(checkpoint, data, (0.2, 0.3), tmp_path, limit=2, timed_images=1)
    assert evaluated == ["DToP 1", "DToP 0.2", "DToP 0.3"]
    assert [point["threshold"] for point in more["points"]] == [1.0, 0.3, 0.2]
    assert len({point["timing"] for point in more["points"]}) == 1, "all are timed together"


def test_a_failure_leaves_the_others(data: Labelled, checkpoint: Path, tmp_path: Path, evaluated: list[str]):
    result = sweep(checkpoint, data, (0.2, 0.1, 0.3), tmp_path, limit=1, timed_images=1)
    assert [point["threshold"] for point in result["points"]] == [1.0, 0.3, 0.2]
    assert result["failures"] == [{"model": "DToP", "threshold": 0.1, "error": "out of memory"}]
    sweep(checkpoint, data, (0.1,), tmp_path, limit=1, timed_images=1)
    assert evaluated[-1] == "DToP 0.1", "it is tried again"
    assert len(evaluated) == 5


def test_an_image_that_cannot_be_used_does_not_end_it(
    data: Labelled, checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    labels = tmp_path_factory.mktemp("labels")
    for i, path in enumerate(sorted(data.labels.iterdir())):
        with Image.open(path) as image:
            (image.resize((8, 8)) if i == 0 else image).save(labels / path.name)
    result = sweep(checkpoint, replace(data, labels=labels), (0.2,), tmp_path, timed_images=1)
    assert [point["images"] for point in result["points"]] == [2, 2]
    assert all("8x8" in point["failures"][0] for point in result["points"])


def test_other_settings_and_checkpoints_do_not_mix(data: Labelled, checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    sweep(checkpoint, data, (0.2,), out, limit=1, timed_images=1)
    before = (out / "sweep.json").read_bytes()
    with pytest.raises(ConfigError, match="made with limit 1, now it is 2; give another --out"):
        sweep(checkpoint, data, (0.2,), out, limit=2)
    with pytest.raises(ConfigError, match="keep_per_class"):
        sweep(checkpoint, data, (0.2,), out, limit=1, exits=ExitOptions(keep_per_class=3))
    other = tmp_path / "other.safetensors"
    save(build(CONFIG), other)
    with pytest.raises(ConfigError, match="another checkpoint"):
        sweep(other, data, (0.2,), out, limit=1)
    with pytest.raises(ConfigError, match="points of 'DToP' too"):
        sweep(other, data, (0.2,), out, limit=1, name="other")
    assert (out / "sweep.json").read_bytes() == before
    (out / "sweep.json").write_text("[]")
    with pytest.raises(ConfigError, match="no sweep"):
        sweep(checkpoint, data, (0.2,), out, limit=1)


def test_further_checkpoints_are_curves(data: Labelled, checkpoint: Path, tmp_path: Path):
    other = tmp_path / "other.safetensors"
    save(build(CONFIG), other)
    also = (f"again={other}", f"own={other}@0.3")
    result = sweep(checkpoint, data, (0.2,), tmp_path / "out", also=also, limit=1, timed_images=1)
    found = [(point["model"], point["threshold"]) for point in result["points"]]
    assert found == [("DToP", 1.0), ("DToP", 0.2), ("again", 1.0), ("again", 0.2), ("own", 0.3)]
    left = [point["left_at"][0] for point in result["points"] if "left_at" in point]
    assert left[0] > 0.5 and left[2] == 0.0, "other weights"
    assert result["points"][0]["gflops"] == result["points"][2]["gflops"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"also": ("x",)}, "write NAME=CHECKPOINT"),
        ({"also": ("x=model@high",)}, "behind the @"),
        ({"also": ("DToP=model",)}, "two curves of one name"),
        ({"thresholds": (0.2, -1.0)}, "from 0 to 1"),
        ({"exits": ExitOptions(keep_per_class=-1)}, "keep_per_class"),
    ],
)
def test_wrong_options_are_named(data: Labelled, checkpoint: Path, tmp_path: Path, options: dict, message: str):
    arguments: dict[str, Any] = {"thresholds": (0.2,), "out": tmp_path / "out", **options}
    with pytest.raises(ConfigError, match=message):
        sweep(checkpoint, data, **arguments)
    assert not (tmp_path / "out").exists(), "nothing is begun"


def test_only_segmenters_with_auxiliary_heads(data: Labelled, checkpoint: Path, tmp_path: Path, detector: Path):
    with pytest.raises(ConfigError, match="is a detector"):
        sweep(detector, data, (0.2,), tmp_path / "out")
    with pytest.raises(ConfigError, match="no such file"):
        sweep(tmp_path / "none.safetensors", data, (0.2,), tmp_path / "out")
    single = tmp_path / "single.safetensors"
    save(build(replace(CONFIG, policy=KeepAllConfig(), out_indices=(3,))), single)
    with pytest.raises(ConfigError, match="no auxiliary head"):
        sweep(single, data, (0.2,), tmp_path / "out")


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    config = DetectorConfig(
        vit=replace(CONFIG.vit, token_stride=16),
        policy=KeepAllConfig(),
        input=CONFIG.input,
        classes=("thing",),
        category_ids=(1,),
        neck=PyramidConfig(),
        head=MaskRCNNConfig(num_classes=1),
    )
    path = tmp_path / "detector.safetensors"
    save(build(config), path)
    return path


def test_options_of_the_checkpoint_stand_unless_others_are_given(checkpoint: Path):
    model = load(checkpoint)
    assert isinstance(model, Segmenter)
    assert ExitOptions().policy(model, 0.3) == DToPConfig(thresholds=(0.3,), keep_per_class=0)
    given = ExitOptions(keep_per_class=2, grade="margin", preserve=True, rejoin=True).policy(model, 0.3)
    assert given == DToPConfig(thresholds=(0.3,), keep_per_class=2, grade="margin", preserve=True, rejoin=True)
    dense = with_policy(model, KeepAllConfig())
    assert dense.config.policy == KeepAllConfig() and model.config.policy == CONFIG.policy
    assert next(dense.parameters()) is next(model.parameters()), "no copy"
    assert Curve.parse("a=b@0.5,0.7", ()) == Curve("a", Path("b"), (0.7, 0.5))


def test_the_command_ends_with_json(
    data: Labelled, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluated: list[str]
):
    common = ["sweep", str(checkpoint), "--images", str(data.images), "--labels", str(data.labels), "--limit", "1"]
    common += ["--timed-images", "1", "--out", str(tmp_path), "--keep-per-class", "1"]
    assert cli.main([*common, "--thresholds", "0.2", "0.25"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [point["threshold"] for point in result["points"]] == [1.0, 0.25, 0.2]
    assert cli.main([*common, "--thresholds", "0.1"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failures"]


def test_a_picture_of_a_single_point_and_of_close_ones(tmp_path: Path):
    point = {"model": "a", "threshold": 1.0, "miou": 0.5, "gflops": 2.0, "ms_per_image": 3.0}
    many = [{**point, "model": m, "threshold": t} for m in "abcdefg" for t in (0.8, 0.9, 1.0)]
    for i, points in enumerate(([point], many)):
        draw_curves(points, tmp_path / f"{i}.png", device="cpu")
        with Image.open(tmp_path / f"{i}.png") as picture:
            assert picture.size == (1536, 672)
