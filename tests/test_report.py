"""Predicting on a person's own images, the demonstration, and sweeps, which keep what is finished."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from sievit.config import ConfigError
from sievit.data.labels import LabelDataset
from sievit.data.scenes import generate
from sievit.data.truth import Truth
from sievit.engine.evaluate import evaluate
from sievit.models.build import build, load, read, save
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter
from sievit.policies import DToPConfig, KeepAllConfig, PolicyOptions, SViTConfig
from sievit.report import demonstration
from sievit.report import sweep as module
from sievit.report.plot import draw_curves
from sievit.report.sweep import sweep
from tiny import random_pixels, refused, saved, tiny_detector, tiny_head, tiny_segmenter, tiny_vit, write_image

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sparse model with random weights that finds a few boxes in anything."""
    config = tiny_detector(policy=SViTConfig(first_block=1), classes=("disc", "box"), category_ids=(3, 7))
    return saved(config, tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of three kinds; two of them differ only in their ending."""
    noise = random_pixels(0, 60, 80, 3)
    for name, pixels in (("a.png", noise), ("a.jpg", noise), ("b.png", noise[:50, :40, 0])):
        write_image(tmp_path / "images" / name, pixels)
    return tmp_path / "images"


def test_predict_writes_results_that_pycocotools_loads(
    checkpoint: Path, folder: Path, tmp_path: Path, command: Command
):
    out = tmp_path / "out"
    command("predict", checkpoint, folder, "--out", out, "--score-threshold", 0.1)
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
    pictures = sorted((out / "pictures").iterdir())
    assert [path.name for path in pictures] == ["a.jpg.png", "a.png.png", "b.png.png"]
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 1000


def test_predict_does_the_rest_when_an_image_is_broken(
    checkpoint: Path, folder: Path, tmp_path: Path, command: Command
):
    whole = (folder / "b.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    written = command("predict", checkpoint, folder, "--out", out, status=1).err
    assert "a.png" in written
    assert "1 of 3 images" in written
    listed = json.loads((out / "images.json").read_text())["images"]
    assert [(image["id"], image["file_name"]) for image in listed] == [(1, "a.jpg"), (3, "b.png")]


def test_predict_uses_given_ids_and_another_policy(checkpoint: Path, folder: Path, tmp_path: Path, command: Command):
    names = {"a.jpg": 42, "a.png": 7, "b.png": 9, "elsewhere.png": 1}
    listing = {"images": [{"id": i, "file_name": name} for name, i in names.items()]}
    (tmp_path / "ids.json").write_text(json.dumps(listing))
    out = tmp_path / "out"
    command("predict", checkpoint, folder, "--out", out, "--ids", tmp_path / "ids.json")
    assert {entry["image_id"] for entry in json.loads((out / "results.json").read_text())} <= {42, 7, 9}

    out = tmp_path / "one"
    command("predict", checkpoint, folder / "b.png", "--out", out, "--policy", "keep_all")
    assert {path.name for path in out.iterdir()} == {"pictures", "images.json", "results.json", "results.jsonl"}


def test_predict_leaves_nothing_but_the_reason_when_no_image_is_there(checkpoint, tmp_path: Path, command: Command):
    (tmp_path / "b.doc").write_text("no image")
    out = tmp_path / "out"
    command("predict", checkpoint, tmp_path / "nothing", "--out", out, status=2)
    assert not out.exists()
    command("predict", checkpoint, tmp_path / "b.doc", "--out", out, status=1)
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "failures.jsonl"}


def test_unknown_device_and_policy(checkpoint: Path, folder: Path, command: Command):
    start = ["predict", checkpoint, folder, "--out", folder / "out"]
    assert "did you mean 'keep_all'?" in command(*start, "--policy", "keep_al", status=2).err
    assert "cuba" in command(*start, "--device", "cuba", status=2).err


def test_demo_ends_with_one_json_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
):
    """Where the data set is not there, on the examples of the repository."""
    monkeypatch.setenv("SIEVIT_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("SIEVIT_DATA", str(tmp_path / "gone"))
    (tmp_path / "models").mkdir()
    config, _ = read(checkpoint)
    assert isinstance(config, DetectorConfig)
    for shown in demonstration.SETS.values():
        content = json.loads((demonstration.REPOSITORY / "examples" / shown.folder / shown.annotations).read_text())
        classes = tuple(category["name"] for category in content["categories"])
        ids = tuple(category["id"] for category in content["categories"])
        head = replace(config.head, num_classes=len(ids))
        one = replace(config, head=head, classes=classes, category_ids=ids)
        saved(one, tmp_path / "models" / f"{shown.models['detection']}.safetensors")
        if "segmentation" in shown.models:
            policy = DToPConfig(thresholds=(0.2,))
            model = tiny_segmenter(policy=policy, classes=("other", *classes), input=InputConfig(min_size=64))
            saved(model, tmp_path / "models" / f"{shown.models['segmentation']}.safetensors")
    out = tmp_path / "out"
    figures = command("demo", "--out", out, "--num-images", 3, "--pictures", 1).figures
    assert list(figures) == ["photographs", "nuclei", "device"]
    for name, shown in demonstration.SETS.items():
        assert figures[name].keys() == shown.models.keys()
        for task, part in figures[name].items():
            for model in ("dense", "sparse"):
                accuracies = {"box_ap", "mask_ap"} if task == "detection" else {"miou"}
                assert part[model].keys() >= {*accuracies, "gflops", "ms_per_image"}
                assert len(part[model]["keep"]) == 4 and part[model]["keep"][0] == 1
            assert part["dense"]["keep"] == [1.0] * 4 and part["speedup"] > 0 and part["images"] == 3
            assert len(list((out / name / task).glob("*.png"))) == 1
    left = figures["photographs"]["segmentation"]["sparse"]["left_at"]
    assert len(left) == 3 and 0 < left[0] < 1


def test_demo_finds_data_and_needs_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command):
    monkeypatch.setenv("SIEVIT_DATA", str(tmp_path))
    assert demonstration._folder("nuclei", None) == demonstration.REPOSITORY / "examples/nuclei"
    (tmp_path / "nuclei").mkdir()
    assert demonstration._folder("nuclei", None) == demonstration._folder("nuclei", tmp_path) == tmp_path / "nuclei"
    refused(r"gone/nuclei: no such folder; give --data-root", demonstration._folder, "nuclei", tmp_path / "gone")

    monkeypatch.setenv("SIEVIT_DATA", str(tmp_path / "gone"))
    monkeypatch.setenv("SIEVIT_MODELS", str(tmp_path))
    printed = command("demo", "--out", tmp_path / "out", "--num-images", 1, status=2)
    assert "facade_svit: no such file or folder" in printed.err


def test_eval_ends_with_every_figure(checkpoint: Path, tmp_path: Path, command: Command):
    generate(tmp_path / "scenes", num_images=2, size=(64, 64), seed=1)
    content = json.loads((tmp_path / "scenes" / "annotations.json").read_text())
    ids = {1: 3, 2: 7}
    content["categories"] = [{"id": new, "name": str(new)} for new in ids.values()]
    content["annotations"] = [
        {**a, "category_id": ids[a["category_id"]]} for a in content["annotations"] if a["category_id"] in ids
    ]
    (tmp_path / "two.json").write_text(json.dumps(content))
    args = ["eval", checkpoint, "--images", tmp_path / "scenes" / "images", "--annotations"]
    figures = command(*args, tmp_path / "two.json", "--policy", "keep_all").figures
    sizes = ("", "50", "75", "_small", "_medium", "_large")
    assert figures.keys() >= {f"{kind}_ap{size}" for kind in ("box", "mask") for size in sizes}
    assert figures.keys() >= {"keep", "tokens", "gflops", "gflops_std", "ms_per_image", "images", "device"}
    assert figures["policy"] == "keep_all"
    assert figures["keep"] == [1.0] * 4
    assert "category ids" in command(*args, tmp_path / "scenes" / "annotations.json", status=2).err


def test_budget_is_the_point_of_a_model_for_a_range_of_them(
    checkpoint: Path, folder: Path, tmp_path: Path, command: Command
):
    config, tensors = read(checkpoint)
    policy = SViTConfig(first_block=1, budgets=(0.5, 1.5))
    config, path = replace(config, policy=policy), tmp_path / "range.safetensors"
    model = build(config)
    model.load_state_dict(model.state_dict() | tensors)
    save(model, path)
    args = ["predict", path, folder, "--out", tmp_path / "out", "--device", "cpu"]
    command(*args, "--set", "budget=0.5")
    for file, more, message in (
        (checkpoint, ["--set", "budget=0.5"], "needs gates that were trained for a range of budgets"),
        (path, ["--policy", "random", "--set", "budget=0.5"], "the policy 'random' has no field 'budget'"),
        (path, ["--set", "budget=3"], "not in the range of budgets"),
    ):
        args[1] = file
        assert message in command(*args, *more, status=2).err.replace("\n", " ")


# Sweeps.


CONFIG = tiny_segmenter(
    vit=tiny_vit(grid=(6, 6), patch_size=8, embed_dim=32),
    policy=DToPConfig(thresholds=(0.9,), keep_per_class=0),
    input=InputConfig(min_size=96, max_size=128, size_divisor=8),
)


@pytest.fixture(scope="module")
def data(scenes_of: Callable[..., Path]) -> Path:
    return scenes_of(3, (48, 64))


def swept(exits: Path, data: Path, values: tuple[float, ...], out: Path, **options: Any) -> dict[str, Any]:
    truth = options.pop("truth", Truth(labels=data / "labels"))
    return sweep(exits, data / "images", truth=truth, values=tuple(map(str, values)), out=out, **options)


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; about a quarter of the tokens is graded above 0.9, three quarters above 0.7."""
    path = saved(CONFIG, tmp_path_factory.mktemp("model") / "model.safetensors")
    model = load(path)
    assert isinstance(model, Segmenter)
    with torch.no_grad():
        for head in model.net.heads:
            for name in ("layers.1.cross_attn.q.weight", "layers.1.cross_attn.k.weight", "class_embed.weight"):
                head.get_parameter(name).mul_(40)
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


def test_points_are_those_of_evaluate(data: Path, exits: Path, tmp_path: Path):
    result = swept(exits, data, (0.7, 0.9), tmp_path, timed_images=2)
    points = result["points"]
    assert [point["value"] for point in points] == [None, 0.9, 0.7]
    dataset = LabelDataset(data / "images", data / "labels", classes=CONFIG.classes)
    for point, policy in zip(
        points,
        (KeepAllConfig(), *(DToPConfig(thresholds=(t,), keep_per_class=0) for t in (0.9, 0.7))),
        strict=True,
    ):
        alone = evaluate(load(exits, policy=policy), dataset)
        for name in ("miou", "gflops", "gflops_std", "gflops_min", "gflops_max", "keep", "images"):
            assert point[name] == alone[name], (point["value"], name)
        assert point.get("left_at") == alone.get("left_at")
        assert point["ms_per_image"] > 0
    assert 0.1 < points[1]["left_at"][0] < points[2]["left_at"][0] < 0.9
    assert points[2]["gflops"] < points[1]["gflops"]


def test_files_say_the_same(data: Path, exits: Path, tmp_path: Path):
    result = swept(exits, data, (0.2,), tmp_path, limit=2, timed_images=1)
    assert json.loads((tmp_path / "sweep.json").read_text()) == result
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows] == ["dense", "0.2"]
    assert [float(row["miou"]) for row in rows] == [point["miou"] for point in result["points"]]
    assert float(rows[1]["left_at_0"]) == result["points"][1]["left_at"][0] > 0
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(2**24) or ()) > 20


