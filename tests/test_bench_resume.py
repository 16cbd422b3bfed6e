"""A bench that is stopped has lost nothing: its rows are in the file, and it goes on from there."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from rich.table import Table

from sievit.bench import BlocksBench, bench_blocks, timing
from sievit.bench.common import run
from sievit.bench.random_models import SIZES
from sievit.config import ConfigError
from sievit.measure.modes import RunMode
from sievit.vit import ViTConfig

QUIET = Console(quiet=True)
JOBS = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
MODES = ("dense", "dynamic", "static")


class Killed(BaseException):
    """As a signal is: nothing catches it."""


@dataclass(frozen=True, kw_only=True)
class FakeBench(BlocksBench):
    """A bench whose rows are made up."""

    name = "fake"

    models: tuple[str, ...] = ("a", "b")
    sizes: tuple[tuple[int, int], ...] = ((64, 64),)
    batches: tuple[int, ...] = (1, 2)
    repeats: int = 2
    measure: ClassVar[Callable[[str, int, str], dict[str, Any]]]

    def networks(self) -> dict[str, str]:
        return {name: name for name in self.models}

    def rows(self, network: str, size: Any, batch: int, place: Any, modes: Sequence[str]) -> Iterator[dict[str, Any]]:
        assert modes, "there is something to measure"
        for mode in modes:
            yield type(self).measure(network, batch, mode)

    def table(self, rows: list[dict[str, Any]]) -> Table:
        return Table()


class Fake:
    """Runs it; `measured` holds the rows that it made, in order."""

    def __init__(self, out: Path | None, *, stop_after: int | None = None, skipping: str | None = None) -> None:
        self.out, self.stop_after, self.skipping = out, stop_after, skipping
        self.measured: list[tuple[str, int, str]] = []

    def measure(self, model: str, batch: int, mode: str) -> dict[str, Any]:
        if len(self.measured) == self.stop_after:
            raise Killed
        self.measured.append((model, batch, mode))
        return row_of(mode, len(self.measured)) if mode != self.skipping else {"mode": mode, "skipped": "no"}

    def __call__(self, console: Console = QUIET, **changes: Any) -> dict[str, Any]:
        FakeBench.measure = self.measure
        return run(replace(FakeBench(out=self.out), **changes), console)


def row_of(mode: str, ms: float) -> dict[str, Any]:
    figures = {"mode": mode, "tokens": 16, "dense_ms": ms, "sparse_ms": ms, "speedup": 1.0, "predicted": 1.0}
    return figures | {"realised": 1.0, "realised_quartiles": [1.0, 1.0]}


def of_file(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "fake.json").read_text())["rows"]


def names(rows: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    return [(row["model"], row["batch"], row["mode"]) for row in rows]


EVERY = [(model, batch, mode) for model, batch in JOBS for mode in MODES]


@pytest.mark.parametrize("done", [0, 1, 4, 6, 11])
def test_a_killed_run_goes_on_where_it_was(done: int, tmp_path: Path) -> None:
    first, second = Fake(tmp_path, stop_after=done), Fake(tmp_path)
    with pytest.raises(Killed):
        first()
    assert names(of_file(tmp_path)) == EVERY[:done] == first.measured
    before = of_file(tmp_path)
    result = second(resume=True)
    assert second.measured == EVERY[done:], "nothing twice"
    assert result["rows"][:done] == before and names(result["rows"]) == EVERY
    assert of_file(tmp_path) == result["rows"] and (tmp_path / "fake.png").is_file()
    third = Fake(tmp_path)
    assert third(resume=True) == result and third.measured == []


def test_the_file_is_whole_after_each_row(tmp_path: Path) -> None:
    for done in range(len(EVERY)):
        with pytest.raises(Killed):
            Fake(tmp_path, stop_after=done)()
        assert names(of_file(tmp_path)) == EVERY[:done], "and nothing of the run before"
    assert [path.name for path in tmp_path.iterdir()] == ["fake.json"], "no parts of files"


def test_it_says_what_is_kept(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Fake(tmp_path, stop_after=4)()
    with (tmp_path / "said").open("w") as said:
        Fake(tmp_path)(Console(file=said, width=400), resume=True)
    assert f"rows kept from {tmp_path / 'fake.json'}: 4" in (tmp_path / "said").read_text()


def test_without_resume_everything_is_measured_again(tmp_path: Path) -> None:
    Fake(tmp_path)()
    again = Fake(tmp_path)
    again()
    assert again.measured == EVERY and names(of_file(tmp_path)) == EVERY


def test_rows_that_were_skipped_are_tried_again_and_others_are_added(tmp_path: Path) -> None:
    Fake(tmp_path, skipping="dynamic")(models=("a",))
    assert [row["mode"] for row in of_file(tmp_path) if "skipped" in row] == ["dynamic"] * 2
    second = Fake(tmp_path)
    rows = second(resume=True, batches=(1,), precision="float32")["rows"]
    assert second.measured == [("a", 1, "dynamic"), *(("b", 1, mode) for mode in MODES)]
    assert [row[:2] for row in names(rows)] == [("a", 1)] * 3 + [("a", 2)] * 2 + [("b", 1)] * 3, "groups stay together"
    third = Fake(tmp_path)
    third(resume=True, batches=(1,), models=("a",), precision="bfloat16")
    assert third.measured == [("a", 1, mode) for mode in MODES], "the precision is a row's own"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"repeats": 3}, "repeats 2, not 3"),
        ({"targets": (0.5,)}, r"targets \[0.7, 0.49, 0.343\], not \[0.5\]"),
        ({"multiple": 16}, "multiple 8, not 16"),
    ],
)
def test_rows_of_other_settings_are_not_mixed_in(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    Fake(tmp_path)()
    before = (tmp_path / "fake.json").read_bytes()
    with pytest.raises(ConfigError, match=rf"fake\.json: its rows have {said}; leave out --resume"):
        Fake(tmp_path)(resume=True, **changes)
    assert (tmp_path / "fake.json").read_bytes() == before


def test_rows_of_another_torch_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fake(tmp_path)()
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(ConfigError, match=r"torch .*, not 9\.9"):
        Fake(tmp_path)(resume=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [1'])
def test_what_is_no_file_of_a_bench_is_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "fake.json").write_text(text)
    with pytest.raises(ConfigError, match=r"fake\.json: is not the file of a bench"):
        Fake(tmp_path)(resume=True)
    assert (tmp_path / "fake.json").read_text() == text


def test_a_wrong_option_does_not_cost_the_file(tmp_path: Path) -> None:
    Fake(tmp_path)()
    before = (tmp_path / "fake.json").read_bytes()
    wrong: list[dict[str, Any]] = [
        {"repeats": 1},
        {"modes": ("dens",)},
        {"images": tmp_path / "none"},
        {"precision": "float"},
    ]
    for changes in wrong:
        with pytest.raises(ConfigError):
            Fake(tmp_path)(**changes)
    assert (tmp_path / "fake.json").read_bytes() == before
    with pytest.raises(ConfigError, match="--out; say which folder"):
        Fake(None)(resume=True)


def test_a_bench_loses_no_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mode that is measured stands in the file before the next one begins."""
    monkeypatch.setitem(SIZES, "tiny", ViTConfig(grid=(4, 4), embed_dim=32, depth=6, num_heads=2))
    config = BlocksBench(models=("tiny",), sizes=((64, 64),), batches=(8,), repeats=2, out=tmp_path)
    measure, calls = timing._time_mode, []

    def stopped(timed: Any, mode: RunMode, *args: Any) -> dict[str, Any]:
        calls.append(mode.name)
        if len(calls) == 2:
            raise Killed
        return measure(timed, mode, *args)

    monkeypatch.setattr(timing, "_time_mode", stopped)
    with pytest.raises(Killed):
        bench_blocks(config, QUIET)
    (dense,) = json.loads((tmp_path / "blocks.json").read_text())["rows"]
    rows = bench_blocks(replace(config, resume=True), QUIET)["rows"]
    assert calls == ["dense", "dynamic", "dynamic", "static"]
    assert rows[0] == dense and [row["mode"] for row in rows] == list(MODES) and rows[1]["batch"] == 8
