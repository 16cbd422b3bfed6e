"""What tests share: the data and golden files that may lie beside the repository, and quiet, repeatable computing."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tiny tensors a second thread only makes the first wait

import pytest
import torch

ROOT = Path(__file__).parents[1]


def _beside(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / ".." / "shared" / default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set {variable}")
    return folder


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that ask for it are skipped where it is not."""
    return _beside("SIEVIT_DATA", "data")


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """The folder of the papers' recorded tensors; tests that ask for it are skipped where it is not."""
    return _beside("SIEVIT_GOLDEN", "golden")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state, and leaves the caller's as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, saying so, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
