"""A run goes on as it was started, alone in its folder, with its data; or says what is in the way."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from hostile.fuzz import mutate_bytes
from sievit import cli
from sievit.config import ConfigError, to_json
from sievit.engine.checkpoint import RunFolder
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.engine.train import train
from tiny import coco_data, killed_at, random_pixels, refused, tiny_detector, write_image


@pytest.fixture(scope="module")
def recipe(scenes_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = tmp_path_factory.mktemp("data") / "scenes"
    shutil.copytree(scenes_of(4, (64, 64), val=1), root)
    settings = TrainConfig(steps=4, batch_size=1, workers=0, warmup_steps=0, save_every=0.0)
    return Recipe(model=tiny_detector(), data=replace(coco_data(root), root=root), train=settings)


@pytest.fixture
def stopped(recipe: Recipe, tmp_path: Path) -> Path:
    """The folder of a run that was killed in the middle."""
    killed_at(2, recipe, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "args",
    [
        ["RECIPE", "--resume", "RUN", "--train.epochs", "99"],
        ["RECIPE", "--resume=RUN", "--train.epochs=99"],
        ["--resume", "RUN", "--out", "elsewhere"],
        ["--resume=RUN", "RECIPE"],
        ["RECIPE", "--resume"],
        ["RECIPE", "--resume="],
    ],
    ids=" ".join,
)
def test_a_resumed_run_takes_no_other_option(args: list[str], stopped: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(stopped)
    assert cli.main(["train", *(a.replace("RUN", str(stopped)).replace("RECIPE", "nuclei_svit") for a in args)]) == 2
    assert "sievit train --resume RUN" in capsys.readouterr().err
    assert contents(stopped) == before


def test_a_run_is_not_resumed_as_another_recipe(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "mine.json").write_text(json.dumps(to_json(recipe)))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "mine.json", "--out", "run"]) == 0
    assert cli.main(["train", "nuclei_svit", "--resume", "run"]) == 2
    assert "is a run of the recipe mine.json, not nuclei_svit" in capsys.readouterr().err
    assert cli.main(["train", "mine.json", "--resume", "run"]) == 0
    assert cli.main(["train", "--resume=run"]) == 0


def test_a_run_whose_data_was_changed_says_what_changed(recipe: Recipe, stopped: Path):
    root = recipe.data.root
    assert root is not None
    image = next((root / "train/images").iterdir())
    annotations, before = root / "train/annotations.json", image.read_bytes()
    content = json.loads(annotations.read_text())
    write_image(image, random_pixels(3, 64, 64, 3))
    refused(r"training files .*restore the data, or start another run", train, None, out=stopped, resume=True)
    image.write_bytes(before)
    fewer = {**content, "annotations": content["annotations"][1:]}
    annotations.write_text(json.dumps(fewer))
    refused("training annotations", train, None, out=stopped, resume=True)
    annotations.write_text(json.dumps(content))
    train(None, out=stopped, resume=True)


def test_a_second_process_in_the_folder_of_a_run_is_refused(recipe: Recipe, stopped: Path):
    script = (
        "import sys\nfrom sievit.files import held\nfrom pathlib import Path\nwith held(Path(sys.argv[1])): input()"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(stopped)], stdin=subprocess.PIPE)
    while not (stopped / ".lock").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    refused("another process writes there", train, None, out=stopped, resume=True)
    other.kill()
    other.communicate()
    assert (stopped / ".lock").exists(), "a killed process leaves the file and no lock"
    train(None, out=stopped, resume=True)


@pytest.mark.parametrize("name", ["state.pt", "run.json", "recipe.json", "log.csv", "val.csv", "metrics.json"])
def test_a_damaged_file_of_a_run_is_named(name: str, recipe: Recipe, tmp_path: Path):
    out, rng = tmp_path / "run", Random(name)
    train(recipe, out=out)
    whole = (out / name).read_bytes()
    for damaged in [b"", b"\xff\xfe", b"{}", b"[1]", whole[:-9], *(mutate_bytes(whole, rng) for _ in range(12))]:
        (out / name).write_bytes(damaged)
        try:
            train(None, out=out, resume=True)
        except ConfigError as error:
            said = str(error)
        else:
            said = name  # the change meant nothing
        assert name in said or "data was changed" in said or "check the path" in said


def test_a_failed_start_leaves_no_folder_that_blocks_the_next(recipe: Recipe, tmp_path: Path):
    out = tmp_path / "runs" / "new"
    missing = replace(recipe, data=replace(recipe.data, val_images=Path("nowhere")))
    refused("nowhere", train, missing, out=out)
    assert not (tmp_path / "runs").exists()
    train(recipe, out=out)
    assert RunFolder(out).metrics()["step"] == 4


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_where_a_folder_is_needed(out: str, tmp_path: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine.json").write_text(json.dumps(to_json(recipe)))
    assert cli.main(["train", str(tmp_path / "mine.json"), "--out", str(tmp_path / out)]) == 2
    assert "cannot be a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_eval_refuses_options_without_effect(tmp_path: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]):
    train(replace(recipe, train=replace(recipe.train, steps=1)), out=tmp_path / "run")
    assert recipe.data.root is not None
    truth = recipe.data.root / "val"
    args = ["eval", str(tmp_path / "run"), "--images", str(truth / "images")]
    args += ["--annotations", str(truth / "annotations.json")]
    for option in (["--names", "names.txt"], ["--palette", "colours.txt"], ["--zero-is-ignored"]):
        assert cli.main([*args, *option]) == 2
        assert f"{option[0]}: has no effect" in capsys.readouterr().err
