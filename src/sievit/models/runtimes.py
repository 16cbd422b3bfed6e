"""Runtimes that run exported files.

A runtime has `known`, what `sievit export` wrote into the file's metadata, and is called with the inputs of the
program, see `export.program.Made`; it answers with its outputs by name.
"""

import json
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from sievit.config import ConfigError

METADATA = "sievit"
"""The property that holds the configuration of the model, and what its traces have."""


class Runtime(ABC):
    """A network in a file.

    Args:
        path: a file that `sievit export` wrote.

    Raises:
        ConfigError: it cannot be read, is none of ours, or the runtime is not installed.
    """

    title: ClassVar[str]
    needs: ClassVar[str | None] = None
    """The package of the runtime."""
    telling: ClassVar[int] = 0
    """The line of its errors that says what is wrong."""
    known: dict[str, Any]

    def __init__(self, path: Path) -> None:
        if self.needs is not None:
            try:
                import_module(self.needs)
            except ImportError as error:
                raise ConfigError(f"{path}: needs {self.needs}: pip install 'sievit[export]'") from error
        try:
            text = self.read(path)
        except Exception as error:  # they raise classes of their own
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise ConfigError(f"{path}: {self.title} cannot read it ({lines[self.telling]})") from error
        if not text:
            raise ConfigError(f"{path}: was not written by sievit export; it has no {METADATA!r} in its metadata")
        self.known = json.loads(text)

    @abstractmethod
    def read(self, path: Path) -> str | None:
        """Open the file; what it has as `METADATA`."""

    @abstractmethod
    def run(self, inputs: dict[str, Tensor]) -> list[Any]:
        """The outputs in their order, tensors or arrays."""

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        found = self.run({name: value.contiguous() for name, value in inputs.items()})
        return {name: torch.as_tensor(value) for name, value in zip(self.known["outputs"], found, strict=True)}


class OnnxRuntime(Runtime):
    """ONNX Runtime, on CUDA where its package can."""

    title = needs = "onnxruntime"

    def read(self, path: Path) -> str | None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        there = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        return self.session.get_modelmeta().custom_metadata_map.get(METADATA)

    def run(self, inputs: dict[str, Tensor]) -> list[Any]:
        return list(self.session.run(None, {name: value.numpy() for name, value in inputs.items()}))


class OpenVino(Runtime):
    """OpenVINO on CPU, for a pair of files .xml and .bin."""

    title = needs = "openvino"
    telling = -1

    def read(self, path: Path) -> str | None:
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.call = core.compile_model(model, "CPU", options)
        return model.get_rt_info([METADATA]).astype(str) if model.has_rt_info([METADATA]) else None

    def run(self, inputs: dict[str, Tensor]) -> list[Any]:
        found = self.call({name: value.numpy() for name, value in inputs.items()})
        return [found[i].copy() for i in range(len(self.known["outputs"]))]


class TorchProgram(Runtime):
    """torch itself, for an exported program."""

    title = "torch.export"

    def read(self, path: Path) -> str | None:
        import_module("sievit.heads.fixed")  # which registers an operator
        extra = {METADATA: ""}
        self.call: Any = torch.export.load(path, extra_files=extra).module()
        return extra[METADATA]

    def run(self, inputs: dict[str, Tensor]) -> list[Any]:
        with torch.no_grad():
            return list(self.call(*inputs.values()).values())


class Inductor(TorchProgram):
    """A program that AOTInductor compiled, for the kind of machine that it was compiled on. It is machine code."""

    title = "AOTInductor"

    def read(self, path: Path) -> str | None:
        import_module("sievit.heads.fixed")
        self.call = torch._inductor.aoti_load_package(str(path))
        return bytes.fromhex(self.call.get_metadata().get(METADATA, "")).decode()


def runtime(path: Path) -> Runtime:
    """The runtime that opens a file of `SUFFIXES`; see `Runtime`."""
    if path.suffix == ".onnx":
        return OnnxRuntime(path)
    if path.suffix == ".xml":
        return OpenVino(path)
    compiled = is_zipfile(path) and any("data/aotinductor/" in name for name in ZipFile(path).namelist())
    return Inductor(path) if compiled else TorchProgram(path)


SUFFIXES = (".onnx", ".xml", ".pt2")
"""Of exported files."""
