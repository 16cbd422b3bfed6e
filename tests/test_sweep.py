"""A sweep evaluates what `evaluate` does, keeps what is finished, and says what went wrong."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sievit import cli
from sievit.config import ConfigError
from sievit.data.labels import LabelDataset
from sievit.data.scenes import CLASSES, generate
from sievit.data.truth import Truth
from sievit.engine.evaluate import evaluate
from sievit.heads import ATMConfig, MaskRCNNConfig
from sievit.heads.config import BoxConfig
from sievit.models.build import build, load, save
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter, SegmenterConfig
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import DToPConfig, KeepAllConfig, PolicyOptions
from sievit.report import sweep as module
from sievit.report.plot import draw_curves
from sievit.report.sweep import sweep
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
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    generate(root, num_images=3, size=(48, 64), seed=1)
    return root


def swept(checkpoint: Path, data: Path, values: tuple[float, ...], out: Path, **options: Any) -> dict[str, Any]:
    truth = options.pop("truth", Truth(labels=data / "labels"))
    return sweep(checkpoint, data / "images", truth=truth, values=tuple(map(str, values)), out=out, **options)


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


def test_points_are_those_of_evaluate(data: Path, checkpoint: Path, tmp_path: Path):
    result = swept(checkpoint, data, (0.7, 0.9), tmp_path, timed_images=2)
    points = result["points"]
    assert [point["value"] for point in points] == [None, 0.9, 0.7]
    dataset = LabelDataset(data / "images", data / "labels", classes=NAMES)
    for point, policy in zip(
        points,
        (KeepAllConfig(), *(DToPConfig(thresholds=(t,), keep_per_class=0) for t in (0.9, 0.7))),
        strict=True,
    ):
        alone = evaluate(load(checkpoint, policy=policy), dataset)
        for name in ("miou", "gflops", "gflops_std", "gflops_min", "gflops_max", "keep", "images"):
            assert point[name] == alone[name], (point["value"], name)
        assert point.get("left_at") == alone.get("left_at")
        assert point["ms_per_image"] > 0
    assert 0.1 < points[1]["left_at"][0] < points[2]["left_at"][0] < 0.9
    assert points[2]["gflops"] < points[1]["gflops"]


def test_files_say_the_same(data: Path, checkpoint: Path, tmp_path: Path):
    result = swept(checkpoint, data, (0.2,), tmp_path, limit=2, timed_images=1)
    assert json.loads((tmp_path / "sweep.json").read_text()) == result
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows] == ["dense", "0.2"]
    assert [float(row["miou"]) for row in rows] == [point["miou"] for point in result["points"]]
    assert float(rows[1]["left_at_0"]) == result["points"][1]["left_at"][0] > 0
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(2**24) or ()) > 20


def test_what_is_finished_is_not_computed_again(
    data: Path, checkpoint: Path, tmp_path: Path, evaluated: list[str], capsys: pytest.CaptureFixture[str]
):
    first = swept(checkpoint, data, (0.2,), tmp_path, limit=2, timed_images=1)
    assert evaluated == ["dtop dense", "dtop 0.2"]
    again = swept(checkpoint, data, (0.2,), tmp_path, limit=2, timed_images=1)
    assert evaluated == ["dtop dense", "dtop 0.2"]
    assert again == first, "times included"
    assert "2 of 2 points are in" in capsys.readouterr().err
    more = swept(checkpoint, data, (0.2, 0.3), tmp_path, limit=2, timed_images=1)
    assert evaluated == ["dtop dense", "dtop 0.2", "dtop 0.3"]
    assert [point["value"] for point in more["points"]] == [None, 0.3, 0.2]
    assert len({point["timing"] for point in more["points"]}) == 1, "all are timed together"


def test_a_failure_leaves_the_others(data: Path, checkpoint: Path, tmp_path: Path, evaluated: list[str]):
    result = swept(checkpoint, data, (0.2, 0.1, 0.3), tmp_path, limit=1, timed_images=1)
    assert [point["value"] for point in result["points"]] == [None, 0.3, 0.2]
    assert result["failures"] == [{"model": "dtop", "value": 0.1, "error": "out of memory"}]
    swept(checkpoint, data, (0.1,), tmp_path, limit=1, timed_images=1)
    assert evaluated[-1] == "dtop 0.1", "it is tried again"
    assert len(evaluated) == 5


def test_an_image_that_cannot_be_used_does_not_end_it(
    data: Path, checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    labels = tmp_path_factory.mktemp("labels")
    for i, path in enumerate(sorted((data / "labels").iterdir())):
        with Image.open(path) as image:
            (image.resize((8, 8)) if i == 0 else image).save(labels / path.name)
    result = swept(checkpoint, data, (0.2,), tmp_path, timed_images=1, truth=Truth(labels=labels))
    assert [point["images"] for point in result["points"]] == [2, 2]
    assert all("8x8" in point["failures"][0] for point in result["points"])


def test_other_settings_and_checkpoints_do_not_mix(data: Path, checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    swept(checkpoint, data, (0.2,), out, limit=1, timed_images=1)
    before = (out / "sweep.json").read_bytes()
    with pytest.raises(ConfigError, match="made with limit 1, now it is 2; give another --out"):
        swept(checkpoint, data, (0.2,), out, limit=2)
    with pytest.raises(ConfigError, match="made with set"):
        swept(checkpoint, data, (0.2,), out, limit=1, policy=PolicyOptions(set=("keep_per_class=3",)))
    other = tmp_path / "other.safetensors"
    save(build(CONFIG), other)
    with pytest.raises(ConfigError, match="another checkpoint"):
        swept(other, data, (0.2,), out, limit=1)
    with pytest.raises(ConfigError, match="points of 'dtop' too"):
        swept(other, data, (0.2,), out, limit=1, name="other")
    assert (out / "sweep.json").read_bytes() == before
    (out / "sweep.json").write_text("[]")
    with pytest.raises(ConfigError, match="no sweep"):
        swept(checkpoint, data, (0.2,), out, limit=1)


def test_further_checkpoints_are_curves(data: Path, checkpoint: Path, tmp_path: Path):
    other = tmp_path / "other.safetensors"
    save(build(CONFIG), other)
    also = (f"again={other}", f"own={other}@0.3")
    result = swept(checkpoint, data, (0.2,), tmp_path / "out", also=also, limit=1, timed_images=1)
    found = [(point["model"], point["value"]) for point in result["points"]]
    assert found == [("dtop", None), ("dtop", 0.2), ("again", None), ("again", 0.2), ("own", 0.3)]
    left = [point["left_at"][0] for point in result["points"] if "left_at" in point]
    assert left[0] > 0.5 and left[2] == 0.0, "other weights"
    assert result["points"][0]["gflops"] == result["points"][2]["gflops"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"also": ("x",)}, "write NAME=CHECKPOINT"),
        ({"also": ("x=model@",)}, "NAME=CHECKPOINT@0.9,0.95"),
        ({"also": ("dtop=CHECKPOINT",)}, "two curves of one name"),
        ({"values": (0.2, -1.0)}, "from 0 to 1"),
        ({"policy": PolicyOptions(set=("keep_per_class=-1",))}, "keep_per_class"),
        ({"policy": PolicyOptions(policy="keep_all")}, "which values of its policy 'keep_all'"),
        ({"field": "grade", "values": ()}, "Give --field and --values"),
        ({"field": "grades"}, "no field 'grades'; did you mean 'grade'"),
    ],
)
def test_wrong_options_are_named(data: Path, checkpoint: Path, tmp_path: Path, options: dict, message: str):
    options["also"] = tuple(text.replace("CHECKPOINT", str(checkpoint)) for text in options.get("also", ()))
    with pytest.raises(ConfigError, match=message):
        swept(checkpoint, data, options.pop("values", (0.2,)), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists(), "nothing is begun"


def test_a_detector_at_fixed_shares(data: Path, tmp_path: Path, detector: Path):
    """Of another policy, by name."""
    options = PolicyOptions(policy="random", set=("first_block=1", "shares=0.5"))
    with pytest.raises(ConfigError, match="give --annotations"):
        swept(detector, data, (0.2,), tmp_path / "out", policy=options, field="shares")
    truth = Truth(annotations=data / "annotations.json")
    result = swept(detector, data, (0.9, 0.5), tmp_path, truth=truth, policy=options, field="shares", timed_images=1)
    points = result["points"]
    assert [point["value"] for point in points] == [None, 0.9, 0.5]
    assert all("box_ap" in point for point in points)
    assert [point["keep"][1] for point in points] == pytest.approx([1.0, 0.9, 0.5], abs=0.05)


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    config = DetectorConfig(
        vit=ViTConfig(grid=(6, 6), embed_dim=32, depth=4, num_heads=2),
        policy=KeepAllConfig(),
        input=CONFIG.input,
        classes=CLASSES,
        category_ids=tuple(range(1, len(CLASSES) + 1)),
        neck=PyramidConfig(out_channels=8),
        head=MaskRCNNConfig(num_classes=len(CLASSES), with_masks=False, fpn_channels=8, box=BoxConfig(fc=16)),
    )
    path = tmp_path / "detector.safetensors"
    save(build(config), path)
    return path


def test_the_command_ends_with_json(
    data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluated: list[str]
):
    common = ["sweep", str(checkpoint), "--images", str(data / "images"), "--labels", str(data / "labels")]
    common += ["--limit", "1", "--timed-images", "1", "--out", str(tmp_path), "--set", "keep_per_class=1"]
    assert cli.main([*common, "--values", "0.2", "0.25"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [point["value"] for point in result["points"]] == [None, 0.25, 0.2]
    assert cli.main([*common, "--values", "0.1"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failures"]


def test_a_picture_of_a_single_point_and_of_close_ones(tmp_path: Path):
    point = {"model": "a", "value": None, "miou": 0.5, "gflops": 2.0, "ms_per_image": 3.0}
    many = [{**point, "model": m, "value": t} for m in "abcdefg" for t in (0.8, 0.9, None)]
    for i, points in enumerate(([point], many)):
        draw_curves(points, tmp_path / f"{i}.png", measure="miou", label="mIoU", device="cpu")
        with Image.open(tmp_path / f"{i}.png") as picture:
            assert picture.size == (1536, 672)
