"""Figures of a model on a data set, and two models against each other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sievit.config import ConfigError
from sievit.data.coco import CocoDetection
from sievit.engine import evaluate as engine
from sievit.engine.evaluate import compare, evaluate, timed
from sievit.models.build import build
from sievit.models.detector import Detector
from sievit.policies import KeepAllConfig, PolicyConfig, TopNormConfig
from sievit.tasks.metrics import CocoMetric
from tiny import refused, tiny_detector, tiny_head


def tiny(policy: PolicyConfig, **changes: Any) -> Detector:
    torch.manual_seed(0)
    return build(tiny_detector(policy=policy, head=tiny_head(**changes)))


@pytest.fixture(scope="module")
def dense() -> Detector:
    return tiny(KeepAllConfig())


@pytest.fixture(scope="module")
def sparse() -> Detector:
    return tiny(TopNormConfig(first_block=1, shares=(0.5,)))


@pytest.fixture(scope="module")
def root(scenes_of: Callable[..., Path]) -> Path:
    return scenes_of(5, (64, 96), seed=3)


@pytest.fixture(scope="module")
def scenes(root: Path) -> CocoDetection:
    return CocoDetection(root / "images", root / "annotations.json", with_masks=False)


def test_figures_are_those_of_the_parts(sparse: Detector, scenes: CocoDetection):
    sparse.train()
    figures = evaluate(sparse, scenes)
    assert sparse.training, "the mode is put back"
    sparse.eval()
    metric, gflops, shares, tokens = CocoMetric(scenes.annotations), [], [], []
    for image, target in (scenes[i] for i in range(len(scenes))):
        with torch.inference_mode():
            output = sparse([image])
        metric.update(target["image_id"], output.detections[0])
        gflops.append(sparse.gflops(output))
        shares.append(output.trace.shares())
        tokens.append(output.trace.counts())
    assert figures["images"] == 5
    assert {name: figures[name] for name in metric.compute()} == pytest.approx(metric.compute(), abs=1e-5)
    assert figures["keep"] == pytest.approx(torch.cat(shares, 1).mean(1).tolist(), abs=1e-4)
    assert figures["tokens"] == pytest.approx(torch.cat(tokens, 1).double().mean(1).tolist(), abs=0.06)
    assert figures["keep"][-1] < 1
    assert figures["gflops"] == pytest.approx(float(torch.cat(gflops).mean()), abs=1e-3)
    assert figures["gflops_std"] == pytest.approx(float(torch.cat(gflops).std(unbiased=False)), abs=1e-3)
    assert 0 < figures["ms_per_image"] <= figures["ms_per_image_p95"]
    sizes = ("", "50", "75", "_small", "_medium", "_large")
    assert {f"{kind}_ap{size}" for kind in ("box", "mask") for size in sizes} <= figures.keys()
    json.dumps(figures)


def test_batches_and_workers_change_no_figure(dense: Detector, scenes: CocoDetection):
    alone = evaluate(dense, scenes)
    together = evaluate(dense, scenes, batch_size=2, workers=1, console=Console(quiet=True))
    for name in alone:
        if not name.startswith("ms_"):
            assert together[name] == pytest.approx(alone[name], abs=1e-4), name


def test_the_first_so_many_and_a_model_without_masks(dense: Detector, scenes: CocoDetection):
    assert evaluate(dense, scenes, limit=2)["images"] == 2
    assert evaluate(dense, scenes, limit=200)["images"] == 5
    refused("no image to evaluate on", evaluate, dense, scenes, limit=0)

    figures = evaluate(tiny(KeepAllConfig(), with_masks=False), scenes, limit=1)
    assert "box_ap" in figures
    assert "mask_ap" not in figures


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(dense: Detector, root: Path, workers: int, tmp_path: Path):
    (tmp_path / "images").mkdir()
    for path in (root / "images").iterdir():
        data = path.read_bytes()
        (tmp_path / "images" / path.name).write_bytes(data[: len(data) // 2] if path.name == "000003.png" else data)
    broken = CocoDetection(tmp_path / "images", root / "annotations.json", with_masks=False)
    with pytest.raises(ConfigError, match=r"000003\.png") as failed:
        evaluate(dense, broken, workers=workers)
    assert "Traceback" not in str(failed.value)
    refused(r"000003\.png", compare, dense, dense, broken)


def test_two_models_take_turns_on_the_same_images(
    dense: Detector, sparse: Detector, scenes: CocoDetection, monkeypatch: pytest.MonkeyPatch
):
    calls: list[tuple[bool, int]] = []

    def recorded(model: Detector, images: list, *, precision: str) -> tuple:
        output, _ = timed(model, images, precision=precision)
        calls.append((model is dense, int(1e6 * float(images[0].mean()))))
        return output, (6.0 if model is dense else 4.0) + len(calls) % 2

    monkeypatch.setattr(engine, "timed", recorded)
    figures = compare(dense, sparse, scenes, limit=4)
    assert calls[:2] == [(True, calls[0][1]), (False, calls[0][1])], "both are warmed up on the first image"
    pairs = [calls[i : i + 2] for i in range(2, len(calls), 2)]
    assert [pair[0][0] for pair in pairs] == [True, False, True, False]
    assert all(pair[0][1] == pair[1][1] and pair[0][0] != pair[1][0] for pair in pairs)
    assert len({pair[0][1] for pair in pairs}) == 4
    assert figures["speedup"] == pytest.approx((7 / 4 + 6 / 5) / 2, abs=1e-3)
    assert len(figures["speedup_quartiles"]) == 2
    assert figures["dense"]["keep"] == [1.0] * 4
    assert figures["sparse"]["gflops"] < figures["dense"]["gflops"]
    plain = evaluate(dense, scenes, limit=4)
    assert {k: v for k, v in plain.items() if "ms_" not in k} == {
        k: v for k, v in figures["dense"].items() if "ms_" not in k
    }


def test_mixed_precision_is_near(dense: Detector, scenes: CocoDetection):
    image = scenes[0][0]
    full, _ = timed(dense.eval(), [image])
    mixed, _ = timed(dense.eval(), [image], precision="bf16-mixed")
    assert len(mixed.detections[0]["boxes"]) == len(full.detections[0]["boxes"]) == 5
