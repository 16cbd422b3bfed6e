"""A kind of model and its task outside of the package: everything takes them, and no other file names them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from outside.tagging import Tagger, TaggerConfig, TagsData
from sievit import cli, load, save
from sievit.bench import HeadsBench, NetworkBench, bench_heads, bench_network
from sievit.config import ConfigError
from sievit.data.truth import Truth
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.engine.train import train
from sievit.models.build import build
from sievit.models.inputs import InputConfig
from sievit.policies import KeepAllConfig, TopNormConfig
from sievit.report.demonstration import demonstrate
from sievit.tasks import task_of
from tiny import image_folder, tiny_vit

SIZES = ((64, 96), (64, 64), (48, 64), (64, 96))
SWEPT = ("--field", "shares", "--values", "0.7", "0.3", "--timed-images", "1")
CONFIG = TaggerConfig(
    vit=tiny_vit(),
    policy=TopNormConfig(first_block=1, shares=(0.5,)),
    input=InputConfig(min_size=None),
    classes=("cat", "dog"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tags")
    image_folder(root / "images", *SIZES)
    (root / "tags.json").write_text(json.dumps({f"{i}.png": CONFIG.classes[i % 2] for i in range(len(SIZES))}))
    return root


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    save(build(CONFIG), folder / "model.safetensors")
    return folder / "model.safetensors"


def run(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert cli.main([str(arg) for arg in (*args, "--device", "cpu")]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_is_trained_and_starts_from_a_checkpoint(folder: Path, checkpoint: Path, tmp_path: Path):
    data = TagsData(train_images=Path("images"), val_images=Path("images"), tags=Path("tags.json"), root=folder)
    settings = TrainConfig(steps=2, batch_size=2, warmup_steps=0, workers=0, init_from=checkpoint)
    figures = train(Recipe(model=CONFIG, data=data, train=settings), out=tmp_path / "run")
    assert 0 <= figures["accuracy"] <= 1 and len(figures["keep"]) == 4
    assert isinstance(load(tmp_path / "run"), Tagger)


def test_commands(folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    truth = ("--images", folder / "images", "--annotations", folder / "tags.json")
    figures = run(capsys, "eval", checkpoint, *truth, "--batch-size", 2)
    assert figures["images"] == 4 and figures["keep"] == [1.0, 0.5, 0.5, 0.5]
    assert run(capsys, "eval", checkpoint, *truth, "--policy", "keep_all")["gflops"] > figures["gflops"]
    assert cli.main(["predict", str(checkpoint), str(folder / "images"), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert len(json.loads((tmp_path / "out/tags.json").read_text())) == len(list((tmp_path / "out").glob("*.png"))) == 4
    costs = run(capsys, "flops", checkpoint, "--images", folder / "images")
    assert costs["size"] == [64, 64] and costs["per_image"]["mean"] == pytest.approx(figures["gflops"], abs=1e-3)
    sweep = run(capsys, "sweep", checkpoint, *truth, *SWEPT, "--out", tmp_path / "sweep")
    assert [point["value"] for point in sweep["points"]] == [None, 0.7, 0.3] and not sweep["failures"]
    tuned = run(capsys, "tune", checkpoint, *truth, "--out", tmp_path / "fast.safetensors", "--repeats", 3)
    assert "accuracy" in tuned["dense"] and isinstance(load(tmp_path / "fast.safetensors"), Tagger)


def test_its_card_and_the_demonstration(folder: Path, tmp_path: Path):
    model = build(CONFIG).eval()
    model.save_pretrained(tmp_path / "hub")
    assert "image-classification" in (tmp_path / "hub/README.md").read_text()
    assert isinstance(Tagger.from_pretrained(tmp_path / "hub"), Tagger)
    data = task_of(CONFIG).open(folder / "images", Truth(annotations=folder / "tags.json"))
    figures = demonstrate(model.with_config(policy=KeepAllConfig()), model, data, tmp_path, title="tags", pictures=1)
    assert figures["images"] == 4 and (tmp_path / "0.png").is_file()
    with pytest.raises(ConfigError, match="give --annotations"):
        task_of(CONFIG).open(folder, Truth())


def test_its_benches(checkpoint: Path):
    common: dict[str, Any] = {"checkpoints": (checkpoint,), "sizes": ((64, 96),), "batches": (1,), "repeats": 2}
    rows = bench_network(NetworkBench(**common))["rows"] + bench_heads(HeadsBench(**common))["rows"]
    assert all(row["gflops"][0] > row["gflops"][1] for row in rows if row["mode"] != "dense")
    assert rows[-1]["parts"]["head"]["dense_ms"] > 0