def test_what_is_finished_is_not_computed_again(
    data: Path, exits: Path, tmp_path: Path, evaluated: list[str], capsys: pytest.CaptureFixture[str]
):
    first = swept(exits, data, (0.2,), tmp_path, limit=2, timed_images=1)
    assert evaluated == ["dtop dense", "dtop 0.2"]
    again = swept(exits, data, (0.2,), tmp_path, limit=2, timed_images=1)
    assert evaluated == ["dtop dense", "dtop 0.2"]
    assert again == first, "times included"
    assert "2 of 2 points are in" in capsys.readouterr().err
    more = swept(exits, data, (0.2, 0.3), tmp_path, limit=2, timed_images=1)
    assert evaluated == ["dtop dense", "dtop 0.2", "dtop 0.3"]
    assert [point["value"] for point in more["points"]] == [None, 0.3, 0.2]
    assert len({point["timing"] for point in more["points"]}) == 1, "all are timed together"


def test_a_failure_leaves_the_others(data: Path, exits: Path, tmp_path: Path, evaluated: list[str]):
    result = swept(exits, data, (0.2, 0.1, 0.3), tmp_path, limit=1, timed_images=1)
    assert [point["value"] for point in result["points"]] == [None, 0.3, 0.2]
    assert result["failures"] == [{"model": "dtop", "value": 0.1, "error": "out of memory"}]
    swept(exits, data, (0.1,), tmp_path, limit=1, timed_images=1)
    assert evaluated[-1] == "dtop 0.1", "it is tried again"
    assert len(evaluated) == 5


