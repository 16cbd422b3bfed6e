"""`sievit flops`: on paper for recipes and checkpoints, and image by image."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sievit import cli
from sievit.heads import ATMConfig
from sievit.measure.costs import costs, per_image
from sievit.models.build import build, load, save
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter, SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig, PolicyConfig
from sievit.recipes import recipe
from sievit.vit import ViTConfig


def small(policy: PolicyConfig, **changes: Any) -> SegmenterConfig:
    return SegmenterConfig(
        vit=ViTConfig(grid=(4, 4), embed_dim=32, depth=3, num_heads=2),
        policy=policy,
        input=InputConfig(min_size=None),
        classes=("a", "b", "c"),
        head=ATMConfig(channels=16, num_heads=2, num_layers=1),
        out_indices=(0, 1, 2),
        **changes,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for i, size in enumerate([(64, 64), (48, 64), (64, 96)]):
        Image.new("RGB", (size[1], size[0]), (80 * i, 10, 200)).save(images / f"{i}.png")
    return images


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(build(small(DToPConfig(thresholds=(0.0,), keep_per_class=2))), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert cli.main(["flops", *args]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(("name", "published"), [("ade20k_segvit_b", 109.860705), ("ade20k_segvit_l_dtop", 616.977024)])
def test_a_recipe_on_the_command_line(name: str, published: float, capsys: pytest.CaptureFixture[str]):
    figures = run(capsys, name)
    assert figures["gflops"] == published
    assert figures["gflops_full"] == pytest.approx(sum(figures["by_module"].values()))
    assert (figures["by_module"]["heads.0"] > 0) == name.endswith("_dtop"), (
        "DToP asks them whether anyone leaves or not"
    )
    assert figures["size"] == ([512, 512] if name.endswith("b") else [640, 640])
    assert run(capsys, name, "--size", "256", "384")["size"] == [256, 384]


@pytest.mark.parametrize("name", ["nuclei_svit", "nuclei_vit"])
def test_a_detectors_recipe(name: str, capsys: pytest.CaptureFixture[str]):
    figures = run(capsys, name, "--size", "64", "96")
    assert figures["gflops"] == figures["gflops_full"] == pytest.approx(sum(figures["by_module"].values()))
    assert list(figures["by_module"]) == ["patch_embed", "blocks", "policy", "neck", "fpn", "rpn", "box", "mask"]
    assert (figures["by_module"]["policy"] > 0) == name.endswith("svit")


def test_paper_and_pass_agree_where_nobody_leaves():
    image = torch.rand(3, 64, 96)
    for policy in (KeepAllConfig(), DToPConfig(thresholds=(0.5,), keep_per_class=24), DToPConfig(thresholds=(1.0,))):
        model = build(small(policy)).eval()
        with torch.no_grad():
            spent = model.gflops(model([image])).item()
        assert costs(model.config, size=(64, 96))["gflops_full"] == pytest.approx(spent, abs=1e-5)
    detector = build(recipe("nuclei_svit").model)
    trace = detector.dense_answer((70, 100)).trace
    assert trace.grid == (6, 8), "padded as the network pads"
    assert sum("logits" in aux for aux in trace.aux) == 9


def test_sizes_that_nobody_names():
    assert small(KeepAllConfig()).default_size == (64, 64)
    assert small(KeepAllConfig(), crop=(48, 80), stride=(48, 80)).default_size == (48, 80)
    assert recipe("coco_vit_adapter_t").model.default_size == (800, 1333)


def test_images_of_a_checkpoint(checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    figures = run(capsys, str(checkpoint), "--images", str(folder), "--batch-size", "2", "--device", "cpu")
    said = figures["per_image"]
    rows = said["images"]
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png"]
    values = [row["gflops"] for row in rows]
    assert said["min"] == min(values) and said["max"] == max(values)
    assert said["mean"] == pytest.approx(sum(values) / 3, abs=2e-6)
    assert said["quantiles"]["50"] == pytest.approx(sorted(values)[1], abs=2e-6)
    assert len(said["left_at"]) == 3 and len(said["keep"]) == 3
    assert said["left_at"][0] > 0.3, "of 12 to 24 tokens at most six stay"
    for row in rows:
        assert row["keep"][1] == pytest.approx(1 - row["left_at"][0], abs=2e-4)
        assert row["keep"][2] == pytest.approx(1 - sum(row["left_at"][:2]), abs=2e-4)
    alone = per_image(build_like(checkpoint), folder, limit=1)["images"][0]
    assert alone == rows[0], "whatever it shares a batch with"


def build_like(path: Path) -> Segmenter:
    model = load(path)
    assert isinstance(model, Segmenter)
    return model


def test_the_table_has_a_histogram(checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["flops", str(checkpoint), "--images", str(folder), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "█" in printed and "left at stage 0" in printed and "by the published rule" in printed


def test_thresholds_take_the_place_of_the_models_own(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    options = ("--images", str(folder), "--device", "cpu", "--set", "thresholds=1.0")
    said = run(capsys, str(checkpoint), *options)["per_image"]
    assert said["left_at"] == [0.0, 0.0, 0.0]
    model = build_like(checkpoint)
    dense = [costs(model.config, size=size)["gflops"] for size in ((64, 64), (48, 64), (64, 96))]
    assert [row["published"] for row in said["images"]] == pytest.approx(dense, abs=2e-6)


def test_windows_count_as_one_image(folder: Path):
    model = build(small(KeepAllConfig(), crop=(32, 32), stride=(32, 32)))
    window = costs(model.config)["gflops_full"]
    assert [row["gflops"] for row in per_image(model, folder)["images"]] == pytest.approx(
        [4 * window, 4 * window, 6 * window], abs=2e-6
    )


def test_what_cannot_be_read_is_named_and_the_rest_is_counted(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "broken.jpg").write_bytes(b"no image")
    assert cli.main(["flops", str(checkpoint), "--images", str(folder), "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    figures = json.loads(out.splitlines()[-1])
    assert len(figures["per_image"]["images"]) == 3 and "broken.jpg" in figures["failures"][0] and "broken.jpg" in err
    for path in folder.glob("*.png"):
        path.unlink()
    assert cli.main(["flops", str(checkpoint), "--images", str(folder), "--device", "cpu"]) == 2
    assert "none of its 1 images can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ade20k_segvit"], "'ade20k_segvit' is neither a recipe nor a model; did you mean 'ade20k_segvit_"),
        (["ade20k_segvit_b", "--images", "."], "is a recipe, its weights are random; --images needs a trained model"),
        (["ade20k_segvit_b", "--size", "0", "5"], "--size is 0; it has to be at least 1"),
        (["ade20k_segvit_b", "--policy", "dtop"], "give --images"),
        (["CHECKPOINT", "--images", "EMPTY"], "holds no images"),
        (["CHECKPOINT", "--images", "gone"], "no such folder"),
        (["CHECKPOINT", "--images", "IMAGES", "--batch-size", "0"], "at least 1"),
        (["EMPTY"], "has neither model.safetensors"),
    ],
)
def test_what_cannot_be_done(
    args: list[str],
    message: str,
    checkpoint: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "empty").mkdir()
    places = {"CHECKPOINT": checkpoint, "EMPTY": tmp_path / "empty", "IMAGES": folder}
    assert cli.main(["flops", *(str(places.get(arg, arg)) for arg in args)]) == 2
    error = capsys.readouterr().err
    assert message in error
