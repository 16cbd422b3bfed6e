"""The bench keeps the shares it was told to, on the pictures it was given, and reports what it timed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from sievit import bench
from sievit.bench import (
    BlocksBench,
    NetworkBench,
    bench_blocks,
    bench_network,
    calibrated,
    calibrated_exits,
    load_pictures,
    random_segmenter,
)
from sievit.config import ConfigError
from sievit.heads import ATMConfig, build_head
from sievit.policies import DToPConfig
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
    monkeypatch.setitem(bench.SIZES, "tiny", TINY)
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
    monkeypatch.setitem(bench.SIZES, "tiny", TINY)
    monkeypatch.setitem(bench.SEGMENTERS, "tiny", (HEAD, (1, 3, 5)))
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
