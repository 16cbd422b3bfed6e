"""The programs of the two kinds of model, and what runs in their place when a program is in a file.

A program is what `sievit export` hands to `torch.export`; its outputs are those of `export.program.Made`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.heads.fixed import find
from sievit.models.inputs import ModelConfig, Size, padded_size
from sievit.models.runtimes import Runtime
from sievit.policies import Policy
from sievit.tokens import Trace
from sievit.vit.execution import Execution
from sievit.vit.model import standing

LEAST = 96
"""Pixels of the smallest canvas of a detector's program, which has two cells on its last map."""


class Program(nn.Module):
    """The network of a model as it is exported: `images`, and `sizes` where it takes them, to outputs by name.

    Attributes:
        unit: edges of images are multiples of so many pixels,
        least: and of at least so many of them.
        sized: it takes `sizes` also where it is not static.
    """

    unit: int
    least: int
    sized: bool

    def __init__(self, model: Any, *, static: bool) -> None:
        """
        Args:
            model: of the kind whose program it is.
            static: no shape depends on a value.
        """
        super().__init__()
        self.static, self.mode = static, Execution("packed" if static else "bucketed")

    @staticmethod
    def replace(model: Any, runtime: Runtime) -> None:
        """Let the model run the program in a file in place of its own network."""
        raise NotImplementedError


class SegmenterProgram(Program):
    """Of a segmenter: see `SegmentationNet`."""

    least, sized = 1, False

    def __init__(self, model: Any, *, static: bool) -> None:
        super().__init__(model, static=static)
        self.net, self.unit = model.net, model.vit.config.stride

    @staticmethod
    def replace(model: Any, runtime: Runtime) -> None:
        model.net.forward = SegmenterFile(runtime, model.config)

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        scores, trace = self.net(images, sizes, execution=self.mode)
        return {"scores": scores, **_of_trace(trace, self.net.policy)}


class DetectorProgram(Program):
    """Of a detector."""

    least, sized = LEAST // 32, True

    def __init__(self, model: Any, *, static: bool) -> None:
        super().__init__(model, static=static)
        self.backbone, self.head, self.unit = model.backbone, model.head, model.backbone.size_divisor
        self.hidden = model.config.padding == "hidden"

    @staticmethod
    def replace(model: Any, runtime: Runtime) -> None:
        model.run = DetectorFile(runtime, model.config)

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        features, trace = self.backbone(images, sizes if self.hidden else None, execution=self.mode)
        found = find(self.head, features, (images.shape[2], images.shape[3]), sizes, fixed=self.static)
        there = {name: value for name, value in found._asdict().items() if value is not None}
        return {**there, **_of_trace(trace, self.backbone.policy)}


def _of_trace(trace: Trace, policy: Policy) -> dict[str, Tensor]:
    found = {"keep": torch.stack(trace.keep, dim=1), "macs": policy.cost(trace).float()}
    if any(map(policy.decides_inside, range(len(trace.mlp)))):
        found["mlp"] = torch.stack(trace.mlp, dim=1)
    return {**found, "exited": torch.stack(trace.exited, dim=1)} if trace.exited else found


class Fixed(Policy):
    """The policy of an exported file, which decides in there."""

    def __init__(self, inner: Policy) -> None:
        super().__init__()
        self.config, self.depth, self._inner = inner.config, inner.depth, [inner]
        self.report = inner.report
        self.dense_notes = inner.dense_notes
        self.settings = inner.settings

    def macs(self, trace: Trace) -> Tensor:
        of_file = [aux["exported"] for aux in trace.aux if "exported" in aux]
        return of_file[0] if of_file else self._inner[0].cost(trace)


class SegmenterFile:
    """What a segmenter calls in place of its own network: the file."""

    def __init__(self, runtime: Runtime, config: ModelConfig) -> None:
        self.runtime, self.config, self.classes = runtime, config.vit, len(config.classes)

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


class DetectorFile:
    """What a detector calls in place of `Detector.run`: the file."""

    def __init__(self, runtime: Runtime, config: Any) -> None:
        self.runtime, self.stride, self.hidden = runtime, config.vit.stride, config.padding == "hidden"

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
    if policy is not None and not isinstance(policy, Fixed):
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
    keep, mlp = (found[name].bool().unbind(1) for name in ("keep", "mlp" if "mlp" in found else "keep"))
    aux: list[dict[str, Tensor]] = [{} for _ in range(len(keep) + 1)]
    aux[0]["exported"] = found["macs"].double()
    for i, block in enumerate(known["stages"]):
        aux[block + 1]["exited"] = found["exited"][:, i].bool()
    prefix = tuple((before, after) for before, after in known["prefix"])
    return Trace(grid, valid, keep, mlp, prefix, tuple(aux))
