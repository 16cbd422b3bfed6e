"""Checkpoint files of other projects: what is read, what is refused, and that nothing in them is ever run."""

import builtins
import collections
import contextlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sievit.config import ConfigError
from sievit.convert.pth import read_checkpoint
from tiny import refused

STATE = {"backbone.w": torch.arange(6.0).view(2, 3), "backbone.n": torch.tensor(3)}


def written(content: Any, path: Path, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def same(path: Path) -> bool:
    state = read_checkpoint(path).state
    return list(state) == list(STATE) and all(torch.equal(state[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "meta": {"epoch": 3}, "optimizer": {"state": {0: torch.ones(2)}}},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": collections.OrderedDict(state)},
    ],
    ids=["bare", "mmcv", "model", "parallel", "ordered"],
)
def test_wrappings(tmp_path: Path, wrap: Any, zipped: bool):
    assert same(written(wrap(STATE), tmp_path / "model.pth", zipped=zipped))


def test_safetensors_and_no_such_file(tmp_path: Path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path / "model.safetensors").state.keys() == STATE.keys()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "model.safetensors").read_bytes()[:-4])
    refused(r"cut\.safetensors: damaged", read_checkpoint, cut)

    refused("no such file", read_checkpoint, tmp_path / "m.pth")
    refused("is a folder", read_checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("meta", "classes"),
    [
        ({"CLASSES": ("cat", "dog")}, ("cat", "dog")),
        ({"dataset_meta": {"classes": ["cat", "dog"], "palette": [[0, 0, 0]]}}, ("cat", "dog")),
        ({"dataset_meta": {"CLASSES": ("cat",)}}, ("cat",)),
        ({"CLASSES": (1, 2)}, ()),
        ({"CLASSES": None}, ()),
        ("text", ()),
    ],
)
def test_classes_that_a_file_names(tmp_path: Path, meta: Any, classes: tuple[str, ...]):
    assert read_checkpoint(written({"state_dict": STATE, "meta": meta}, tmp_path / "m.pth")).classes == classes


@pytest.fixture
def history_buffer() -> Iterator[type]:
    """A class as mmengine's, which is gone when the file is read."""
    name = "mmengine.logging.history_buffer"

    class HistoryBuffer:
        def __init__(self) -> None:
            self.log = np.arange(3.0)
            self.counts = np.array([1, 2], dtype=np.int64)

        def mean(self) -> float:
            return 0.0

        def __getstate__(self) -> dict[str, Any]:
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

        def __setstate__(self, state: dict[str, Any]) -> None:
            raise AssertionError("ran code of the file's class")

    module: Any = types.ModuleType(name)
    module.HistoryBuffer = HistoryBuffer
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = name, "HistoryBuffer.mean"
    sys.modules[name] = module
    sys.modules["mmengine"] = sys.modules["mmengine.logging"] = types.ModuleType("mmengine")
    yield HistoryBuffer
    for known in [known for known in sys.modules if known.startswith("mmengine")]:
        del sys.modules[known]


@pytest.mark.parametrize("there", [True, False], ids=["mmengine is there", "mmengine is not there"])
def test_what_mmengine_stores_beside_tensors(tmp_path: Path, history_buffer: Any, there: bool):
    content = {
        "meta": {"dataset_meta": {"classes": ("a",)}, "seed": np.int64(3), "best": np.float32(0.5)},
        "message_hub": {
            "log_scalars": collections.OrderedDict(loss=history_buffer()),
            "queue": collections.deque([1, 2], maxlen=5),
            "by_name": collections.defaultdict(list, {"a": [1]}),
            "work_dir": Path("runs/x"),
            "random": np.random.default_rng(0).bytes(3),
        },
        "state_dict": STATE,
        "param_schedulers": [{"last_step": 3, "_global": np.arange(4)}],
    }
    path = written(content, tmp_path / "iter_40000.pth")
    if not there:
        del sys.modules["mmengine.logging.history_buffer"]
    allowed = set(torch.serialization.get_safe_globals())
    assert same(path)
    assert read_checkpoint(path).classes == ("a",)
    assert set(torch.serialization.get_safe_globals()) == allowed  # nothing stays so


class Runs:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["system", "eval", "exec", "open", "import", "getattr", "tensor"])
def test_a_file_that_runs_code_is_refused_and_runs_none(tmp_path: Path, name: str, zipped: bool):
    sign = tmp_path / "it-ran"
    touch = f"open({str(sign)!r}, 'w').close()"
    call = {
        "system": Runs(os.system, f"touch {sign}"),
        "eval": Runs(builtins.eval, touch),
        "exec": Runs(builtins.exec, touch),
        "open": Runs(builtins.open, str(sign), "w"),
        "import": Runs(builtins.__import__, "antigravity"),
        "getattr": Runs(getattr, Runs(builtins.__import__, "os"), "system"),
        "tensor": Runs(torch.load, str(sign)),
    }[name]
    path = written({"state_dict": STATE, "meta": call}, tmp_path / "evil.pth", zipped=zipped)
    refused(r"evil\.pth: wants to load '.*', which is no tensor", read_checkpoint, path)
    assert not sign.exists()


def test_what_stands_in_for_getattr_looks_at_nothing(tmp_path: Path):
    """It is let through for mmengine's sake."""
    path = written({"state_dict": STATE, "meta": Runs(getattr, dict, "fromkeys")}, tmp_path / "m.pth")
    assert same(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_was_cut_short_or_damaged(tmp_path: Path, zipped: bool):
    whole = written({"state_dict": STATE}, tmp_path / "whole.pth", zipped=zipped).read_bytes()
    path = tmp_path / "part.pth"
    for length in range(0, len(whole) - 1, len(whole) // 40):
        path.write_bytes(whole[:length])
        refused(r"part\.pth: (damaged, cut short|wants to load)", read_checkpoint, path)
    generator = np.random.default_rng(0)
    for _ in range(40):  # whatever comes of it, it is said in our words
        spoilt = bytearray(whole)
        for place in generator.integers(0, len(whole), 6):
            spoilt[place] = int(generator.integers(256))
        path.write_bytes(spoilt)
        with contextlib.suppress(ConfigError):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is text\n" * 9, b"\xff\xd8\xff\xe0\x00\x10JFIF" * 9, b"PK\x03\x04"]
)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    refused(r"model\.pth: damaged, cut short, or no checkpoint", read_checkpoint, path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3, "lr": 0.1}, "epoch, lr are no tensors"),
        ({"state_dict": {}}, "it is empty"),
        ({"state_dict": {"w": "text"}}, "w are no tensors"),
        ([torch.ones(1)], "holds a list, not a state dict"),
        (torch.ones(1), "holds a Tensor, not a state dict"),
    ],
)
def test_a_checkpoint_without_a_state_dict(tmp_path: Path, content: Any, words: str):
    refused(words, read_checkpoint, written(content, tmp_path / "m.pth"))
