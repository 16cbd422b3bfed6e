"""The command line: help, names and mistakes."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sievit import cli
from sievit.cli.command import parse
from sievit.policies import RandomConfig
from sievit.recipes import recipe
from tiny import refused

Command = Callable[..., Any]


def test_overviews_name_every_command(command: Command):
    text = command("--help").out
    assert all(name in text for name in cli.COMMANDS)

    assert "usage" in command(status=2).err

    assert "data scenes" in command("data", "--help").out
    command("data", status=2)


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
def test_mistakes_name_the_way_out(args: list[str], words: list[str], command: Command):
    written = command(*args, status=2)
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
    ("words", "old", "new"),
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
def test_an_option_of_an_earlier_version_says_its_new_name(words: str, old: str, new: str, command: Command):
    assert f"is now written {new}" in command(*words.split(), *old.split(), status=2).err


def test_flags_take_a_value_or_none_and_lists_stand_once(tmp_path: Path):
    def run(recipe: str, /, *, out: Path, force: bool = False, values: tuple[int, ...] = ()) -> dict:
        return {"recipe": recipe, "force": force, "values": list(values)}

    start = ["a", "--out", "x"]
    for args, force in ((["--force"], True), (["--force", "True"], True), (["--force", "False"], False), ([], False)):
        assert parse(run, [*start, *args], "run")["force"] == force
        assert parse(run, [*args, "--values", "1", "2", "--out", "x", "--", "a"], "run")["force"] == force
    refused("--values is given twice", parse, run, [*start, "--values", "1", "--values", "2"], "run")


@pytest.mark.parametrize("name", [*cli.COMMANDS, "train nuclei_svit"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]):
    try:
        status = cli.main([*name.split(), "--help"])
    except SystemExit as left:
        status = left.code
    assert not status
    assert f"usage: sievit {name}" in capsys.readouterr().out


def test_recipes_and_policies_are_listed(command: Command):
    text = command("recipes").out + command("policies").out
    assert all(name in text for name in ("coco_svit_adapter_s", "nuclei_vit", "keep_all", "svit"))

    assert json.loads(command("recipes", "nuclei_svit").out)["model"]["policy"]["kind"] == "svit"


def test_a_printed_recipe_can_be_changed_and_used(tmp_path: Path, command: Command):
    changed = json.loads(command("recipes", "nuclei_segvit").out)
    changed["model"]["policy"] = {"kind": "random", "shares": [0.5]}
    (tmp_path / "mine.json").write_text(json.dumps(changed))
    assert recipe(str(tmp_path / "mine.json")).model.policy == RandomConfig(shares=(0.5,))
    assert json.loads(command("recipes", tmp_path / "mine.json").out)["model"]["policy"]["shares"] == [0.5]
    changed["train"]["epcohs"] = 3
    (tmp_path / "mine.json").write_text(json.dumps(changed))
    assert "epcohs" in command("train", tmp_path / "mine.json", status=2).err


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)])
def test_the_machine_s_trouble_has_a_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, command: Command
):
    def fail() -> dict:
        raise error

    monkeypatch.setattr("sievit.cli.lists.policies", fail)
    assert "Traceback" not in command("policies", status=status).err


def test_scenes_are_written_and_not_overwritten(tmp_path: Path, command: Command):
    args = ["data", "scenes", "--out", tmp_path / "scenes", "--num-images", 2, "--size", 64, 96]
    command(*args)
    assert len(list((tmp_path / "scenes" / "images").iterdir())) == 2
    assert "holds a data set" in command(*args, status=2).err


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "sievit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sievit ")


def test_long_work_shows_where_it_is_without_a_terminal(monkeypatch: pytest.MonkeyPatch):
    from sievit import terminal

    monkeypatch.setattr(terminal, "EVERY", 0.0)
    printed, console = io.StringIO(), terminal.console()
    console.file = printed
    assert list(terminal.track([1, 2, 3], "[red]counting", console=console)) == [1, 2, 3]
    with terminal.Work("training", total=10, done=4, console=console) as work:
        work.show(5, "loss 1.5")
    lines = printed.getvalue().splitlines()
    assert lines[0] == "[red]counting: 0 of 3"
    assert [line.rpartition(", ")[0] for line in lines[1:]] == [
        "[red]counting: 1 of 3",
        "[red]counting: 2 of 3",
        "training: 5 of 10, loss 1.5",
    ]
    assert all(line.endswith("0:00:00 left") for line in lines[1:])
    assert list(terminal.track(range(2), "nothing", console=None)) == [0, 1]
