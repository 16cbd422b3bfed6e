"""Predicting on a person's own images, and the demonstration."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from sievit import cli
from sievit.config import ConfigError
from sievit.data.scenes import CLASSES, generate
from sievit.heads import ATMConfig, MaskRCNNConfig
from sievit.heads.config import BoxConfig, MaskConfig, RPNConfig
from sievit.models.build import build, read, save
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import DToPConfig, KeepAllConfig, PolicyConfig, SViTConfig
from sievit.report import demonstration
from sievit.vit import ViTConfig


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sparse model with random weights that finds a few boxes in anything."""
    torch.manual_seed(0)
    config = DetectorConfig(
        vit=ViTConfig(grid=(4, 4), embed_dim=24, depth=4, num_heads=2),
        neck=PyramidConfig(out_channels=16),
        policy=SViTConfig(first_block=1),
        head=MaskRCNNConfig(
            num_classes=2,
            fpn_channels=16,
            rpn=RPNConfig(pre_nms_test=20, post_nms_test=10),
            box=BoxConfig(fc=32, min_score=0.0, max_detections=5),
            mask=MaskConfig(convs=(16,), deconv=16),
        ),
        input=InputConfig(min_size=64, max_size=128),
        classes=("disc", "box"),
        category_ids=(3, 7),
    )
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save(build(config), path)
    return path


