"""A program as an ONNX file."""

import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from sievit.config import ConfigError
from sievit.export.program import Made

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


Precision = Literal["float32", "float16", "int8"]
"""Of the weights in a file."""


def require(format: str) -> None:
    """Raise a ConfigError if a package is missing that files of this format need."""
    for name in NEEDED.get(format, ()):
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(f"--format {format} needs {name}: pip install 'sievit[export]'") from error


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


def onnx_bytes(made: Made, metadata: dict[str, Any], *, precision: Precision = "float32") -> bytes:
    """The file, with `metadata` as JSON, a property for each name.

    Args:
        precision: float16 stores weights in half the bytes and computes in float32; int8 stores those of matrix
            products in 8 bits per channel, and what goes in is rounded to 8 bits when they run.
    """
    table: Any = {
        torch.ops.aten.index_add.default: _index_add,
        torch.ops.aten.sort.stable: _sort,
        torch.ops.sievit.nms.default: _nms,
        torch.ops.torchvision.roi_align.default: _roi_align,
    }
    options: dict[str, Any] = {"input_names": made.inputs, "output_names": made.outputs, "optimize": False}
    with _quiet("torch.onnx"):  # runtimes optimise when they read a file
        done = torch.onnx.export(
            made.exported, (), dynamo=True, custom_translation_table=table, verbose=False, **options
        )
    assert done is not None
    for name, value in metadata.items():
        done.model.metadata_props[name] = json.dumps(value)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        done.save(path)
        smaller = {"float32": lambda path: path, "float16": _in_16_bits, "int8": _in_8_bits}
        return smaller[precision](path).read_bytes()


def _sort(values: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
    """`sort`, which ONNX does not have: all of the largest or smallest, the first ones first among equals."""
    from onnxscript import opset18

    op: Any = opset18
    size = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
    return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)


def _index_add(rows: Any, dim: int, index: Any, added: Any, alpha: float = 1.0) -> Any:
    """Rows added at positions that may be equal: number by number, which ONNX Runtime does one after the other.

    Its ScatterND adds rows with several threads and loses some (a data race; seen with 1.32 on CPU).
    """
    from onnxscript import opset18

    assert dim == 0 and alpha == 1, "only what sievit uses"
    op: Any = opset18
    flat, last = op.Constant(value_ints=[-1]), op.Constant(value_ints=[1])
    width = op.Gather(op.Shape(rows), last)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    columns = op.Range(zero, op.Squeeze(width), one)
    places = op.Add(op.Mul(op.Unsqueeze(index, last), width), columns)
    whole = op.ScatterElements(
        op.Reshape(rows, flat), op.Reshape(places, flat), op.Reshape(added, flat), axis=0, reduction="add"
    )
    return op.Reshape(whole, op.Shape(rows))


def _nms(boxes: Any, scores: Any, iou: float) -> Any:
    """`heads.fixed.nms_mask`."""
    from onnx import TensorProto
    from onnx.helper import make_tensor
    from onnxscript import opset18

    op: Any = opset18
    none, yes = (op.Constant(value=make_tensor(str(i), TensorProto.INT32, [1], [i])) for i in range(2))
    shape, one = op.Shape(scores), op.Constant(value_ints=[1])
    most, columns = op.Gather(shape, one), op.Unsqueeze(scores, one)
    boxes = op.Reshape(boxes, op.Constant(value_ints=[0, -1, 4]))  # OpenVINO has to see that these are four
    overlap, least = (op.Constant(value_float=value) for value in (iou, -0.5))
    chosen = op.NonMaxSuppression(boxes, columns, most, overlap, least)  # rows of group, 0, box
    places = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
    rows = op.Gather(op.Shape(places), op.Constant(value_ints=[0]))
    mask = op.ScatterND(op.Expand(none, shape), places, op.Expand(yes, rows))
    return op.Cast(mask, to=TensorProto.BOOL)


def _roi_align(
    maps: Any, rois: Any, scale: float, height: int, width: int, sampling_ratio: int = -1, aligned: bool = False
) -> Any:
    """torchvision's, with boxes of which OpenVINO sees that they are four numbers."""
    from onnx import TensorProto
    from onnxscript import opset18

    op: Any = opset18
    images, boxes = (op.Gather(rois, op.Constant(value_ints=part), axis=1) for part in ([0], [1, 2, 3, 4]))
    return op.RoiAlign(
        maps,
        op.Reshape(boxes, op.Constant(value_ints=[-1, 4])),
        op.Cast(op.Reshape(images, op.Constant(value_ints=[-1])), to=TensorProto.INT64),
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        output_height=height,
        output_width=width,
        sampling_ratio=max(sampling_ratio, 0),
        spatial_scale=scale,
    )


def _in_8_bits(path: Path) -> Path:
    """The file beside it with the weights of matrix products in 8 bits."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folded, small = path.with_name("folded.onnx"), path.with_name("int8.onnx")
    session = onnxruntime.SessionOptions()  # transposed weights are none to the quantisation before that is done
    session.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session.optimized_model_filepath, session.log_severity_level = str(folded), 3
    onnxruntime.InferenceSession(str(path), session, providers=["CPUExecutionProvider"])
    options: dict[str, Any] = {"weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul", "Gemm"]}
    with _quiet(""):
        quantize_dynamic(folded, small, per_channel=True, **options)
    return small


def _in_16_bits(path: Path) -> Path:
    """The file beside it with matrices and kernels as float16 and their casts, which runtimes do when they read it."""
    import numpy as np
    import onnx

    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1 and abs(values).max(initial=0) <= np.finfo(np.float16).max:
            name = tensor.name
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_16"))
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    small = path.with_name("float16.onnx")
    onnx.save(model, small)
    return small
