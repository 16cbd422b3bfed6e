"""The class for Ray Data: without Ray, and on a local cluster of which an actor is killed."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sievit
from sievit.data.masks import decode
from sievit.ray import Predictor
from tiny import image_folder, random_pixels, refused, saved, tiny_detector, tiny_segmenter

SIZES = [(40, 60), (64, 48), (40, 60), (50, 30), (40, 61), (64, 48)]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_detector(), tmp_path_factory.mktemp("model") / "detector.safetensors")


def test_columns_are_what_the_model_finds(detector: Path, tmp_path: Path):
    arrays = np.empty(3, dtype=object)
    arrays[:] = [random_pixels(0, 40, 60, 3), random_pixels(1, 64, 48), random_pixels(2, 8, 8, 5)]
    found = Predictor(detector, batch_size=2)({"image": arrays, "id": np.arange(3)})
    assert found.keys() == {"id", "height", "width", "error", "boxes", "labels", "scores", "masks"}
    assert found["height"].tolist() == [40, 64, 0] and found["width"].tolist() == [60, 48, 0]
    assert list(found["error"][:2]) == ["", ""] and "(h, w, 3)" in found["error"][2]
    assert found["boxes"][2].shape == (0, 4) and found["masks"][2] == "[]"
    for place, result in enumerate(sievit.load(detector).predict(list(arrays[:2]))):
        for name in ("boxes", "labels", "scores"):
            assert np.allclose(found[name][place], result[name].numpy(), atol=1e-3), name
        masks = [decode(rle, (40, 60) if place == 0 else (64, 48)) for rle in json.loads(found["masks"][place])]
        assert [mask.bits.sum() for mask in masks] == (result["masks"] > 0.5).sum((1, 2, 3)).tolist()


def test_files_and_paths_of_a_segmenter(tmp_path: Path):
    model = saved(tiny_segmenter(), tmp_path / "segmenter.safetensors")
    photos = image_folder(tmp_path / "photos", (24, 32), (32, 24))
    paths = [str(photos / name) for name in ("0.png", "gone.png", "1.png")]
    content = [b"no image" if "gone" in path else Path(path).read_bytes() for path in paths]
    predictor = Predictor(model)
    by_path, by_bytes = predictor({"path": paths}), predictor({"bytes": content, "path": paths})
    assert "no such image" in by_path["error"][1] and "gone.png: cannot be read" in by_bytes["error"][1]
    for found in (by_path, by_bytes):
        assert list(found["path"]) == paths and "bytes" not in found and found["label_map"][1] == b""
        for place, labels in zip((0, 2), sievit.load(model).predict([paths[0], paths[2]]), strict=True):
            read = np.asarray(Image.open(BytesIO(found["label_map"][place])))
            assert np.array_equal(read, labels)
    refused("column 'image': there are id", predictor, {"id": [1]})
    refused("batch_size", Predictor, model, batch_size=0)


class Killed(Predictor):
    """Dies with its process, without a word, at one of the batches in the middle, once."""

    def __init__(self, model: str, killed: str) -> None:
        super().__init__(model)
        self.killed = Path(killed)

    def __call__(self, batch: Any) -> Any:
        if any(path.endswith("/9.png") for path in batch["path"]) and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def job(detector: str, folder: str) -> None:
    """What a process of its own does: a job on a local cluster, whose rows it leaves in a file."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_binary_files(f"{folder}/photos", include_paths=True).map_batches(
        Killed,
        fn_constructor_args=(detector, f"{folder}/killed"),
        batch_size=4,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    Path(folder, "rows").write_bytes(pickle.dumps(rows.take_all()))
    ray.shutdown()


@pytest.mark.slow
def test_an_actor_that_is_killed_loses_nothing(detector: Path, tmp_path: Path):
    """The rows of a local cluster are those of one process; none is lost, and none is there twice."""
    pytest.importorskip("ray")
    photos = image_folder(tmp_path / "photos", *SIZES * 3)
    (photos / "7.png").write_bytes(b"no image")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(detector), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    paths = sorted(str(path) for path in photos.iterdir())
    rows = sorted(pickle.loads((tmp_path / "rows").read_bytes()), key=lambda row: row["path"])
    assert [row["path"] for row in rows] == paths
    alone = Predictor(detector)({"path": paths})
    for place, row in enumerate(rows):
        assert row.keys() == alone.keys()
        for name, value in row.items():
            assert name == "error" or np.array_equal(value, alone[name][place]), (row["path"], name)
        assert bool(row["error"]) == row["path"].endswith("/7.png") == bool(alone["error"][place])


if __name__ == "__main__":
    job(*sys.argv[1:])