def tiny_segmenter(policy: PolicyConfig) -> SegmenterConfig:
    return SegmenterConfig(
        vit=ViTConfig(grid=(4, 4), patch_size=8, embed_dim=24, depth=4, num_heads=2),
        policy=policy,
        head=ATMConfig(channels=8, num_heads=2),
        out_indices=(1, 2, 3),
        input=InputConfig(min_size=64, max_size=128, size_divisor=8),
        classes=("ground", *CLASSES),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of three kinds; two of them differ only in their ending."""
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "a.png")
    Image.fromarray(noise).save(images / "a.jpg")
    Image.fromarray(noise[:50, :40, 0]).save(images / "b.png")
    return images


def test_predict_writes_results_that_pycocotools_loads(checkpoint: Path, folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert cli.main(["predict", str(checkpoint), str(folder), "--out", str(out), "--score-threshold", "0.1"]) == 0
    truth = COCO(out / "images.json")
    loaded = truth.loadRes(str(out / "results.json"))
    assert [truth.imgs[i]["file_name"] for i in (1, 2, 3)] == ["a.jpg", "a.png", "b.png"]
    entries = json.loads((out / "results.json").read_text())
    assert {entry["category_id"] for entry in entries} <= {3, 7}
    for annotation in loaded.loadAnns(loaded.getAnnIds(imgIds=[3])):
        assert loaded.annToMask(annotation).shape == (50, 40)
        x, y, width, height = annotation["bbox"]
        assert 0 <= x <= x + width <= 40.01
        assert 0 <= y <= y + height <= 50.01
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {"a.jpg.png", "a.png.png", "b.png"}
    for name in pictures:
        with Image.open(out / name) as picture:
            assert picture.width > 1000


def test_predict_does_the_rest_when_an_image_is_broken(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = (folder / "b.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    assert cli.main(["predict", str(checkpoint), str(folder), "--out", str(out)]) == 1
    written = capsys.readouterr().err
    assert "a.png" in written
    assert "1 of 3 images" in written
    listed = json.loads((out / "images.json").read_text())["images"]
    assert [(image["id"], image["file_name"]) for image in listed] == [(1, "a.jpg"), (3, "b.png")]


def test_predict_takes_one_image_and_another_policy(checkpoint: Path, folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    args = ["predict", str(checkpoint), str(folder / "b.png"), "--out", str(out), "--policy", "keep_all"]
    assert cli.main(args) == 0
    assert {path.name for path in out.iterdir()} == {"b.png", "images.json", "results.json"}


def test_predict_uses_the_ids_of_a_coco_file(checkpoint: Path, folder: Path, tmp_path: Path):
    names = {"a.jpg": 42, "a.png": 7, "b.png": 9, "elsewhere.png": 1}
    listing = {"images": [{"id": i, "file_name": name} for name, i in names.items()]}
    (tmp_path / "ids.json").write_text(json.dumps(listing))
    out = tmp_path / "out"
    args = ["predict", str(checkpoint), str(folder), "--out", str(out), "--ids", str(tmp_path / "ids.json")]
    assert cli.main(args) == 0
    assert {entry["image_id"] for entry in json.loads((out / "results.json").read_text())} <= {42, 7, 9}


@pytest.mark.parametrize("name", ["nothing", "b.txt"])
def test_predict_leaves_nothing_behind_when_no_image_is_there(checkpoint: Path, tmp_path: Path, name: str):
    (tmp_path / "b.txt").write_text("no image")
    out = tmp_path / "out"
    assert cli.main(["predict", str(checkpoint), str(tmp_path / name), "--out", str(out)]) != 0
    assert not (out / "results.json").exists()


def test_unknown_device_and_policy(checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    start = ["predict", str(checkpoint), str(folder), "--out", str(folder / "out")]
    assert cli.main([*start, "--policy", "keep_al"]) == 2
    assert "did you mean 'keep_all'?" in capsys.readouterr().err
    assert cli.main([*start, "--device", "cuba"]) == 2
    assert "cuba" in capsys.readouterr().err


def test_demo_ends_with_one_json_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Where the data set is not there, on the examples of the repository."""
    monkeypatch.setenv("SIEVIT_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("SIEVIT_DATA", str(tmp_path / "gone"))
    (tmp_path / "models").mkdir()
    config, _ = read(checkpoint)
    assert isinstance(config, DetectorConfig)
    one = replace(config, head=replace(config.head, num_classes=1), classes=("nucleus",), category_ids=(1,))
    for name in ("vit", "svit"):
        save(build(one), tmp_path / "models" / f"nuclei_{name}.safetensors")
    for name, policy in (("segvit", KeepAllConfig()), ("segvit_dtop", DToPConfig(thresholds=(0.2,)))):
        torch.manual_seed(0)
        save(build(tiny_segmenter(policy)), tmp_path / "models" / f"nuclei_{name}.safetensors")
    out = tmp_path / "out"
    args = ["demo", "--out", str(out), "--num-images", "3", "--pictures", "1"]
    assert cli.main(args) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for task, accuracy in (("detection", {"box_ap", "mask_ap"}), ("segmentation", {"miou"})):
        part = figures[task]
        for model in ("dense", "sparse"):
            assert part[model].keys() >= {*accuracy, "gflops", "ms_per_image"}
            assert len(part[model]["keep"]) == 4 and part[model]["keep"][0] == 1
        assert part["speedup"] > 0 and part["images"] == 3
        assert len(list((out / task).glob("*.png"))) == 1
    left = figures["segmentation"]["sparse"]["left_at"]
    assert len(left) == 3 and 0 < left[0] < 1


def test_demo_takes_the_data_set_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIEVIT_DATA", str(tmp_path))
    assert demonstration._nuclei(None) == demonstration.REPOSITORY / "examples/nuclei"
    (tmp_path / "nuclei").mkdir()
    assert demonstration._nuclei(None) == demonstration._nuclei(tmp_path) == tmp_path / "nuclei"
    with pytest.raises(ConfigError, match=r"gone/nuclei: no such folder; give --data-root"):
        demonstration._nuclei(tmp_path / "gone")


def test_demo_without_models_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("SIEVIT_MODELS", str(tmp_path))
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--num-images", "1"]) == 2
    assert "nuclei_vit: no such file or folder" in capsys.readouterr().err


def test_eval_ends_with_every_figure(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generate(tmp_path / "scenes", num_images=2, size=(64, 64), seed=1)
    content = json.loads((tmp_path / "scenes" / "annotations.json").read_text())
    ids = {1: 3, 2: 7}
    content["categories"] = [{"id": new, "name": str(new)} for new in ids.values()]
    content["annotations"] = [
        {**a, "category_id": ids[a["category_id"]]} for a in content["annotations"] if a["category_id"] in ids
    ]
    (tmp_path / "two.json").write_text(json.dumps(content))
    args = ["eval", str(checkpoint), "--images", str(tmp_path / "scenes" / "images"), "--annotations"]
    assert cli.main([*args, str(tmp_path / "two.json"), "--policy", "keep_all"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = ("", "50", "75", "_small", "_medium", "_large")
    assert figures.keys() >= {f"{kind}_ap{size}" for kind in ("box", "mask") for size in sizes}
    assert figures.keys() >= {"keep", "tokens", "gflops", "gflops_std", "ms_per_image", "images", "device"}
    assert figures["policy"] == "keep_all"
    assert figures["keep"] == [1.0] * 4
    assert cli.main([*args, str(tmp_path / "scenes" / "annotations.json")]) == 2
    assert "category ids" in capsys.readouterr().err


def test_budget_is_the_point_of_a_model_for_a_range_of_them(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config, tensors = read(checkpoint)
    policy = SViTConfig(first_block=1, budgets=(0.5, 1.5))
    config, path = replace(config, policy=policy), tmp_path / "range.safetensors"
    model = build(config)
    model.load_state_dict(model.state_dict() | tensors)
    save(model, path)
    args = ["predict", str(path), str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main([*args, "--set", "budget=0.5"]) == 0
    for file, more, message in (
        (checkpoint, ["--set", "budget=0.5"], "needs gates that were trained for a range of budgets"),
        (path, ["--policy", "random", "--set", "budget=0.5"], "the policy 'random' has no field 'budget'"),
        (path, ["--set", "budget=3"], "not in the range of budgets"),
    ):
        args[1] = str(file)
        assert cli.main([*args, *more]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
