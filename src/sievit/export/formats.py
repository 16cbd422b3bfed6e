"""Programs as files of other formats than ONNX, and the one call that writes any of them."""

import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from sievit.config import ConfigError
from sievit.export.onnx import Precision, onnx_bytes
from sievit.export.program import Made
from sievit.models.runtimes import METADATA

Format = Literal["onnx", "torch-export", "openvino", "aoti"]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml", "aoti": ".pt2"}


def write_program(
    made: Made, path: Path, kind: Format, metadata: dict[str, Any], *, precision: Precision = "float32"
) -> list[Path]:
    """Write a program to `path`, with what is to be known of it; all the files that were written.

    Raises:
        ConfigError: the format cannot hold the program, and why.
    """
    if kind == "onnx":
        path.write_bytes(onnx_bytes(made, {METADATA: metadata}, precision=precision))
    elif kind == "torch-export":
        torch.export.save(made.exported, path, extra_files={METADATA: json.dumps(metadata)})
    elif kind == "openvino":
        return write_openvino(onnx_bytes(made, {}), path, metadata, half=precision == "float16")
    else:
        _compiled(made, path, metadata)
    return [path]


def write_openvino(content: bytes, path: Path, metadata: dict[str, Any], *, half: bool = False) -> list[Path]:
    """OpenVINO's own pair of files, read from an ONNX file; `half` stores weights as float16."""
    import openvino

    with TemporaryDirectory() as folder:
        onnx = Path(folder) / "model.onnx"
        onnx.write_bytes(content)
        try:
            model = openvino.Core().read_model(onnx)
        except RuntimeError as error:
            raise ConfigError(f"OpenVINO cannot read the program: {str(error).splitlines()[-1]}") from error
        model.set_rt_info(json.dumps(metadata), [METADATA])
        openvino.save_model(model, path, compress_to_fp16=half)
    return [path, path.with_suffix(".bin")]


def _compiled(made: Made, path: Path, metadata: dict[str, Any]) -> None:
    """A package of AOTInductor for this kind of machine."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    text = json.dumps(metadata).encode().hex()  # it is put into C++ as it is
    options: dict[str, Any] = {
        "aot_inductor.metadata": {METADATA: text},
        "scalar_asserts": False,  # they name symbols in their messages that the C++ does not have
        "layout_optimization": False,  # two convolutions of a batch whose size depends on values are wrong with it
    }
    try:
        torch._inductor.aoti_compile_and_package(made.exported, package_path=str(path), inductor_configs=options)
    except Exception as error:  # of whatever kind, it says what the compiler cannot do
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"AOTInductor cannot compile the program: {reason}") from error
    finally:
        logging.disable(level)
