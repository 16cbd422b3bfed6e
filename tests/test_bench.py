"""The bench keeps the shares it was told to, on the pictures it was given, and reports what it timed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from sievit import bench
from sievit.bench import BlocksBench, bench_blocks, calibrated, load_pictures
from sievit.config import ConfigError
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
