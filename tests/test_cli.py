"""The command line: help, names and mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sievit import cli
from sievit.cli.command import parse
from sievit.config import ConfigError
from sievit.policies import RandomConfig
from sievit.recipes import recipe


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_no_command_is_a_mistake(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'?"]),
        (["data", "scene"], ["unknown command 'data scene'", "did you mean 'data scenes'?"]),
        (["train"], ["needs a recipe first"]),
        (["train", "nuclei_svti"], ["nuclei_svti", "did you mean 'nuclei_svit'?"]),
        (["train", "nowhere.json"], ["nowhere.json", "cannot be read"]),
        (["recipes", "nucle_vit"], ["nucle_vit", "did you mean 'nuclei_vit'?"]),
        (["predict", "nowhere.safetensors", ".", "--out", "x"], ["nowhere.safetensors", "no such file"]),
    ],
)
def test_mistakes_name_the_way_out(args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(args) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("error: ")
    assert all(word in written.err for word in words)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["predict", "a", "b", "--out", "x", "--polciy", "svit"], "--policy"),
        (["train", "nuclei_vit", "--train.epoch", "3"], "--train.epochs"),
        (["train", "nuclei_vit", "--train.epochs", "many"], "--train.epochs"),
        (["eval"], "--images"),
        (["init", "nuclei_vit", "--seed"], "--seed"),
    ],
)
def test_wrong_options_name_the_nearest(args: list[str], word: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        cli.main(args)
    assert left.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert word in written.err


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("eval a --images b", "--thresholds 0.9", "--policy dtop --set thresholds=0.9"),
        ("predict a b --out c", "--budget 0.7", "--set budget=0.7"),
        ("sweep a --images b", "--thresholds 0.9", "--policy dtop --values 0.8 0.9"),
        ("sweep a --images b", "--keep-per-class 3", "--set keep-per-class=3"),
        ("train nuclei_vit", "--model.head.box-max-detections=3", "--model.head.box.max-detections"),
        ("train nuclei_vit", "--model.head.rpn-box-loss l1", "--model.head.rpn.loss"),
        ("train nuclei_vit", "--model.head.anchor_ratios 1", "--model.head.anchors.ratios"),
    ],
)
def test_an_option_of_an_earlier_version_says_its_new_name(
    command: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main([*command.split(), *old.split()]) == 2
    assert f"is now written {new}" in capsys.readouterr().err


def test_flags_take_a_value_or_none_and_lists_stand_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(recipe: str, /, *, out: Path, force: bool = False, values: tuple[int, ...] = ()) -> dict:
        return {"recipe": recipe, "force": force, "values": list(values)}

    start = ["a", "--out", "x"]
    for args, force in ((["--force"], True), (["--force", "True"], True), (["--force", "False"], False), ([], False)):
        assert parse(run, [*start, *args], "run")["force"] == force
        assert parse(run, [*args, "--values", "1", "2", "--out", "x", "--", "a"], "run")["force"] == force
    with pytest.raises(ConfigError, match="--values is given twice"):
        parse(run, [*start, "--values", "1", "--values", "2"], "run")


@pytest.mark.parametrize("name", [*cli.COMMANDS, "train nuclei_svit"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]):
    try:
        status = cli.main([*name.split(), "--help"])
    except SystemExit as left:
        status = left.code
    assert not status
    assert f"usage: sievit {name}" in capsys.readouterr().out


def test_groups_have_help(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", "--help"]) == 0
    assert "data scenes" in capsys.readouterr().out
    assert cli.main(["data"]) == 2


def test_recipes_and_policies_are_listed(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["recipes"]) == 0
    assert cli.main(["policies"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("coco_svit_adapter_s", "nuclei_vit", "keep_all", "svit"))


def test_a_recipe_is_printed_as_json(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["recipes", "nuclei_svit"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["policy"]["kind"] == "svit"


def test_a_printed_recipe_can_be_changed_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["recipes", "nuclei_segvit"]) == 0
    changed = json.loads(capsys.readouterr().out)
    changed["model"]["policy"] = {"kind": "random", "shares": [0.5]}
    (tmp_path / "mine.json").write_text(json.dumps(changed))
    assert recipe(str(tmp_path / "mine.json")).model.policy == RandomConfig(shares=(0.5,))
    assert cli.main(["recipes", str(tmp_path / "mine.json")]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["policy"]["shares"] == [0.5]
    changed["train"]["epcohs"] = 3
    (tmp_path / "mine.json").write_text(json.dumps(changed))
    assert cli.main(["train", str(tmp_path / "mine.json")]) == 2
    assert "epcohs" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)])
def test_the_machine_s_trouble_has_a_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail() -> dict:
        raise error

    monkeypatch.setattr("sievit.cli.lists.policies", fail)
    assert cli.main(["policies"]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_scenes_are_written_and_not_overwritten(tmp_path, capsys: pytest.CaptureFixture[str]):
    args = ["data", "scenes", "--out", str(tmp_path / "scenes"), "--num-images", "2", "--size", "64", "96"]
    assert cli.main(args) == 0
    assert len(list((tmp_path / "scenes" / "images").iterdir())) == 2
    capsys.readouterr()


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "sievit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sievit ")
