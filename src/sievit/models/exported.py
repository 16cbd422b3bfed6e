"""Exported files as models: the network runs in the file's own runtime, everything around it as ever."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sievit.config import ConfigError, from_json
from sievit.models.backbone import padded_size
from sievit.models.base import Model, model_class
from sievit.models.detector import Detector
from sievit.models.inputs import ModelConfig, Size
from sievit.models.runtimes import Runtime, runtime
from sievit.models.segmenter import Segmenter
from sievit.policies import Policy
from sievit.tokens import Trace
from sievit.vit.execution import Execution
from sievit.vit.model import standing

LEAST = 96
"""Pixels of the smallest canvas of a detector's program, which has two cells on its last map."""


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
        sizes: Any = None,
        *,
        policy: Policy | None = None,
        execution: Execution = Execution(),
        head_size: Any = None,
    ) -> tuple[Tensor, Trace]:
        """See `SegmentationNet.forward`. Images that do not fill the batch are run one by one, where the program is not
        static."""
        _check_policy(policy)
        stride, canvas = self.config.stride, self.runtime.known["canvas"]
        height, width = padded_size((images.shape[2], images.shape[3]), stride)
        images = _on_canvas_of(images, canvas or (height, width))
        grid = (images.shape[2] // stride, images.shape[3] // stride)
        own = [padded_size(size, stride) for size in sizes] if sizes else [(height, width)] * len(images)
        grids = [(h // stride, w // stride) for h, w in own]
        if canvas is not None:
            found = self.runtime(images=images, sizes=torch.tensor(own))
        elif all(size == (height, width) for size in own):
            found = self.runtime(images=images)
        else:
            rows = [self.runtime(images=image[None, :, :h, :w]) for image, (h, w) in zip(images, own, strict=True)]
            found = {
                name: torch.cat([self._placed(row[name], size, grid) for row, size in zip(rows, grids, strict=True)])
                for name in rows[0]
            }
        trace = _trace(self.runtime.known, found, grid, standing(torch.tensor(grids), grid).flatten(1))
        for block in self.runtime.known["heads"]:
            trace.aux[block + 1]["maps"] = torch.zeros(1).expand(len(images), self.classes, trace.valid.shape[1])
        return found["scores"][..., :height, :width], trace

    def _placed(self, values: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Outputs of one image on the canvas of the batch; zero on padding."""
        if values.ndim == 1:
            return values
        down, right = grid[0] - own[0], grid[1] - own[1]
        if values.ndim == 4:
            return F.pad(values, (0, right * self.config.stride, 0, down * self.config.stride))
        return F.pad(values.unflatten(2, own), (0, right, 0, down)).flatten(2)


class _Finder:
    """What a detector calls in place of `Detector.run`."""

    def __init__(self, runtime: Runtime, model: Detector) -> None:
        self.runtime, self.stride, self.hidden = runtime, model.vit.config.stride, model.config.padding == "hidden"

    def __call__(
        self, batch: Tensor, sizes: list[Size], targets: Any, *, policy: Policy | None, execution: Execution
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], Trace]:
        """See `Detector.run`."""
        _check_policy(policy)
        if targets is not None:
            raise ConfigError("an exported file cannot be trained; train the model and export it again")
        least = (max(batch.shape[2], LEAST), max(batch.shape[3], LEAST))
        batch = _on_canvas_of(batch, self.runtime.known["canvas"] or least)
        found = self.runtime(images=batch, sizes=torch.tensor(sizes))
        grid = (batch.shape[2] // self.stride, batch.shape[3] // self.stride)
        own = (
            [padded_size(size, self.stride) for size in sizes] if self.hidden else [tuple(batch.shape[2:])] * len(batch)
        )
        grids = torch.tensor([(h // self.stride, w // self.stride) for h, w in own])
        trace = _trace(self.runtime.known, found, grid, standing(grids, grid).flatten(1))
        detections = []
        for i, number in enumerate((found["labels"] > 0).sum(1).tolist()):
            of_image = {name: found[name][i, :number] for name in ("boxes", "labels", "scores")}
            detections.append({**of_image, "masks": found["masks"][i, :number, None]} if "masks" in found else of_image)
        return detections, {}, trace


def _check_policy(policy: Policy | None) -> None:
    if policy is not None and not isinstance(policy, _Fixed):
        raise ConfigError("an exported file runs with the policy that is in it; export the model with another one")


def _on_canvas_of(images: Tensor, canvas: Sequence[int]) -> Tensor:
    """The images with zeros at the right and the bottom up to a canvas (height, width)."""
    down, right = canvas[0] - images.shape[2], canvas[1] - images.shape[3]
    if down < 0 or right < 0:
        raise ConfigError(
            f"the file takes images of up to {canvas[0]}x{canvas[1]} pixels, and this is {images.shape[2]}x"
            f"{images.shape[3]} as the network sees it; export with --canvas {images.shape[2]} {images.shape[3]}"
        )
    return F.pad(images, (0, right, 0, down))


def _trace(known: dict[str, Any], found: dict[str, Tensor], grid: tuple[int, int], valid: Tensor) -> Trace:
    """The trace that the outputs of a program tell of."""
    keep = found["keep"].bool().unbind(1)
    aux: list[dict[str, Tensor]] = [{} for _ in range(len(keep) + 1)]
    aux[0]["exported"] = found["macs"].double()
    for i, block in enumerate(known["stages"]):
        aux[block + 1]["exited"] = found["exited"][:, i].bool()
    prefix = tuple((before, after) for before, after in known["prefix"])
    return Trace(grid, valid, keep, keep, prefix, tuple(aux))


def load_exported(path: Path) -> Model:
    """The model of an exported file, in evaluation mode; it has no weights of its own, and cannot be trained."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    opened = runtime(path)
    config = from_json(ModelConfig, opened.known["config"], where=str(path))
    config = replace(config, execution=Execution())
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    model = model.to_empty(device="cpu").requires_grad_(False).eval()
    model.network.policy = _Fixed(model.policy)
    if isinstance(model, Segmenter):
        model.net.forward = _Network(opened, model)
    elif isinstance(model, Detector):
        model.run = _Finder(opened, model)
    return model
