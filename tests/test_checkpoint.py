"""The files of a run."""

import errno
import os
from pathlib import Path

import pytest
import torch

from sievit.config import ConfigError
from sievit.engine.checkpoint import CsvLog, RunFolder, read_log, write_json
from sievit.files import write_atomically
from sievit.recipes import recipe


def test_a_log_grows_by_rows_and_by_columns(tmp_path: Path):
    path = tmp_path / "log.csv"
    log = CsvLog(path, step=0)
    assert read_log(path) == []
    log.write({"step": 2, "loss": 0.123456789})
    log.write({"step": 4, "loss": 2.0, "keep_3": 0.7})
    log.write({"step": 6, "loss": 1e-9})
    expected = [
        {"step": "2", "loss": "0.123457"},
        {"step": "4", "loss": "2", "keep_3": "0.7"},
        {"step": "6", "loss": "1e-09"},
    ]
    assert read_log(path) == expected
    assert path.read_text().splitlines()[0] == "step,loss,keep_3"
    resumed = CsvLog(path, step=4)
    assert read_log(path) == expected[:2]
    resumed.write({"step": 5, "loss": 3.0})
    assert [row["step"] for row in read_log(path)] == ["2", "4", "5"]


def test_a_row_cut_short_by_a_kill_is_forgotten(tmp_path: Path):
    path = tmp_path / "log.csv"
    log = CsvLog(path, step=0)
    for step in (10, 20, 120):
        log.write({"step": step, "loss": 1.5})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"120") + 1])  # what is left of 120 reads as 1
    CsvLog(path, step=100)
    assert [row["step"] for row in read_log(path)] == ["10", "20"]


def test_a_state_comes_back(tmp_path: Path):
    folder = RunFolder(tmp_path)
    assert folder.load_state() is None
    state = {
        "model": {"a": torch.rand(3)},
        "step": 5,
        "best": -float("inf"),
        "random": [{"cpu": torch.get_rng_state()}],
    }
    folder.save_state(state)
    loaded = folder.load_state()
    assert loaded is not None
    assert torch.equal(loaded["model"]["a"], state["model"]["a"])
    assert (loaded["step"], loaded["best"]) == (5, -float("inf"))


def test_nothing_is_unpickled(tmp_path: Path):
    torch.save({"step": Path("anything")}, tmp_path / "state.pt")
    with pytest.raises(ConfigError, match=r"state\.pt: damaged"):
        RunFolder(tmp_path).load_state()


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if at == "fsync":
            patched.setattr(os, "fsync", full)
        elif at == "replace":
            patched.setattr(Path, "replace", full)
        else:
            patched.setattr(Path, "open", full)
        with pytest.raises(OSError, match=r"No space left on device, and nothing was changed.*file") as failed:
            write_atomically(path, b"new")
    assert failed.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_device_that_is_really_full(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    (tmp_path / f".file.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    (tmp_path / ".state.pt.123.part").write_bytes(b"half")
    write_json(tmp_path / "metrics.json", {"box_ap": 0.5})
    folder = RunFolder(tmp_path)
    folder.remove_parts()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert folder.metrics() == {"box_ap": 0.5}


def test_a_folder_holds_one_run(tmp_path: Path):
    folder = RunFolder(tmp_path / "a" / "run")
    folder.start(recipe("nuclei_vit"))
    assert folder.recipe() == recipe("nuclei_vit")
    with pytest.raises(ConfigError, match="holds a run already"):
        folder.start(recipe("nuclei_vit"))
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        RunFolder(tmp_path).recipe()
    folder.recipe_file.write_text('{"model": {}, "train": {}')
    with pytest.raises(ConfigError, match=r"recipe\.json: cannot be read as JSON"):
        folder.recipe()
