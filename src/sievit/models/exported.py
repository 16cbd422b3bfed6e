"""Exported files as models: the network runs in the file's own runtime, everything around it as ever."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sievit.config import ConfigError, from_json
from sievit.models.backbone import padded_size
from sievit.models.base import Model, model_class
from sievit.models.inputs import ModelConfig
from sievit.models.segmenter import Segmenter
from sievit.policies import Policy
from sievit.tokens import Trace
from sievit.vit.execution import Execution
from sievit.vit.model import Sizes, standing

SUFFIX = ".onnx"
METADATA = "sievit"
"""The property that holds the configuration of the model, and what its traces have."""


class Runtime:
    """A network in a file.

    Args:
        path: an ONNX file that `sievit export` wrote.

    Raises:
        ConfigError: it cannot be read, is none of ours, or there is no ONNX Runtime.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError(f"{path}: needs onnxruntime: pip install 'sievit[export]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        there = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # it raises classes of its own
            raise ConfigError(f"{path}: ONNX Runtime cannot read it ({str(error).splitlines()[0]})") from error
        properties = self.session.get_modelmeta().custom_metadata_map
        if METADATA not in properties:
            raise ConfigError(f"{path}: was not written by sievit export; it has no {METADATA!r} in its metadata")
        self.known: dict[str, Any] = json.loads(properties[METADATA])
        self.names = [output.name for output in self.session.get_outputs()]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """`export.program.OUTPUTS` of normalised images (b, 3, H, W)."""
        found = self.session.run(None, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(self.names, found, strict=True)}


class _Fixed(Policy):
    """The policy of an exported file, which decides in there."""

    def __init__(self, inner: Policy) -> None:
        super().__init__()
        self.config, self.depth, self._inner = inner.config, inner.depth, [inner]
        self.report = inner.report
        self.dense_notes = inner.dense_notes
        self.settings = inner.settings

    def macs(self, trace: Trace) -> Tensor:
        of_file = [aux["exported"] for aux in trace.aux if "exported" in aux]
        return of_file[0] if of_file else self._inner[0].macs(trace)


class _Network:
    """What a segmenter calls in place of its own network."""

    def __init__(self, runtime: Runtime, model: Segmenter) -> None:
        self.runtime, self.config, self.classes = runtime, model.config.vit, len(model.config.classes)

    def __call__(
        self,
        images: Tensor,
        sizes: Sizes | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution = Execution(),
        head_size: Any = None,
    ) -> tuple[Tensor, Trace]:
        """See `SegmentationNet.forward`. Images that do not fill the batch are run one by one."""
        if policy is not None and not isinstance(policy, _Fixed):
            raise ConfigError("an exported file runs with the policy that is in it; export the model with another one")
        stride = self.config.stride
        height, width = padded_size((images.shape[2], images.shape[3]), stride)
        images = F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
        grid = (height // stride, width // stride)
        own = [padded_size(size, stride) for size in sizes] if sizes else [(height, width)] * len(images)
        if all(size == (height, width) for size in own):
            found, valid = self.runtime(images), torch.ones(len(images), grid[0] * grid[1], dtype=torch.bool)
        else:
            rows = [
                self.runtime(image[None, :, :h, :w].contiguous()) for image, (h, w) in zip(images, own, strict=True)
            ]
            grids = [(h // stride, w // stride) for h, w in own]
            found = {
                name: torch.cat([self._on_canvas(row[name], size, grid) for row, size in zip(rows, grids, strict=True)])
                for name in rows[0]
            }
            valid = standing(torch.tensor(grids), grid).flatten(1)
        return found["scores"], self._trace(found, grid, valid)

    def _on_canvas(self, values: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Outputs of one image on the canvas of the batch; zero on padding."""
        if values.ndim == 1:
            return values
        down, right = grid[0] - own[0], grid[1] - own[1]
        if values.ndim == 4:
            return F.pad(values, (0, right * self.config.stride, 0, down * self.config.stride))
        return F.pad(values.unflatten(2, own), (0, right, 0, down)).flatten(2)

    def _trace(self, found: dict[str, Tensor], grid: tuple[int, int], valid: Tensor) -> Trace:
        known, keep = self.runtime.known, found["keep"].bool().unbind(1)
        aux: list[dict[str, Tensor]] = [{} for _ in range(len(keep) + 1)]
        aux[0]["exported"] = found["macs"].double()
        for i, block in enumerate(known["stages"]):
            aux[block + 1]["exited"] = found["exited"][:, i].bool()
        for block in known["heads"]:
            aux[block + 1]["maps"] = torch.zeros(1).expand(len(valid), self.classes, valid.shape[1])
        prefix = tuple((before, after) for before, after in known["prefix"])
        return Trace(grid, valid, keep, keep, prefix, tuple(aux))


def load_exported(path: Path) -> Model:
    """The model of an exported file, in evaluation mode; it has no weights of its own, and cannot be trained."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    runtime = Runtime(path)
    config = from_json(ModelConfig, runtime.known["config"], where=str(path))
    config = replace(config, execution=Execution())
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    model = model.to_empty(device="cpu").requires_grad_(False).eval()
    assert isinstance(model, Segmenter)
    model.net.policy = _Fixed(model.policy)
    model.net.forward = _Network(runtime, model)
    return model
