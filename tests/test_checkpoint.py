"""The files of a run."""

import errno
import os
import zlib
from pathlib import Path

import pytest
import torch

from sievit.engine.checkpoint import CsvLog, RunFolder, read_log
from sievit.files import remove_parts, write_atomically, write_json
from sievit.models.build import build, save
from sievit.recipes import recipe
from tiny import refused, tiny_segmenter


def test_a_log_grows_by_rows_and_columns_and_forgets_a_row_cut_short(tmp_path: Path):
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

    path = tmp_path / "cut.csv"
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


@pytest.mark.parametrize("content", [{"step": Path("anything")}, {"step": 1, "weights": torch.rand(1000)}])
def test_nothing_is_unpickled_and_a_damaged_state_is_named(content: dict[str, object], tmp_path: Path):
    path = tmp_path / "state.pt"
    torch.save(content, path)
    if "weights" in content:
        path.write_bytes(path.read_bytes()[:-500])
    refused(r"state\.pt: damaged", RunFolder(tmp_path).load_state)


@pytest.mark.parametrize("what", ["bytes", "a model"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [(Path, "open"), (os, "fsync"), (Path, "replace")], ids=["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(
    at: tuple[object, str], error: BaseException, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, model = tmp_path / "file", build(tiny_segmenter())
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise error

    words = r"No space left on device, and nothing was changed.*file" if isinstance(error, OSError) else None
    with monkeypatch.context() as patched:
        patched.setattr(*at, fail)
        with pytest.raises(type(error), match=words) as failed:
            write_atomically(path, b"new") if what == "bytes" else save(model, path)
    assert not isinstance(failed.value, OSError) or failed.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_device_that_is_really_full(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    (tmp_path / f".{zlib.crc32(b'file'):08x}.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_holds_one_run_and_nothing_that_a_killed_process_left(tmp_path: Path):
    folder = RunFolder(tmp_path / "a" / "run")
    folder.start(recipe("nuclei_vit"))
    assert folder.recipe() == recipe("nuclei_vit")
    refused("holds a run already", folder.start, recipe("nuclei_vit"))
    refused("is not the folder of a run", RunFolder(tmp_path).recipe)
    folder.recipe_file.write_text('{"model": {}, "train": {}')
    refused(r"recipe\.json: cannot be read as JSON", folder.recipe)

    (folder.path / "deep").mkdir()
    folder.recipe_file.rename(folder.path / "deep" / ".0123abcd.99.part")
    write_json(folder.path / "metrics.json", {"step": 3, "images": 2})
    (folder.path / ".mine.99.part").touch()
    remove_parts(folder.path)
    assert {p.name for p in folder.path.rglob("*")} == {"deep", "metrics.json", ".mine.99.part"}
    assert folder.metrics() == {"step": 3, "images": 2}
