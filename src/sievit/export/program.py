"""A model's network as one program, in which tokens that are left out are not computed.

How many tokens a block computes depends on what is in the images; in the program it is a number that is known when it
runs. Of a batch each block computes as many tokens per image as the image with the most of them needs. A static program
has the shapes of one canvas instead, and the counts of a policy that has static ones: no shape depends on a value.
"""

from dataclasses import dataclass
from typing import Any

import torch

from sievit.config import ConfigError
from sievit.models.base import Model
from sievit.models.inputs import Size
from sievit.models.programs import Program

FREE = 4096
"""Upper bound of the batch, and of rows and columns of tokens."""


@dataclass(frozen=True)
class Made:
    """A program.

    Attributes:
        exported: takes `inputs` and returns `outputs`, both named: normalised `images` (b, 3, H, W), and of detectors
            and static programs `sizes` (b, 2) int64, height and width of each image on its padded canvas.
        outputs: of a segmenter `scores` (b, k, H, W), logits or those of attention-to-mask heads; of a detector
            `boxes` (b, d, 4) on the pixels of `images`, `labels` (b, d), `scores` (b, d), best first, both zero where
            there is no detection, and `masks` (b, d, m, m), probabilities inside the box; of both `keep` (b, depth, n),
            which grid tokens took part in each block, `macs` (b,), multiply-adds of the policy, `exited`
            (b, stages, n), tokens that left (DToP), and `mlp` (b, depth, n), of policies that decide inside blocks.
        known: what traces of the program have beside that: `prefix`, per block the prefix tokens of attention and MLP;
            `heads`, the blocks behind which heads were computed; `stages`, those behind which tokens leave; `canvas`,
            the (height, width) of a static program.
    """

    exported: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    known: dict[str, Any]


def program_of(model: Model, *, static: bool) -> Program:
    """
    Raises:
        ConfigError: there is none of this kind of model.
    """
    if model.program is None:
        raise ConfigError(f"a {model.kind} has no program, and cannot be exported")
    return model.program(model, static=static)


def program(model: Model, *, canvas: Size | None = None) -> Made:
    """The network of a model as a program.

    Args:
        canvas: (height, width) in pixels of a static program; None: batch, height and width are free.

    Raises:
        ConfigError: another kind of model, or a policy, that has no program.
    """
    net = program_of(model, static=canvas is not None)
    least, unit = net.least, net.unit
    batch, height, width = (
        torch.export.Dim(name, min=low, max=FREE) for name, low in (("batch", 1), ("rows", least), ("columns", least))
    )
    free = {0: batch} if canvas is not None else {0: batch, 2: unit * height, 3: unit * width}
    size = canvas or (6 * unit, 8 * unit)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        _, trace = model.network(images)
    name = type(model.policy).__name__
    args, shapes = {"images": images}, {"images": free}
    if net.static or net.sized:
        args["sizes"], shapes["sizes"] = torch.tensor([size, (size[0] - 1, size[1] // 2)]), {0: batch}
    try:
        with torch.no_grad():
            outputs = tuple(net(**args))
            made = torch.export.export(net, tuple(args.values()), dynamic_shapes=shapes, strict=False)
    except ConfigError:
        raise
    except Exception as error:  # of whatever kind, it says what the exporter cannot do
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"{name} cannot be exported: {reason}") from error
    stages = [index - 1 for index, aux in enumerate(trace.aux) if "exited" in aux]
    known = {"prefix": [list(pair) for pair in trace.prefix], "heads": list(trace.head_blocks), "stages": stages}
    return Made(made, tuple(args), outputs, {**known, "outputs": outputs, "canvas": canvas})
