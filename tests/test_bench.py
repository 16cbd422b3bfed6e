"""The bench keeps the shares it was told to, on the pictures it was given, and reports what it timed."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import sievit
from sievit.bench import (
    BackboneBench,
    BlocksBench,
    HeadsBench,
    NetworkBench,
    bench_backbone,
    bench_blocks,
    bench_heads,
    bench_network,
)
from sievit.bench.backbone import ADAPTERS
from sievit.bench.blocks import calibrated
from sievit.bench.common import SIZES, load_images, load_pictures, peak_mb
from sievit.bench.heads import parts_of, stopwatch
from sievit.bench.network import SEGMENTERS, calibrated_exits, dense_policy, random_segmenter, time_model
from sievit.config import ConfigError
from sievit.detector import Detector, DetectorConfig
from sievit.flops import model_gflops
from sievit.heads import ATMConfig, MaskRCNNConfig, build_head
from sievit.inputs import InputConfig
from sievit.necks.adapter import AdapterConfig
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import DToPConfig, KeepAllConfig, RandomConfig
from sievit.tokens import Trace
from sievit.vit import ViTConfig

TINY = ViTConfig(grid=(4, 4), embed_dim=32, depth=6, num_heads=2)


@torch.inference_mode()
def test_calibrated_gates_keep_their_share_of_these_pictures() -> None:
    pictures = load_pictures(None, (96, 128), 4)
    vit, (_, sparse) = calibrated(TINY, pictures, (0.7, 0.3))
    traces = [vit.run_blocks(tokens, sparse, Trace.start(tokens))[1] for tokens in map(vit.embed, pictures.split(1))]
    shares = torch.stack([trace.shares()[:, 0] for trace in traces]).mean(0)
    assert shares[:3].tolist() == [1.0, 1.0, 1.0]
    assert shares[3:].tolist() == pytest.approx([sparse.targets[i] for i in range(3)], abs=0.03)


def test_a_row_holds_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", TINY)
    config = BlocksBench(models=("tiny",), sizes=((64, 96),), batches=(2,), repeats=3)
    result = bench_blocks(config, Console(quiet=True))
    (row,) = result["rows"]
    assert row["tokens"] == 24 and row["batch"] == 2 and row["pairs"] == 3
    assert row["dense_ms"] > 0 and row["sparse_ms"] > 0
    assert row["predicted"] > 1.1, "fewer tokens cost less"
    assert len(row["keep"]) == 6


def test_pictures_of_a_folder_are_fitted(tmp_path: Path) -> None:
    for i, shape in enumerate([(40, 90, 3), (200, 60, 3)]):
        Image.fromarray(np.full(shape, 40 * (i + 1), np.uint8)).save(tmp_path / f"{i}.png")
    pictures = load_pictures(tmp_path, (64, 96), 3)
    assert pictures.shape == (3, 3, 64, 96)
    torch.testing.assert_close(pictures[0], pictures[2])
    assert not torch.equal(pictures[0], pictures[1])


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vit_s'"):
        bench_blocks(BlocksBench(models=("vits",)))


HEAD = ATMConfig(channels=32, num_heads=4)


@torch.inference_mode()
def test_exits_are_set_to_the_shares_that_really_leave() -> None:
    pictures = load_pictures(None, (256, 320), 4)
    segmenter = random_segmenter(TINY, HEAD, (1, 3, 5)).eval()
    policy = calibrated_exits(segmenter, pictures, (0.35, 0.55), 2)
    traces = [segmenter.net(picture[None], policy=policy)[1] for picture in pictures]
    left = torch.stack([torch.stack([exited.double().mean() for exited in trace.exited]) for trace in traces])
    assert left.mean(0).tolist() == pytest.approx([0.35, 0.55, 0.55], abs=0.02)
    assert left[:, 0].std() > 0.01, "each image has its own"


@torch.inference_mode()
def test_a_row_of_a_network_holds_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setitem(SEGMENTERS, "tiny", (HEAD, (1, 3, 5)))
    config = NetworkBench(models=("tiny",), sizes=((256, 320),), batches=(2,), repeats=3, keep_per_class=1)
    (row,) = bench_network(config, Console(quiet=True))["rows"]
    assert row["tokens"] == 320 and row["batch"] == 2 and row["pairs"] == 3
    assert row["dense_ms_p95"] >= row["dense_ms"] > 0 and row["sparse_ms_p95"] >= row["sparse_ms"] > 0
    assert row["left"] == pytest.approx([0.35, 0.55], abs=0.05)
    assert row["realised"] == pytest.approx(row["speedup"] / row["predicted"], rel=0.3)
    heads = 2 * build_head(HEAD, embed_dim=32, num_classes=150).macs(torch.tensor([320]), (16, 20)).item() / 1e9
    extra = (row["predicted_with_heads"] - row["predicted"]) * row["gflops"][1]
    assert extra == pytest.approx(heads, rel=0.05)


@pytest.mark.parametrize("left", [(0.5,), (0.6, 0.5), (0.0, 0.5), (0.5, 1.0)])
def test_shares_that_leave_go_with_the_heads(left: tuple[float, ...]) -> None:
    segmenter = random_segmenter(TINY, HEAD, (1, 3, 5)).eval()
    with pytest.raises(ConfigError, match="left"):
        calibrated_exits(segmenter, torch.zeros(1, 3, 64, 64), left, 2)


@torch.inference_mode()
def test_exits_do_not_change_how_scores_lie_in_memory() -> None:
    """Resizing maps that lie token by token takes ten times as long."""
    segmenter = random_segmenter(TINY, HEAD, (1, 3, 5)).eval()
    policy = segmenter.net.build_policy(DToPConfig(thresholds=(0.3,), keep_per_class=0))
    scores, trace = segmenter.net(load_pictures(None, (64, 96), 1), policy=policy)
    assert trace.exited[-1].sum() > 0
    assert scores.is_contiguous()


def test_one_pair_is_too_few() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        bench_network(NetworkBench(repeats=1))


def tiny_detector(*, with_masks: bool = True) -> Detector:
    config = DetectorConfig(
        vit=replace(TINY, depth=4),
        neck=PyramidConfig(out_channels=16),
        policy=RandomConfig(first_block=1, shares=(0.5,)),
        head=MaskRCNNConfig(
            num_classes=2, with_masks=with_masks, fpn_channels=16, box_fc=32, mask_convs=(16,), mask_deconv=16
        ),
        input=InputConfig(min_size=64, max_size=96),
        classes=("ball", "box"),
        category_ids=(1, 2),
    )
    return sievit.build(config).eval()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of images of several sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, shape in enumerate([(128, 160, 3), (128, 192, 3), (96, 96, 3)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, shape, np.uint8)).save(folder / f"{i}.png")
    return folder


def test_a_trained_model_is_timed_by_its_own_rules(tmp_path: Path, pictures: Path) -> None:
    detector = tiny_detector(with_masks=False)  # what the mask branch costs depends on what is found
    detector.save_pretrained(tmp_path / "balls")
    segmenter = random_segmenter(TINY, HEAD, (1, 3, 5))
    segmenter.config = replace(segmenter.config, input=InputConfig(min_size=64, max_size=96))
    sievit.save(segmenter, tmp_path / "dense.safetensors")
    config = NetworkBench(
        checkpoints=(tmp_path / "balls", tmp_path / "dense.safetensors"),
        policy="random",
        images=pictures,
        batches=(3,),
        repeats=2,
    )
    rows = bench_network(config, Console(quiet=True))["rows"]
    assert [row["model"] for row in rows] == ["balls", "dense"]
    for row in rows:
        assert row["size"] == "own" and row["mode"] == "dynamic" and row["pairs"] == 2 and row["policy"] == "random"
        assert row["tokens"] == round((4 * 5 + 4 * 6 + 4 * 4) / 3), "64x80, 64x96 and 64x64 pixels"
        assert row["dense_ms"] > 0 and row["sparse_ms"] > 0 and min(row["memory_mb"]) > 0
        assert row["gflops"][0] > row["gflops"][1] > 0 and row["predicted"] > 1
        assert row["realised"] == pytest.approx(row["speedup"] / row["predicted"], rel=0.5)
    assert rows[0]["kind"] == "detector" and "detections" in rows[0] and rows[1]["kind"] == "segmenter"
    (row,) = bench_network(
        replace(config, checkpoints=(tmp_path / "balls",), sizes=((128, 96),), batches=(2,)), Console(quiet=True)
    )["rows"]
    assert row["size"] == [128, 96] and row["tokens"] == 8 * 6


@torch.inference_mode()
def test_gflops_and_shares_of_a_row_are_the_model_s(pictures: Path) -> None:
    detector = tiny_detector(with_masks=False)
    images = load_images(pictures, None, 3)
    figures = time_model(detector, [[image] for image in images])
    dense = [model_gflops(detector, detector([i], policy=dense_policy(detector))).item() for i in images]
    assert figures["gflops"][0] == pytest.approx(sum(dense) / 3, abs=0.0001)
    assert figures["keep"][0] == 1.0 and figures["keep"][1:] == pytest.approx([0.5] * 3, abs=0.03)


def test_thresholds_make_a_dense_segmenter_sparse(tmp_path: Path) -> None:
    path = tmp_path / "dense.safetensors"
    sievit.save(random_segmenter(TINY, HEAD, (1, 3, 5)), path)
    config = NetworkBench(checkpoints=(path,), thresholds=(0.3,), sizes=((64, 96),), batches=(1,), repeats=2)
    (row,) = bench_network(config, Console(quiet=True))["rows"]
    assert row["policy"] == "dtop" and row["keep"][-1] < 1
    with pytest.raises(ConfigError, match=r"dense\.safetensors: its policy computes every token"):
        bench_network(replace(config, thresholds=None))
    with pytest.raises(ConfigError, match="not of 'random'"):
        bench_network(replace(config, policy="random"))
    with pytest.raises(ConfigError, match="give --checkpoints"):
        bench_network(replace(config, checkpoints=()))


def test_memory_is_what_is_held_at_once() -> None:
    device = torch.device("cpu")
    one = peak_mb(lambda: torch.zeros(500, 500).sum(), device)
    assert one == pytest.approx(1.0, abs=0.1)
    in_turn = peak_mb(lambda: [torch.zeros(500, 500).sum() for _ in range(5)], device)
    assert in_turn == pytest.approx(one, abs=0.1)
    together = peak_mb(lambda: torch.stack([torch.zeros(500, 500) for _ in range(5)]), device)
    assert together == pytest.approx(10.0, abs=0.2)


def test_the_stopwatch_counts_each_moment_once() -> None:
    class Work:
        def outer(self) -> int:
            time.sleep(0.02)
            return self.inner() + self.inner()

        def inner(self) -> int:
            time.sleep(0.03)
            return 1

    work = Work()
    with stopwatch([(work, "outer", "a"), (work, "inner", "b")], torch.device("cpu")) as spent:
        start = time.perf_counter()
        assert work.outer() == 2
        elapsed = (time.perf_counter() - start) * 1e3
    assert spent["a"] >= 20 and spent["b"] >= 60
    assert sum(spent.values()) <= elapsed
    assert not vars(work), "nothing is left on what was timed"


def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", replace(TINY, depth=8))
    monkeypatch.setitem(ADAPTERS, "tiny", AdapterConfig(conv_inplane=8, deform_num_heads=2))


def test_a_row_of_a_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_names(monkeypatch)
    config = BackboneBench(models=("tiny",), sizes=((64, 90),), batches=(2,), repeats=2, targets=(0.5,))
    (row,) = bench_backbone(config, Console(quiet=True))["rows"]
    assert row["tokens"] == 24, "sides are whole multiples of 32"
    assert row["keep"][:3] == [1.0] * 3 and row["keep"][3:] == pytest.approx([0.5] * 5, abs=0.15)
    assert row["predicted"] > 1 and row["gflops"][0] > row["gflops"][1] and min(row["memory_mb"]) > 0


def test_the_parts_of_a_detector_are_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_names(monkeypatch)
    monkeypatch.setattr("sievit.bench.heads.HEAD", tiny_detector().config.head)
    config = HeadsBench(models=("tiny",), sizes=((96, 128),), repeats=2, targets=(0.5,), candidates=40)
    (row,) = bench_heads(config, Console(quiet=True))["rows"]
    assert row["detections"] > 0
    parts: dict[str, dict[str, Any]] = row["parts"]
    assert all(part["dense_ms"] > 0 and part["sparse_ms"] > 0 for name, part in parts.items() if name != "neck: rest")
    assert parts["neck"]["dense_ms"] == pytest.approx(
        sum(part["dense_ms"] for name, part in parts.items() if name.startswith("neck: ")), abs=0.05
    )
    assert parts["blocks, gates"]["dense_gflops"] > parts["blocks, gates"]["sparse_gflops"]
    assert parts["FPN"]["dense_gflops"] == parts["FPN"]["sparse_gflops"] > 0


def test_the_parts_of_a_trained_detector(tmp_path: Path) -> None:
    detector = tiny_detector()
    detector.save_pretrained(tmp_path / "balls")
    config = HeadsBench(checkpoints=(tmp_path / "balls",), sizes=((64, 96),), batches=(2,), repeats=2)
    (row,) = bench_heads(config, Console(quiet=True))["rows"]
    assert row["tokens"] == 24 and "neck: pyramid" in row["parts"] and "neck: injectors" not in row["parts"]
    before = [dict(vars(owner)) for owner, _, _ in parts_of(detector)]
    with stopwatch(parts_of(detector), torch.device("cpu")) as spent, torch.inference_mode():
        detector([torch.rand(3, 64, 96)])
    assert spent["FPN"] > 0 and [dict(vars(owner)) for owner, _, _ in parts_of(detector)] == before
    detector.config = replace(detector.config, policy=KeepAllConfig())
    sievit.save(detector, tmp_path / "dense.safetensors")
    with pytest.raises(ConfigError, match="computes every token"):
        bench_heads(replace(config, checkpoints=(tmp_path / "dense.safetensors",)))
    segmenter = random_segmenter(TINY, HEAD, (1, 3, 5))
    sievit.save(segmenter, tmp_path / "s.safetensors")
    with pytest.raises(ConfigError, match=r"s\.safetensors: is a segmenter"):
        bench_heads(replace(config, checkpoints=(tmp_path / "s.safetensors",), policy="random"))
