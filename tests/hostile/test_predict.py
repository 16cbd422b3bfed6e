"""No image of a user's is lost, no result is lost, and none is that of another image."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sievit import cli
from sievit.files import digest
from sievit.models.build import build, save
from sievit.report import job
from tiny import image_folder, random_pixels, tiny_detector, tiny_segmenter, write_image

NAMES = tuple(f"{i}.png" for i in range(4))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "detector.safetensors"
    save(build(tiny_detector()), path)
    return path


@pytest.fixture(scope="module")
def segmenter(detector: Path) -> Path:
    path = detector.with_name("segmenter.safetensors")
    save(build(tiny_segmenter()), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "photos", *[(40 + i, 60) for i in range(len(NAMES))])


def predict(model: Path, images: Path, out: Path, *options: str) -> int:
    return cli.main(["predict", str(model), str(images), "--out", str(out), *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("out", ["photos", "photos/results", ".", "photos/../photos", "link"])
def test_images_stay_as_they_are_wherever_the_results_go(out: str, detector: Path, photos: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(photos)
    before = contents(photos)
    assert predict(detector, photos, tmp_path / out) == 0
    assert before.items() <= contents(photos).items()
    assert sorted(p.name for p in (tmp_path / out / "pictures").iterdir()) == [f"{name}.png" for name in NAMES]


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("how", ["an image of this name", "symbolic link", "hard link"])
def test_a_result_that_would_lie_on_an_image_is_refused_before_anything_runs(
    how: str,
    force: tuple[str, ...],
    detector: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = photos if how == "an image of this name" else tmp_path / "out"
    place = out / "pictures" / "3.png.png"
    place.parent.mkdir(parents=True)
    if how == "an image of this name":
        write_image(place, random_pixels(9, 30, 30, 3))
    else:
        place.symlink_to(photos / "0.png") if how == "symbolic link" else place.hardlink_to(photos / "0.png")
    before = contents(tmp_path)
    monkeypatch.setattr(job, "timed", None)
    assert predict(detector, photos, out, *force) == 2
    assert "would be written over" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_file_of_somebody_else_is_not_written_over(detector: Path, photos: Path, tmp_path: Path):
    write_image(tmp_path / "out" / "pictures" / "2.png.png", random_pixels(9, 30, 30, 3))
    (tmp_path / "out" / "results.json").write_text("mine")
    before = contents(tmp_path)
    assert predict(detector, photos, tmp_path / "out") == 2
    assert contents(tmp_path) == before
    assert predict(detector, photos, tmp_path / "out", "--force") == 0


def test_an_empty_set_of_images_is_an_error(
    detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").mkdir()
    assert predict(detector, tmp_path / "empty", tmp_path / "out") == 2
    assert predict(detector, photos, photos / "out") == 0
    capsys.readouterr()
    assert predict(detector, photos / "out", tmp_path / "out") == 2
    assert "all 4 images below are results" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_of_earlier_runs_are_left_out_and_that_is_said(
    detector: Path, segmenter: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    assert predict(segmenter, photos, photos / "a") == 0
    assert predict(detector, photos, photos / "b") == 0
    assert "8 images" in capsys.readouterr().err  # pictures and labels
    assert len(json.loads((photos / "b" / "images.json").read_text())["images"]) == len(NAMES)


def test_images_never_share_a_result(segmenter: Path, tmp_path: Path):
    names = ("a.png", "a.jpg", "a.jpg.png", "x.png", "labels/x.png", "pictures/x.png", "A.png")
    for i, name in enumerate(names):
        write_image(tmp_path / "photos" / name, random_pixels(i, 24, 32, 3))
    assert predict(segmenter, tmp_path / "photos", tmp_path / "out") == 0
    for kind in ("pictures", "labels"):
        files = [p.relative_to(tmp_path / "out" / kind).as_posix() for p in (tmp_path / "out" / kind).rglob("*.png")]
        assert sorted(files) == sorted(f"{name}.png" for name in names)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device", "x.png")])
@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_an_interruption_loses_nothing_and_the_same_command_goes_on(
    kind: str, stop: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    model, out, whole = request.getfixturevalue(kind), tmp_path / "out", tmp_path / "whole"
    assert predict(model, photos, whole) == 0
    calls = []

    def failing(path: Path, picture: Any, write: Callable[..., None] = job.write_png) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise stop
        write(path, picture)

    with monkeypatch.context() as patched:
        patched.setattr(job, "write_png", failing)
        assert predict(model, photos, out) in (1, 130)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines[1:]] == list(NAMES[:3])
    if kind == "detector":
        listed = json.loads((out / "images.json").read_text())["images"]
        assert [image["file_name"] for image in listed] == list(NAMES[:3])
    assert predict(model, photos, out) == 0
    assert contents(out) == contents(whole)


def test_an_image_that_was_changed_is_done_again(
    detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert predict(detector, photos, out) == 0
    write_image(photos / "1.png", random_pixels(7, 90, 30, 3))
    (out / "pictures" / "3.png.png").unlink()
    capsys.readouterr()
    assert predict(detector, photos, out) == 0
    assert "2 of 4 images were done before" in capsys.readouterr().err
    sizes = [(image["width"], image["height"]) for image in json.loads((out / "images.json").read_text())["images"]]
    assert sizes[1] == (30, 90)


def test_results_of_two_models_are_not_mixed(
    detector: Path, segmenter: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert predict(detector, photos, out) == 0
    before = contents(out)
    assert predict(detector, photos, out, "--score-threshold", "0.25") == 2
    assert "results of another score_threshold" in capsys.readouterr().err
    assert predict(segmenter, photos, out) == 2
    assert contents(out) == before
    assert predict(segmenter, photos, out, "--force") == 0


@pytest.mark.parametrize("name", ["mk[/x]", "[red]zz", ":smile:", "line\nbreak"])
def test_no_name_is_taken_for_markup(
    name: str, detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (photos / "0.png").rename(photos / f"{name.replace('/', '')}.png")
    (photos / "1.png").write_bytes(b"no image")
    assert predict(detector, photos, tmp_path / name) == 1
    assert (tmp_path / name / "results.json").exists()
    if name.isprintable():
        assert str(tmp_path / name / "results.json") in capsys.readouterr().err.replace("\n", "")


def test_every_console_is_made_in_one_place():
    package = Path(cli.__file__).parents[1]
    made = [p.name for p in package.rglob("*.py") if "Console(" in p.read_text(encoding="utf-8")]
    assert made == ["terminal.py"]


def test_two_processes_do_not_write_into_one_folder(detector: Path, photos: Path, tmp_path: Path):
    script = (
        f"from sievit.files import held\nfrom pathlib import Path\nwith held(Path({str(tmp_path / 'out')!r})): input()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    while not (tmp_path / "out" / ".lock").exists():
        time.sleep(0.01)
    time.sleep(0.1)  # the file is there; locked it is an instant later
    assert predict(detector, photos, tmp_path / "out") == 2
    other.kill()
    other.communicate()
    assert predict(detector, photos, tmp_path / "out") == 0


def test_options_without_effect_are_refused(segmenter: Path, photos: Path, tmp_path: Path):
    assert predict(segmenter, photos, tmp_path / "out", "--score-threshold", "0.3") == 2
    assert predict(segmenter, photos, tmp_path / "out", "--ids", "ids.json") == 2
    assert not (tmp_path / "out").exists()


def test_identical_runs_write_identical_files(detector: Path, photos: Path, tmp_path: Path):
    for out in ("a", "b"):
        assert predict(detector, photos, tmp_path / out) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    model = build(tiny_detector())
    save(model, tmp_path / "first.safetensors")
    digests = set()
    for i in range(8):
        save(model, tmp_path / f"{i}.safetensors")
        digests.add(digest(tmp_path / f"{i}.safetensors"))
    assert digests == {digest(tmp_path / "first.safetensors")}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_is_what_is_missing(
    detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (photos / "0.png").chmod(0)
    assert predict(detector, photos, tmp_path / "out") == 1
    assert "Permission denied" in capsys.readouterr().err
