"""mIoU of a data set is what its definition says, over any number of processes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sievit.config import ConfigError
from sievit.tasks.metrics import SegmentationMetric


def images(seed: int, classes: int, count: int = 4, ignored: float = 0.2) -> list[tuple[Tensor, Tensor]]:
    """Predicted and true labels of a few images of different sizes; some classes are rare or missing."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        size = tuple(int(edge) for edge in rng.integers(1, 12, 2))
        truth = np.minimum(rng.geometric(0.4, size) - 1, classes - 1)
        predicted = np.where(rng.random(size) < 0.6, truth, rng.integers(0, classes, size))
        truth = np.where(rng.random(size) < ignored, 255, truth)
        result.append((torch.from_numpy(predicted), torch.from_numpy(truth)))
    return result


def figures(pairs: list[tuple[Tensor, Tensor]], classes: int) -> dict:
    metric = SegmentationMetric(classes)
    for predicted, truth in pairs:
        metric.update(predicted, truth)
    return metric.compute()


def brute_force(pairs: list[tuple[Tensor, Tensor]], classes: int) -> dict:
    """Class by class over the pixels of all images, in float64."""
    predicted = np.concatenate([p.numpy().ravel() for p, _ in pairs])
    truth = np.concatenate([t.numpy().ravel() for _, t in pairs])
    predicted, truth = predicted[truth != 255], truth[truth != 255]
    iou, accuracy = [], []
    for label in range(classes):
        both = np.float64(((predicted == label) & (truth == label)).sum())
        either = np.float64(((predicted == label) | (truth == label)).sum())
        iou.append(float(both / either) if either else -1.0)
        if (truth == label).any():
            accuracy.append(float(both / np.float64((truth == label).sum())))
    known = [value for value in iou if value >= 0]
    return {
        "miou": sum(known) / len(known) if known else -1.0,
        "pixel_accuracy": float((predicted == truth).mean()) if len(truth) else -1.0,
        "mean_accuracy": sum(accuracy) / len(accuracy) if accuracy else -1.0,
        "iou": iou,
    }


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 10**6))
def test_figures_are_those_of_the_definition(classes: int, count: int, ignored: float, seed: int):
    pairs = images(seed, classes, count, ignored)
    found, expected = figures(pairs, classes), brute_force(pairs, classes)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    assert figures(pairs[::-1], classes) == found


def test_a_class_that_is_nowhere_does_not_count_and_one_that_is_only_predicted_does():
    truth = torch.tensor([[0, 0, 1, 1]])
    found = figures([(torch.tensor([[0, 0, 1, 3]]), truth)], 4)
    assert found["iou"] == [1.0, 0.5, -1.0, 0.0]
    assert found["miou"] == 0.5 and found["mean_accuracy"] == 0.75 and found["pixel_accuracy"] == 0.75


def test_the_data_set_is_judged_not_its_images():
    """The mean over images would be (1 + 1/3) / 2."""
    zero = torch.zeros(1, 1, dtype=torch.int64)
    pairs = [(zero, zero), (torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]]))]
    assert figures(pairs, 2)["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_ignored_pixels_and_nothing_at_all():
    truth = torch.tensor([[255, 255], [0, 1]], dtype=torch.uint8)
    found = figures([(torch.tensor([[1, 0], [0, 1]], dtype=torch.int32), truth)], 2)
    assert found["miou"] == found["pixel_accuracy"] == 1.0
    nothing = {"miou": -1.0, "pixel_accuracy": -1.0, "mean_accuracy": -1.0, "iou": [-1.0, -1.0]}
    assert SegmentationMetric(2).compute() == nothing
    assert figures([(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))], 2) == nothing
    metric = SegmentationMetric(2, ignore_index=-100)
    metric.update(torch.tensor([[0, 7]]), torch.tensor([[0, -100]]))  # what is predicted there does not matter
    assert metric.compute()["miou"] == 1.0


def test_reset_and_compute_leave_no_trace():
    metric = SegmentationMetric(2)
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[1, 1]]))
    assert metric.compute() == metric.compute()
    assert metric.matrix.dtype == torch.int64 and metric.matrix.tolist() == [[0, 0], [1, 1]]
    metric.reset()
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    assert metric.compute()["miou"] == 1.0
    json.dumps(metric.compute())


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        ([[0, 1]], [[0], [1]], r"predicted labels \(1, 2\) and true labels \(2, 1\) differ"),
        ([[0, 2]], [[0, 1]], "predicted label 2 is none of the 2 classes"),
        ([[0, -1]], [[0, 1]], "predicted label -1 is none of the 2 classes"),
        ([[0, 1]], [[0, 3]], "true label 3 is none of the 2 classes"),
        ([[0, 1]], [[0, -2]], "true label -2 is none of the 2 classes"),
    ],
)
def test_labels_that_do_not_fit_change_nothing(predicted: list, truth: list, message: str):
    metric = SegmentationMetric(2)
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    before = metric.compute()
    with pytest.raises(ConfigError, match=message):
        metric.update(torch.tensor(predicted), torch.tensor(truth))
    assert metric.compute() == before
    with pytest.raises(ConfigError, match="at least 1"):
        SegmentationMetric(0)


WORKER = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from sievit.tasks.metrics import SegmentationMetric

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
metric = SegmentationMetric(5)
for predicted, truth in torch.load(folder / "images.pt")[rank::2]:
    metric.update(predicted, truth)
first = metric.compute()
assert metric.compute() == first
(folder / f"{rank}.json").write_text(json.dumps(first))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_have_the_figures_of_one(tmp_path: Path):
    pairs = images(3, 5, count=7)
    torch.save(pairs, tmp_path / "images.pt")
    commands = [[sys.executable, "-c", WORKER, str(tmp_path), str(rank)] for rank in range(2)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=600)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors
    one = figures(pairs, 5)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [one, one]
