"""What tests share: the data and golden files that may lie beside the repository, and quiet, repeatable computing."""

import dataclasses
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tiny tensors a second thread only makes the first wait

import jaxtyping
import pytest
import torch

CHECKED = (
    "tokens",
    "policies",
    "heads.semantic",
    "heads.atm",
    "heads.setr",
    "vit.executor",
    "vit.loop",
    "vit.packed",
    "vit.projections",
)
"""The modules of which every call of a function that states shapes is checked."""


def _checked(typechecker: Callable[..., Any], decorate: Callable[..., Any] = jaxtyping.jaxtyped) -> Callable[..., Any]:
    """As `jaxtyping.jaxtyped`, but not where torch compiles or exports the function, which would compile the checks."""

    def mark(function: Any) -> Any:
        if inspect.isclass(function):
            if dataclasses.is_dataclass(function):
                function.__init__ = mark(function.__init__)
            return function
        if "<locals>" in function.__qualname__ or "jaxtyping" not in str(function.__annotations__):
            return function
        checked = decorate(function, typechecker=typechecker)

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return (function if torch.compiler.is_compiling() else checked)(*args, **options)

        return call

    return mark


jaxtyping.jaxtyped = _checked  # ty: ignore[invalid-assignment]  # the hook looks it up there
jaxtyping.install_import_hook(
    [f"sievit.{name}" for name in CHECKED], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

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


@pytest.fixture(scope="session")
def golden_svit(golden_root: Path) -> Path:
    return golden_root / "svit"


@pytest.fixture(scope="session")
def golden_dtop(golden_root: Path) -> Path:
    return golden_root / "dtop"


@pytest.fixture(scope="session")
def scenes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder of so many generated scenes of this (height, width): images, labels, annotations.json; with `val` more
    for validation, folders train and val of these. To be read only."""

    @functools.cache
    def make(number: int, size: tuple[int, int], seed: int = 1, val: int = 0) -> Path:
        from sievit.data.scenes import generate

        root = tmp_path_factory.mktemp("scenes")
        generate(root / "train" if val else root, num_images=number, size=size, seed=seed)
        if val:
            generate(root / "val", num_images=val, size=size, seed=seed + 1)
        return root

    return make


@dataclasses.dataclass(frozen=True)
class Printed:
    """What a command wrote."""

    out: str
    err: str

    @property
    def figures(self) -> dict[str, Any]:
        """The JSON object that every command ends with."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Runs `sievit` with these arguments, which has to end with this status."""
    from sievit import cli

    def run(*args: object, status: int = 0) -> Printed:
        capsys.readouterr()
        ended = cli.main([str(arg) for arg in args])
        printed = Printed(*capsys.readouterr())
        assert ended == status, printed.err
        return printed

    return run


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
