"""The README and the guides are tests: their Python runs, their commands are commands, files stand as they are."""

import re
import shlex
from pathlib import Path

import pytest
import timm

from sievit import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("use", "train", "weights", "speed"))]
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
