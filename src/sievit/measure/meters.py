"""What a pass holds and how often it waits: peak memory and synchronisations."""

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[1]
ASKING = {
    "aten::item": "item",
    "aten::_local_scalar_dense": "item",
    "aten::is_nonzero": "bool",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::equal": "equal",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::bincount": "bincount",
    "torchvision::nms": "nms",
}
"""Operations after which the host has to know a value, and with it wait for the device."""


@dataclass(frozen=True)
class Memory:
    """Megabytes (1e6 bytes) of tensors that a call held at once at most, beside those that were there before.

    That is activations and results: weights and the inputs are there before, and a library's own workspaces that do not
    go through torch's allocator are not seen.

    Attributes:
        peak: over the whole call.
        blocks: while each of the blocks ran, whatever else was held at that time included; empty where they cannot be
            told apart.
    """

    peak: float
    blocks: tuple[float, ...] = ()


def memory(call: Callable[[], object], device: torch.device, blocks: Sequence[nn.Module] = ()) -> Memory:
    """What a call holds; on CPU by torch's profiler, which sees every tensor come and go, on CUDA by its allocator.

    Args:
        blocks: modules, called one after the other, whose peaks are told apart.
    """
    meter = _CudaMeter(device) if device.type == "cuda" else _CpuMeter()
    hooks = []
    try:
        for i, block in enumerate(blocks):
            hooks.append(block.register_forward_pre_hook(lambda *_, i=i: meter.enter(i)))
            hooks.append(block.register_forward_hook(lambda *_, i=i: meter.leave(i)))
        peak, of_block = meter.measure(call)
    finally:
        for hook in hooks:
            hook.remove()
    return Memory(round(peak / 1e6, 1), tuple(round(of_block.get(i, 0) / 1e6, 1) for i in range(len(blocks))))


class _CudaMeter:
    """The allocator's peak is read and reset wherever a block begins or ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before, self.peak = device, 0, 0
        self.of_block: dict[int, int] = {}

    def enter(self, i: int) -> None:
        self._read()

    def leave(self, i: int) -> None:
        self.of_block[i] = max(self.of_block.get(i, 0), self._read())

    def _read(self) -> int:
        held = torch.cuda.max_memory_allocated(self.device) - self.before
        torch.cuda.reset_peak_memory_stats(self.device)
        self.peak = max(self.peak, held)
        return held

    def measure(self, call: Callable[[], object]) -> tuple[int, dict[int, int]]:
        torch.cuda.synchronize(self.device)
        self.before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        self._read()
        return self.peak, self.of_block


class _CpuMeter:
    """The profiler's record of memory, and of when a block ran."""

    NAME = "sievit block "

    def __init__(self) -> None:
        self.running: dict[int, Any] = {}

    def enter(self, i: int) -> None:
        self.running[i] = record_function(f"{self.NAME}{i}")
        self.running[i].__enter__()

    def leave(self, i: int) -> None:
        self.running.pop(i).__exit__(None, None, None)

    def measure(self, call: Callable[[], object]) -> tuple[int, dict[int, int]]:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its messages would stand in the table
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
            call()
        assert record.profiler is not None and record.profiler.kineto_results is not None
        held = peak = 0
        running: list[int] = []
        of_block: dict[int, int] = {}
        moments: list[tuple[int, int, Any]] = []  # time, order at the same time, and what happens then
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                moments.append((event.start_ns(), 1, event))
            elif event.name().startswith(self.NAME):
                index = int(event.name().removeprefix(self.NAME))
                moments += [(event.start_ns(), 0, index), (event.start_ns() + event.duration_ns(), 2, index)]
        for _, order, what in sorted(moments, key=lambda moment: moment[:2]):
            if order == 1:
                held += what.nbytes()
                peak = max(peak, held)
                of_block |= {i: max(of_block.get(i, 0), held) for i in running}
            else:
                running = [*running, what] if order == 0 else [i for i in running if i != what]
        return peak, of_block


@contextmanager
def counted_syncs(device: torch.device) -> Generator[Counter[str]]:
    """How often the host has to wait for the device while the context lasts, by the place in the source.

    On CUDA it is what torch's synchronisation debug mode warns of, copies from and to the host included. On CPU nothing
    waits; what is counted there is every operation that asks a tensor for a value, and would wait on CUDA: `item`,
    `bool`, `tolist`, `nonzero`, an index by mask, and the like. Copies to a device are not seen there.
    """
    places: Counter[str] = Counter()
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                torch.cuda.set_sync_debug_mode(before)
                for each in caught:
                    if "synchronizing CUDA operation" in str(each.message):
                        places[_shown(each.filename, each.lineno)] += 1
        return
    tolist = Tensor.tolist

    def noted(self: Tensor) -> Any:
        places[_place("tolist")] += 1
        return tolist(self)

    with patch.object(Tensor, "tolist", noted), _Asking(places):
        yield places


class _Asking(TorchDispatchMode):
    """Counts the operations that need a value on the host."""

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        what = ASKING.get(name)
        if name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        ):
            what = "index by mask"
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None and isinstance(args[-1], Tensor):
            what = "repeat_interleave"
        if name == "aten::where" and len(args) == 1:
            what = "where"
        if what is not None:
            self.places[_place(what)] += 1
        return func(*args, **kwargs)


def _place(what: str) -> str:
    """The innermost line of sievit that is running, benches aside, and what it asks for."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and path.parent.name not in ("bench", "measure"):
            return f"{_shown(frame.f_code.co_filename, frame.f_lineno)} {what}"
        frame = frame.f_back
    return f"elsewhere {what}"


def _shown(filename: str, line: int) -> str:
    """A file's path inside sievit, or its name, and the line."""
    path = Path(filename)
    shown = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
    return f"{shown}:{line}"
