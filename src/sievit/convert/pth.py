"""Checkpoints of other projects as files: state dicts out, and nothing in them is ever run.

mmcv and mmengine store {"meta": ..., "state_dict": ..., "optimizer": ...}, others {"model": ...} or the bare state
dict. PyTorch's restricted unpickler makes tensors and plain Python of them; mmengine's files also want a history of
losses, numpy's arrays and the like, for which inert objects of our own stand in. A file that asks for anything else is
refused.
"""

import pickle
import re
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sievit.config import ConfigError

WRAPPERS = ("state_dict", "model")
"""Under which of these names a file holds its state dict, if it holds more."""

SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds that can be used.

    Attributes:
        state: tensors by name, on the CPU.
        classes: names that mmcv or mmengine wrote into the file, in the order of the outputs; empty without them.
        config: the configuration of the training that they wrote into it, as text; empty without one.
    """

    state: dict[str, Tensor]
    classes: tuple[str, ...] = ()
    config: str = ""


class _Inert:
    """Stands for an object that is not needed: no operation on it has an effect."""

    def __new__(cls, *_: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _no_deque(*_: object) -> list[Any]:
    return []  # the unpickler appends to lists alone


def _no_dict(*_: object) -> dict[Any, Any]:
    return {}


STAND_INS: dict[str, Any] = {
    "mmengine.logging.history_buffer.HistoryBuffer": _Inert,
    "mmengine.logging.HistoryBuffer": _Inert,
    "builtins.getattr": _Inert,  # that history names its own methods
    "numpy.core.multiarray._reconstruct": _Inert,
    "numpy.core.multiarray.scalar": _Inert,
    "numpy._core.multiarray._reconstruct": _Inert,
    "numpy._core.multiarray.scalar": _Inert,
    "numpy.ndarray": _Inert,
    "numpy.dtype": _Inert,
    "pathlib.PosixPath": _Inert,
    "pathlib.WindowsPath": _Inert,
    "collections.deque": _no_deque,
    "collections.defaultdict": _no_dict,
    "builtins.list": _no_deque,
    "builtins.dict": _no_dict,
}
"""What files may name beyond tensors and plain Python, and what they get instead."""

_DAMAGED = (
    *(RuntimeError, EOFError, pickle.UnpicklingError, OSError, LookupError, ValueError, TypeError, AttributeError),
    *(AssertionError, ImportError, OverflowError, MemoryError, struct.error),
)
"""What the unpickler raises on bytes that are no checkpoint; without its doing nothing of the file was run."""


def read_checkpoint(path: Path) -> Checkpoint:
    """The state dict in a file that `torch.save`, mmcv, mmengine or safetensors wrote.

    Raises:
        ConfigError: no such file, cut short, no checkpoint, or it wants to load code.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give the checkpoint file in it")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if path.suffix == SAFETENSORS:
        return Checkpoint(_read_safetensors(path))
    content = _unpickle(path)
    meta = content.get("meta") if isinstance(content, dict) else None
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    return Checkpoint(_checked(content, path), *_told(meta))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: damaged, cut short, or not a safetensors file ({error})") from error


def _unpickle(path: Path) -> Any:
    pairs: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(pairs), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of unusual pickle protocols, before it fails on them
            return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        wanted = re.search(r"GLOBAL (\S+) ", str(error))
        if wanted is not None:
            raise ConfigError(
                f"{path}: wants to load {wanted[1]!r}, which is no tensor, so it was not read further; if you trust "
                "whoever wrote it, save its state dict alone: torch.save(model.state_dict(), FILE)"
            ) from error
        reason = str(error).strip().rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise ConfigError(
            f"{path}: damaged, cut short, or no checkpoint ({reason or type(error).__name__}); compare its size with "
            "the original's and download it again"
        ) from error


def _checked(state: Any, path: Path) -> dict[str, Tensor]:
    """The state dict, without the prefix that data-parallel training puts before every name."""
    if not isinstance(state, dict):
        raise ConfigError(f"{path}: holds a {type(state).__name__}, not a state dict")
    others = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others or not state:
        what = f"{', '.join(others[:5])} are no tensors" if others else "it is empty"
        raise ConfigError(f"{path}: holds no state dict under {', '.join(WRAPPERS)}, nor is it one: {what}")
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _told(meta: Any) -> tuple[tuple[str, ...], str]:
    """mmcv's meta["CLASSES"] and meta["config"], mmengine's meta["dataset_meta"]["classes"] and meta["cfg"]."""
    if not isinstance(meta, dict):
        return (), ""
    data, config = meta.get("dataset_meta"), meta.get("config", meta.get("cfg"))
    classes = data.get("classes", data.get("CLASSES")) if isinstance(data, dict) else meta.get("CLASSES")
    known = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
    return tuple(classes) if known else (), config if isinstance(config, str) else ""
