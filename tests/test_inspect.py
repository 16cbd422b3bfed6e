"""What is computed where, and two models against each other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sievit.models.base import Answer
from sievit.policies import DToPConfig, KeepAllConfig, RandomConfig, SViTConfig
from sievit.report.inspect import Findings
from sievit.tasks import Region, task_of
from sievit.tokens import Tokens, Trace
from tiny import saved, tiny_detector, tiny_segmenter

Command = Callable[..., Any]


def answer_of(keep: list[list[int]], *, grid: tuple[int, int]) -> Answer:
    """A pass over one image of a pixel per token, whose blocks computed these."""
    trace = Trace.start(Tokens(torch.zeros(1, grid[0] * grid[1], 1), grid))
    for row in keep:
        tokens = Tokens(torch.zeros(1, grid[0] * grid[1], 1), grid, keep=torch.tensor([row], dtype=torch.bool))
        trace = trace.record(tokens, {}, [False, True])
    return Answer.whole(trace, [grid], grid)


def test_pixels_and_returns_are_counted():
    findings = Findings(("car", "tree"))
    keep = [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    car = Region(0, torch.tensor([[True, True, False, False]]), area=2.0)
    tree = Region(1, torch.tensor([[False, False, True, False]]))
    findings.add(0, [car, tree], answer_of(keep, grid=(1, 4)), 5.0)
    content = findings.content()
    assert content["by_class"]["car"] == {"pixels": 2.0, "keep": [1.0, 0.5, 1.0, 1.0, 0.5]}
    assert content["by_class"]["tree"]["keep"] == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert content["by_class"]["elsewhere"]["keep"] == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert list(content["by_size"]) == ["small"]
    # token 1 comes back after one block, token 2 after two, token 3 after three; token 1 leaves once more
    assert content["returned"] == {"of_tokens_left_out": 1.0, "in_the_next_block": pytest.approx(1 / 3, abs=1e-4)}


def test_the_cost_is_correlated_with_what_the_image_holds():
    findings = Findings(("car", "tree"))
    for size, cost in ((1, 2.0), (2, 5.0), (3, 5.5), (4, 8.0), (2, 4.0), (3, 6.5)):
        region = Region(0, torch.arange(4)[None] < size)
        findings.add(0, [region], answer_of([[1] * 4], grid=(1, 4)), cost)
    r, low, high = findings.correlations()["car"]
    assert 0.5 < low < 0.9 < r < high < 1 and "tree" not in findings.correlations()


@pytest.fixture(scope="module")
def data(scenes_of: Callable[..., Path]) -> Path:
    return scenes_of(3, (48, 64))


def test_a_detector_is_looked_into(data: Path, tmp_path: Path, command: Command):
    config = tiny_detector(policy=RandomConfig(first_block=1, shares=(0.5,)))
    model = saved(config, tmp_path / "model.safetensors")
    start = ["inspect", model, "--images", data / "images", "--annotations", data / "annotations.json"]
    figures = command(*start, "--out", tmp_path / "out", "--pictures", 1).figures
    assert json.loads((tmp_path / "out" / "inspect.json").read_text()) == figures
    assert figures["images"] == 3 and set(figures["by_size"]) <= {"small", "medium", "large"}
    for row in figures["by_class"].values():
        assert len(row["keep"]) == 4 and row["keep"][0] == 1
        assert all(0 < share < 1 for share in row["keep"][1:])
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert len(names) == 3 and names[0].startswith("cheapest_1_") and names[1].startswith("dearest_1_")
    for name in names:
        Image.open(tmp_path / "out" / name).verify()


def test_a_segmenter_says_where_classes_leave(data: Path, tmp_path: Path, command: Command):
    model = saved(tiny_segmenter(policy=DToPConfig(thresholds=(0.2,))), tmp_path / "model.safetensors")
    printed = command(
        "inspect", model, "--images", data / "images", "--labels", data / "labels", "--out", tmp_path, "--pictures", 0
    )
    for row in printed.figures["by_class"].values():
        assert sum(row["left_at"]) == pytest.approx(1, abs=1e-3)
    assert "never" in printed.out


def test_regions_of_a_target():
    labels = torch.tensor([[0, 0, 2], [255, 2, 2]])
    found = task_of(tiny_segmenter()).regions({"labels": labels}, (2, 3))
    assert [(region.label, int(region.pixels.sum())) for region in found] == [(0, 2), (2, 3)]
    target = {
        "boxes": torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 1.0, 0.2, 1.2]]),
        "labels": torch.tensor([2, 1]),
        "area": torch.tensor([4.0, 0.04]),
    }
    big, tiny = task_of(tiny_detector()).regions(target, (2, 4))
    assert (big.label, big.area, int(big.pixels.sum())) == (1, 4.0, 4)
    assert int(tiny.pixels.sum()) == 1, "an object has a pixel at least"


def test_two_models_against_each_other(data: Path, tmp_path: Path, command: Command):
    dense, sparse = (
        saved(tiny_detector(policy=policy), tmp_path / f"{name}.safetensors")
        for name, policy in (("dense", KeepAllConfig()), ("sparse", SViTConfig(first_block=1)))
    )
    start = ["eval", sparse, "--images", data / "images", "--annotations", data / "annotations.json"]
    printed = command(*start, "--against", dense)
    figures, alone = printed.figures, command(*start).figures
    for name in ("box_ap", "mask_ap"):
        difference, low, high = figures["differences"][name]
        assert figures[name] == alone[name] and low <= difference <= high
        assert difference == pytest.approx(figures[name] - figures["against"][name], abs=1e-4)
    assert figures["speedup"] > 0 and "difference (95 %)" in printed.out
    same = command(*start, "--against", sparse).figures
    assert same["differences"]["box_ap"] == [0, 0, 0]
    assert "image by image" in command(*start, "--against", dense, "--batch-size", 2, status=2).err
    other = saved(tiny_segmenter(), tmp_path / "other.safetensors")
    assert "cannot be compared" in command(*start, "--against", other, status=2).err
