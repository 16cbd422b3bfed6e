"""Jobs of many images: where they come from, which go together, and what is kept when the job is stopped."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sievit.data.images import image_size
from sievit.models.inputs import InputConfig
from sievit.report.job import PADDING, batches
from sievit.report.results import Journal
from sievit.report.sources import find_images
from sievit.tasks.detection import DetectionTask, _CocoWriter
from tiny import image_folder, random_pixels, refused, saved, tiny_detector, tiny_segmenter, write_image

Command = Callable[..., Any]
BARE = ("--pictures", "False")
SIZES = [(40, 60), (64, 48), (41, 60), (100, 30), (64, 50), (40, 61)]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_detector(), tmp_path_factory.mktemp("model") / "detector.safetensors")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "photos", *SIZES)


def contents(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(".lock")}


# Where images come from.


def write_coco(path: Path, names: list[str]) -> Path:
    path.write_text(json.dumps({"images": [{"id": 30 - i, "file_name": name} for i, name in enumerate(names)]}))
    return path


def test_a_coco_file_a_list_and_a_pattern_name_images(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (photos / "deep").mkdir()
    (photos / "3.png").rename(photos / "deep" / "3.png")
    (photos / "notes.txt").write_text("no image")
    given = ["2.png", "deep/3.png", "./0.png", "2.png"]
    coco, listed = write_coco(tmp_path / "coco.json", given), tmp_path / "list.txt"
    listed.write_text("\n".join([*given[:2], "", *given[2:]]) + "\n")
    expected = ["2.png", "deep/3.png", "0.png"]

    found = find_images(coco, photos)
    assert (found.root, found.names, found.ids) == (photos, expected, {"2.png": 30, "deep/3.png": 29, "0.png": 28})
    assert find_images(listed, photos).names == expected
    monkeypatch.chdir(photos)
    assert find_images(listed).names == expected
    assert find_images(Path("*.png")).names == ["0.png", "1.png", "2.png", "4.png", "5.png"]
    assert find_images(photos / "d*" / "*.png").names == ["deep/3.png"]
    assert find_images(tmp_path / "p*" / "**" / "[34].png").names == ["photos/4.png", "photos/deep/3.png"]

    listed.write_text(f"{photos}/1.png\n../photos/0.png\n")
    elsewhere = find_images(listed)
    assert (elsewhere.root, elsewhere.names) == (photos, ["1.png", "0.png"])


def test_what_names_no_image_is_said(photos: Path, tmp_path: Path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    refused("lists no image", find_images, empty)
    refused("matches no image", find_images, photos / "*.jpg")
    refused("no such file or folder", find_images, tmp_path / "nowhere")
    refused("--images FOLDER", find_images, write_coco(tmp_path / "coco.json", ["0.png"]))
    refused("leave it out", find_images, photos, photos)
    refused("no such folder", find_images, empty, tmp_path / "nowhere")


def test_results_have_the_ids_of_the_coco_file_and_missing_images_are_listed(
    detector: Path, photos: Path, tmp_path: Path, command: Command
):
    out = tmp_path / "out"
    (photos / "5.png").write_bytes(b"no image")
    source = write_coco(tmp_path / "coco.json", ["4.png", "gone.png", "1.png", "5.png"])
    args = ("predict", detector, source, "--images", photos, "--out", out, *BARE)
    assert "2 of 4 images could not be used" in command(*args, status=1).err
    listed = json.loads((out / "images.json").read_text())["images"]
    assert [(image["file_name"], image["id"]) for image in listed] == [("4.png", 30), ("1.png", 28)]
    assert {each["image_id"] for each in json.loads((out / "results.json").read_text())} == {30, 28}
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [failure["image"] for failure in failures] == ["gone.png", "5.png"]
    assert "no such image" in failures[0]["reason"] and "cannot be read" in failures[1]["reason"]
    assert not (out / "pictures").exists()

    write_image(photos / "gone.png", random_pixels(1, 30, 30, 3))
    write_image(photos / "5.png", random_pixels(2, 30, 30, 3))
    assert "2 of 4 images were done before" in command(*args).err
    assert not (out / "failures.jsonl").exists()


def test_a_job_of_which_every_image_fails_goes_on_too(detector: Path, photos: Path, tmp_path: Path, command: Command):
    listed = tmp_path / "list.txt"
    listed.write_text("gone.png")
    args = ("predict", detector, listed, "--images", photos, "--out", tmp_path / "out", *BARE)
    command(*args, status=1)
    write_image(photos / "gone.png", random_pixels(1, 30, 30, 3))
    command(*args)


# Which images go together.


def test_images_of_similar_size_go_together(tmp_path: Path):
    shapes = [(30, 40), (40, 30), (31, 40), (90, 20), (40, 31), (30, 41)] * 8
    photos, size, config = image_folder(tmp_path, *shapes), 4, InputConfig(min_size=None, size_divisor=1)
    (photos / "9.png").write_bytes(b"no image")
    names = [f"{i}.png" for i in range(len(shapes))]
    plan = list(batches(photos, names, set(names), size, config))
    assert sorted(name for batch in plan for name in batch) == sorted(names)
    assert ["9.png"] in plan and max(map(len, plan)) == size and len(plan) < len(names) / 3
    for batch in plan:
        sizes = [each for name in batch if (each := image_size(photos / name))]
        area = sum(h * w for h, w in sizes)
        assert batch == ["9.png"] or max(h for h, _ in sizes) * max(w for _, w in sizes) * len(batch) <= PADDING * area
    some = set(plan[2][:1])
    assert list(batches(photos, names, some, size, config)) == [plan[2]], "a batch in part done is computed whole"
    assert list(batches(photos, names, {"5.png"}, 1, config)) == [["5.png"]]


def test_the_size_of_an_image_is_that_of_its_upright_pixels(tmp_path: Path):
    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg") == (30, 20)


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_batches_give_the_results_of_single_images(kind: str, detector: Path, tmp_path: Path, command: Command):
    model = detector if kind == "detector" else saved(tiny_segmenter(), tmp_path / "segmenter.safetensors")
    photos = image_folder(tmp_path / "photos", (40, 60), (64, 48), (40, 60))
    for size in (1, 2):
        bare = BARE if kind == "detector" else ()
        args = ("predict", model, photos, "--out", tmp_path / str(size), *bare, "--batch-size")
        command(*args, size)
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert "results of another batch_size" in command(*args, 3, status=2).err
    if kind == "segmenter":
        assert "pictures/2.png.png" in one
        assert {n: c for n, c in one.items() if n != "results.jsonl"} == {
            n: c for n, c in two.items() if n != "results.jsonl"
        }
        return
    single, batched = (json.loads(files["results.json"]) for files in (one, two))
    assert [each["image_id"] for each in single] == [each["image_id"] for each in batched]
    for a, b in zip(single, batched, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4) and a["bbox"] == pytest.approx(b["bbox"], abs=1e-2)


# What is kept.


def test_a_killed_process_loses_nothing(detector: Path, tmp_path: Path, command: Command):
    """Killed half-way, with half a line written; one image of 40 is broken. All files are as from a run without it."""
    photos = image_folder(tmp_path / "photos", *[(32 + i * 7 % 30, 40 + i * 11 % 24) for i in range(40)])
    broken = photos / "17.png"
    broken.write_bytes(broken.read_bytes()[:200])
    whole, out = tmp_path / "whole", tmp_path / "out"
    args = ["predict", str(detector), str(photos), "--batch-size", "4", *BARE, "--out"]
    command(*args, whole, status=1)
    assert len((whole / "results.jsonl").read_bytes().splitlines()) == 40
    assert "17.png" in (whole / "failures.jsonl").read_text()

    process = subprocess.Popen([sys.executable, "-m", "sievit", *args, str(out)], stderr=subprocess.PIPE)
    journal = out / "results.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    journal.write_bytes(journal.read_bytes()[:-7])
    (out / ".0123abcd.99999.part").write_bytes(b"half of a file")
    command(*args, out, status=1)
    assert contents(out) == contents(whole)


def test_what_several_processes_left_is_taken_up(detector: Path, photos: Path, tmp_path: Path, command: Command):
    out, args = tmp_path / "out", ["predict", detector, photos, "--batch-size", 2, "--out"]
    command(*args, out)
    whole = contents(out)
    first, *lines = whole["results.jsonl"].splitlines(keepends=True)
    for mine, others in ((lines[3:], lines[:3]), ([], lines[::-1]), (lines, [])):
        (out / "results.1.jsonl").write_bytes(first + b"".join(others) + lines[0][:9])
        (out / "results.jsonl").unlink()
        if mine:
            (out / "results.jsonl").write_bytes(first + b"".join(mine))
        assert "6 of 6 images were done before" in command(*args, out).err
        assert contents(out) == whole
    (out / "results.1.jsonl").write_bytes(first.replace(b'"batch_size": 2', b'"batch_size": 9'))
    assert "results of another batch_size" in command(*args, out, status=2).err
    command(*args, out, "--force")
    assert contents(out) == whole


def test_a_process_that_still_writes_a_part_is_waited_for(
    detector: Path, photos: Path, tmp_path: Path, command: Command
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.1.jsonl").write_text("")
    script = "from pathlib import Path; from sievit.files import held\n"
    script += f"with held(Path({str(out)!r}), lock='.lock1'): print(flush=True); input()"
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **options) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert "another process writes there" in command("predict", detector, photos, "--out", out, status=2).err
        other.kill()


def test_a_line_that_was_replaced_goes(detector: Path, photos: Path, tmp_path: Path, command: Command):
    args = ("predict", detector, photos, *BARE, "--out")
    command(*args, tmp_path / "out")
    write_image(photos / "2.png", random_pixels(5, 50, 50, 3))
    command(*args, tmp_path / "out")
    command(*args, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_memory_holds_no_results(tmp_path: Path):
    """300 images with 100 kB of results each."""
    photos, out = image_folder(tmp_path / "photos", (8, 8)), tmp_path / "out"
    names = [f"{i}.png" for i in range(300)]
    for name in names[1:]:
        (photos / name).hardlink_to(photos / "0.png")
    writer = _CocoWriter(DetectionTask(tiny_detector()), out, {name: i for i, name in enumerate(names)})
    big = {"width": 8, "height": 8, "detections": [{"segmentation": "x" * 100_000}]}
    before = [(photos / "0.png").stat().st_size, (photos / "0.png").stat().st_mtime_ns]
    tracemalloc.start()
    for done in (0, 300):
        journal = Journal(out, writer, {"model": "m"}, pictures=False)
        todo = journal.start(photos, names, read=[], force=False)
        assert len(todo) == 300 - done
        for name in reversed(todo):
            journal.add([journal.line(name, before, big)])
        journal.settle(names)
        writer.finish(journal.done(names))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
    assert [each["image_id"] for each in json.loads((out / "results.json").read_text())] == list(range(300))


def test_the_page_on_large_jobs_runs(
    detector: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
):
    """Each command as it stands there; that of torchrun without it, as `test_distributed.py` has several processes."""
    (tmp_path / "facade_svit.safetensors").hardlink_to(detector)
    Image.open(photos / "5.png").convert("RGB").save(photos / "5.jpg")
    for name in ("1.png", "2.png", "3.png", "4.png", "5.png"):
        (photos / name).unlink()
    write_coco(tmp_path / "photos.json", ["5.jpg", "0.png"])
    (tmp_path / "photos.txt").write_text("photos/5.jpg\nphotos/0.png\n")
    monkeypatch.setenv("SIEVIT_MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "large-jobs.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).splitlines()
    for line in filter(None, lines):
        launcher, _, arguments = line.rpartition("sievit ")
        assert launcher in ("", "torchrun --nproc-per-node 2 -m ")
        command(*shlex.split(arguments, comments=True))
    listed = {path.parent.name: json.loads(path.read_text())["images"] for path in tmp_path.glob("*/images.json")}
    assert {name: len(images) for name, images in listed.items()} == {
        "found": 2,
        "found_coco": 2,
        "found_list": 2,
        "found_pattern": 1,
        "fast": 2,
        "shared": 2,
    }
    assert [image["id"] for image in listed["found_coco"]] == [30, 29]
    blocks = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert blocks and all(compile(block, "large-jobs.md", "exec") for block in blocks)
