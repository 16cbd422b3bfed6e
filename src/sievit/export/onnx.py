"""A program as an ONNX file."""

import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sievit.config import ConfigError

NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Raise a ConfigError if a package is missing."""
    for name in NEEDED:
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(f"ONNX files need {name}: pip install 'sievit[export]'") from error


@contextmanager
def _quiet(name: str) -> Generator[None]:
    """Nothing below an error from this logger, meanwhile."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def onnx_bytes(
    made: torch.export.ExportedProgram, outputs: list[str], metadata: dict[str, Any], *, int8: bool
) -> bytes:
    """The file, with `metadata` as JSON, a property for each name.

    Args:
        int8: weights of matrix products in 8 bits per channel; what goes in is rounded to 8 bits when they run.
    """
    from onnxscript import opset18

    def stable_sort(self: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
        """`sort`, which ONNX does not have: all of the largest or smallest, the first ones first among equals."""
        size = opset18.Gather(opset18.Shape(self), opset18.Constant(value_ints=[dim]))  # ty: ignore
        return opset18.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    table: Any = {torch.ops.aten.sort.stable: stable_sort}
    names: dict[str, Any] = {"input_names": ["images"], "output_names": outputs}
    with _quiet("torch.onnx"):
        done = torch.onnx.export(made, (), dynamo=True, custom_translation_table=table, verbose=False, **names)
    assert done is not None
    for name, value in metadata.items():
        done.model.metadata_props[name] = json.dumps(value)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        done.save(path)
        return (_in_8_bits(path) if int8 else path).read_bytes()


def _in_8_bits(path: Path) -> Path:
    """The file beside it with the weights of matrix products in 8 bits."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = path.with_name("int8.onnx")
    options: dict[str, Any] = {"weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul"]}
    with _quiet(""):
        quantize_dynamic(path, small, per_channel=True, **options)
    return small
