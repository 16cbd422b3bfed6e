"""What a caller passes by mistake is an error that says so; no answer is made up."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sievit
from sievit import cli
from sievit.config import ConfigError
from sievit.hub.card import read_figures
from sievit.models.build import build, load, save
from sievit.policies import SViTConfig
from tiny import random_images, random_pixels, refused, tiny_detector, tiny_segmenter, write_image


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build(tiny_detector()).eval()


@pytest.mark.parametrize("batch_size", [-1, 0, 1.5, "2", None, True, math.nan])
def test_a_batch_size_that_is_none(batch_size: Any, model: Any):
    refused("batch_size is", model.predict, random_images((40, 40)), batch_size=batch_size)


@pytest.mark.parametrize("policy", ["keep_all", 3, {}])
def test_a_policy_that_is_none(policy: Any, model: Any):
    refused(r"policy is a Policy.*sievit\.load", model.predict, random_images((40, 40)), policy=policy)


def test_values_that_no_image_has(model: Any):
    image = torch.rand(3, 40, 40)
    wrong = [image * 255, image - 1, image.clone().fill_(math.nan), image.clone().fill_(-math.inf)]
    one = image.clone()
    one[1, 2, 3] = math.inf
    for each in [*wrong, one]:
        refused(r"a float image is in 0\.\.1", model.predict, [each])
    for each in (image[None], image[:2], image.to(torch.int32), image[:, :0], np.zeros((4, 4, 3)), object(), None):
        refused("image", model.predict, [each])
    for each in (image, "a.png", np.zeros((4, 4, 3), np.uint8)):
        refused("list of images", model.predict, each)
    assert len(model.predict([image * 1.2 - 0.1, (image * 255).byte()])) == 2  # resizing overshoots at edges


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_whose_training_failed_is_refused(value: float, tmp_path: Path):
    model = build(tiny_segmenter())
    with torch.no_grad():
        next(model.parameters()).flatten()[0] = value
    save(model, tmp_path / "failed.safetensors")
    refused(r"failed\.safetensors: weights that are NaN or infinite", load, tmp_path / "failed.safetensors")


def test_a_misspelt_name_of_a_model_and_a_released_file(tmp_path: Path):
    write_image(tmp_path / "a.png", random_pixels(0, 8, 8, 3))
    torch.save({}, tmp_path / "released.pth")
    refused("did you mean 'nuclei_svit'", sievit.load, "nuclei_sivt")
    refused("sievit convert", sievit.load, tmp_path / "released.pth")


@pytest.mark.parametrize(
    "line", ['{"gflops": "many"}', '{"keep": [1, "x"]}', '{"miou": null}', "[" * 100_000, "\xff", "[]"]
)
def test_figures_of_a_card_that_are_no_numbers(line: str, tmp_path: Path):
    (tmp_path / "figures.json").write_bytes(line.encode("latin-1"))
    refused(r"figures\.json", read_figures, tmp_path / "figures.json")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("a.json: wrong"), 2, "error: a.json: wrong"),
        (OSError(28, "No space left on device", "out.png"), 1, "error: out.png: No space left on device"),
        (PermissionError(13, "Permission denied", "out"), 1, "error: out: Permission denied"),
        (FileExistsError(17, "File exists", "out"), 2, "error: out: is a file where a folder is needed"),
        (MemoryError(), 1, "error: not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_becomes_one_message_and_a_status(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main(["eval"]) == status
    assert said in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail(_: object) -> int:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(["eval"])


def test_a_reader_that_goes_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sievit", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("seed", [0])
def test_hostile_files_and_options_through_the_command_line(seed: int, tmp_path: Path):
    """Briefly what `make fuzz` does for long; in a process of its own, which forks."""
    file = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, str(file), "--seed", str(seed), "--cases", "7", "--kept", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 cases, 0 failures" in done.stdout


def test_the_fuzzer_finds_what_is_wrong(tmp_path: Path):
    """A traceback, a crash, a hang: each is seen, and its files are kept."""
    script = f"""
import sys, os, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import fuzz
from pathlib import Path
ends = [lambda a: 1 / 0, lambda a: os.kill(os.getpid(), 11), lambda a: [0 for _ in iter(int, 1)],
        lambda a: 77, lambda a: 2]
fuzz.SECONDS = 1
for end in ends:
    fuzz.cli.main = end
    print(fuzz.run_case([], Path({str(tmp_path)!r})))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    traceback, crash, hang, status, fine = done.stdout.splitlines()
    assert "ZeroDivisionError" in traceback
    assert "signal 11" in crash
    assert "signal 9" in hang or "signal 24" in hang
    assert "status 77" in status
    assert fine == "('status 2', None)"


@pytest.mark.parametrize("command", ["tune MODEL --images IMAGES", "init nuclei_svit"])
def test_a_model_file_that_cannot_be_there_is_refused_before_anything_runs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("mine")
    write_image(tmp_path / "images" / "a.png", random_pixels(0, 8, 8, 3))
    save(build(tiny_detector(policy=SViTConfig(first_block=1))), tmp_path / "model.safetensors")
    places = {"MODEL": str(tmp_path / "model.safetensors"), "IMAGES": str(tmp_path / "images")}
    args = [places.get(word, word) for word in command.split()]
    assert cli.main([*args, "--out", str(tmp_path / "file" / "fast.safetensors")]) == 2
    assert "file is a file where a folder is needed" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
