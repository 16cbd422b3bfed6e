"""The README and the guides are tests: their Python runs, their commands are commands, files stand as they are."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm

from sievit import cli

ROOT = Path(__file__).parents[1]
NAMES = ("use", "train", "train-on-your-data", "compare-methods", "export", "video", "weights", "speed")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in dict.fromkeys(lines) if line.startswith("sievit ")]


def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    made = timm.create_model  # the weights of the example are not downloaded here
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: made(name, pretrained=False))
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
        assert "torch.Size" in capsys.readouterr().out


@pytest.mark.parametrize("args", commands(), ids=" ".join)
def test_the_options_of_the_readme_exist(args: list[str], capsys: pytest.CaptureFixture[str]):
    name = next(name for name in cli.COMMANDS if args[: len(name.split())] == name.split())
    recipe = args[1:2] if name == "train" else []
    with pytest.raises(SystemExit) as left:
        cli.main([*name.split(), *recipe, "--help"])
    assert not left.value.code
    text = capsys.readouterr().out
    assert all(option in text for option in args if option.startswith("--"))


def test_make_targets_and_files_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([a-z-]+)$|`make ([a-z-]+)`", README, flags=re.MULTILINE)):
        assert re.search(rf"^{''.join(target)}:", makefile, flags=re.MULTILINE), target

    for name in re.findall(r"`((?:src|docs|scripts|models|examples)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name


PHOTOGRAPHS = ROOT / "examples" / "facade"
SMALL = {
    "train.vit-from": None,
    "train.steps": 1,
    "train.batch-size": 2,
    "train.workers": 0,
    "train.precision": "32-true",
    "model.vit.embed-dim": 16,
    "model.vit.num-heads": 2,
    "model.neck.deform-num-heads": 2,
    "model.neck.conv-inplane": 4,
    "model.head.fpn-channels": 8,
    "model.head.box.fc": 16,
    "model.head.rpn.post-nms-test": 20,
    "model.input.min-size": 64,
    "data.augment.scales": 64,
    "data.augment.crop-first": 0,
}
"""A model and a training that take a second."""


def test_the_page_on_your_own_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]):
    content = json.loads((PHOTOGRAPHS / "annotations" / "instances_val.json").read_text())
    for part, images in (("train", content["images"][:3]), ("val", content["images"][3:5])):
        ids = {image["id"] for image in images}
        objects = [a for a in content["annotations"] if a["image_id"] in ids]
        (tmp_path / "my" / "images" / part).mkdir(parents=True)
        (tmp_path / "my" / "annotations").mkdir(exist_ok=True)
        for image in images:
            shutil.copy(PHOTOGRAPHS / "images" / "val" / image["file_name"], tmp_path / "my" / "images" / part)
        written = json.dumps({**content, "images": images, "annotations": objects})
        (tmp_path / "my" / "annotations" / f"{part}.json").write_text(written)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "train-on-your-data.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).splitlines()
    steps = [shlex.split(line) for line in lines if line]
    small = [f"--{option}={value}" for option, value in SMALL.items()]
    assert [step[1] for step in steps] == ["train", "train", "eval", "tune", "predict", "curve", "inspect"]
    for _, name, *args in steps:
        printed = command(name, *args, *(small if name == "train" else ()))
        if name == "eval":
            assert {"differences", "speedup", "against"} <= printed.figures.keys()
    assert len(json.loads((tmp_path / "found" / "images.json").read_text())["images"]) == 2


# Files on pages.


SHOWN = [
    (page, name, text)
    for page in sorted((ROOT / "docs").glob("*.md"))
    for name, text in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize(("page", "name", "text"), SHOWN, ids=[name for _, name, _ in SHOWN])
def test_a_file_on_a_page_is_the_file(page: Path, name: str, text: str) -> None:
    assert text == (ROOT / name).read_text(encoding="utf-8"), f"copy {name} into {page.name}"


def test_there_is_one() -> None:
    assert any(page.name == "add-a-policy.md" for page, _, _ in SHOWN)


def test_every_row_of_the_page_on_reliability_is_a_test():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    written = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page):
        assert f"def {name}(" in written, name
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| what", "| status"))]
    assert len(rows) > 30
    assert all("test" in row.rpartition(" | ")[2] for row in rows)