def test_an_image_that_cannot_be_used_does_not_end_it(
    data: Path, exits: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    labels = tmp_path_factory.mktemp("labels")
    for i, path in enumerate(sorted((data / "labels").iterdir())):
        with Image.open(path) as image:
            (image.resize((8, 8)) if i == 0 else image).save(labels / path.name)
    result = swept(exits, data, (0.2,), tmp_path, timed_images=1, truth=Truth(labels=labels))
    assert [point["images"] for point in result["points"]] == [2, 2]
    assert all("8x8" in point["failures"][0] for point in result["points"])


def test_other_settings_and_checkpoints_do_not_mix(data: Path, exits: Path, tmp_path: Path):
    out = tmp_path / "out"
    swept(exits, data, (0.2,), out, limit=1, timed_images=1)
    before = (out / "sweep.json").read_bytes()
    refused("made with limit 1, now it is 2; give another --out", swept, exits, data, (0.2,), out, limit=2)
    with pytest.raises(ConfigError, match="made with set"):
        swept(exits, data, (0.2,), out, limit=1, policy=PolicyOptions(set=("keep_per_class=3",)))
    other = saved(CONFIG, tmp_path / "other.safetensors", seed=5)
    refused("another checkpoint", swept, other, data, (0.2,), out, limit=1)
    refused("points of 'dtop' too", swept, other, data, (0.2,), out, limit=1, name="other")
    assert (out / "sweep.json").read_bytes() == before
    (out / "sweep.json").write_text("[]")
    refused("no sweep", swept, exits, data, (0.2,), out, limit=1)


def test_further_checkpoints_are_curves(data: Path, exits: Path, tmp_path: Path):
    other = saved(CONFIG, tmp_path / "other.safetensors", seed=5)
    also = (f"again={other}", f"own={other}@0.3")
    result = swept(exits, data, (0.2,), tmp_path / "out", also=also, limit=1, timed_images=1)
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
        ({"values": (0.2, -1.0)}, r"thresholds is -1\.0"),
        ({"policy": PolicyOptions(set=("keep_per_class=-1",))}, "keep_per_class"),
        ({"policy": PolicyOptions(policy="keep_all")}, "which values of its policy 'keep_all'"),
        ({"field": "grade", "values": ()}, "Give --field and --values"),
        ({"field": "grades"}, "no field 'grades'; did you mean 'grade'"),
    ],
)
def test_wrong_options_are_named(data: Path, exits: Path, tmp_path: Path, options: dict, message: str):
    options["also"] = tuple(text.replace("CHECKPOINT", str(exits)) for text in options.get("also", ()))
    refused(message, swept, exits, data, options.pop("values", (0.2,)), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists(), "nothing is begun"


def test_a_detector_at_fixed_shares(data: Path, tmp_path: Path):
    """Of another policy, by name."""
    config = tiny_detector(
        vit=tiny_vit(grid=(6, 6), embed_dim=32), head=tiny_head(with_masks=False), input=CONFIG.input
    )
    detector = saved(config, tmp_path / "detector.safetensors")
    options = PolicyOptions(policy="random", set=("first_block=1", "shares=0.5"))
    refused(
        "is judged by --annotations", swept, detector, data, (0.2,), tmp_path / "out", policy=options, field="shares"
    )
    truth = Truth(annotations=data / "annotations.json")
    result = swept(detector, data, (0.9, 0.5), tmp_path, truth=truth, policy=options, field="shares", timed_images=1)
    points = result["points"]
    assert [point["value"] for point in points] == [None, 0.9, 0.5]
    assert all("box_ap" in point for point in points)
    assert [point["keep"][1] for point in points] == pytest.approx([1.0, 0.9, 0.5], abs=0.05)


def test_dense_models_on_smaller_images_are_curves(data: Path, tmp_path: Path):
    config = tiny_detector(head=tiny_head(with_masks=False))
    detector = saved(config, tmp_path / "detector.safetensors")
    shared: dict[str, Any] = {"truth": Truth(annotations=data / "annotations.json"), "timed_images": 1}
    shared["policy"] = PolicyOptions(policy="random", set=("first_block=1", "shares=0.5"))
    curve = (f"small={detector}@32,64",)
    result = swept(detector, data, (0.5,), tmp_path / "two", field="shares", smaller=curve, **shared)
    points = [point for point in result["points"] if point["model"] == "small"]
    assert [point["value"] for point in points] == [64.0, 32.0]
    assert points[0]["gflops"] > points[1]["gflops"] and all(point["keep"] == [1.0] * 4 for point in points)
    for wrong in ("small", f"small={detector}", f"small={detector}@big"):
        refused("--also|--smaller", swept, detector, data, (0.5,), tmp_path, field="shares", smaller=(wrong,), **shared)


@pytest.mark.usefixtures("evaluated")
def test_the_command_ends_with_json(data: Path, exits: Path, tmp_path: Path, command: Callable[..., Any]):
    common = ["sweep", exits, "--images", data / "images", "--labels", data / "labels", "--limit", 1]
    common += ["--timed-images", 1, "--out", tmp_path, "--set", "keep_per_class=1"]
    points = command(*common, "--values", 0.2, 0.25).figures["points"]
    assert [point["value"] for point in points] == [None, 0.25, 0.2]
    assert command(*common, "--values", 0.1, status=1).figures["failures"]


def test_a_picture_of_a_single_point_and_of_close_ones(tmp_path: Path):
    point = {"model": "a", "value": None, "miou": 0.5, "gflops": 2.0, "ms_per_image": 3.0}
    many = [{**point, "model": m, "value": t} for m in "abcdefg" for t in (0.8, 0.9, None)]
    for i, points in enumerate(([point], many)):
        draw_curves(points, tmp_path / f"{i}.png", measure="miou", label="mIoU", device="cpu")
        with Image.open(tmp_path / f"{i}.png") as picture:
            assert picture.size == (1536, 672)
