"""A segmenter's network as one program: batch, height and width are free, left-out tokens are not computed.

How many tokens a block computes depends on what is in the images; in the program it is a number that is known when it
runs. Of a batch each block computes as many tokens per image as the image with the most of them needs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.models.base import Model
from sievit.models.segmenter import Segmenter
from sievit.policies import KeepAllConfig
from sievit.vit import Execution

OUTPUTS = ("scores", "keep", "macs", "exited")
"""Of a program: scores (b, k, H, W), logits or those of attention-to-mask heads; keep (b, depth, n), which grid tokens
took part in each block; macs (b,), multiply-adds of the policy; exited (b, stages, n), tokens that left (DToP)."""


class Program(nn.Module):
    """Normalised images (b, 3, H, W), whose sides are multiples of the stride of the tokens, to `OUTPUTS`."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.net = model.net

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        scores, trace = self.net(images, execution=Execution("bucketed"))
        found = (scores, torch.stack(trace.keep, dim=1), self.net.policy.macs(trace).float())
        return (*found, torch.stack(trace.exited, dim=1)) if trace.exited else found


def program(model: Model) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The exported program, and what its trace has beside the outputs: `prefix`, per block the prefix tokens of
    attention and MLP; `heads`, the blocks behind which heads were computed; `stages`, those behind which tokens leave.

    Raises:
        ConfigError: another kind of model than a segmenter, a mode or policy that has no program.
    """
    if not isinstance(model, Segmenter):
        raise ConfigError(f"a {model.kind} cannot be exported yet: its proposals are no program; segmenters can")
    stride = model.vit.config.stride
    images = torch.rand(2, 3, 8 * stride, 10 * stride, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        _, trace = model.net(images)
    if any(not torch.equal(*pair) for pair in zip(trace.keep, trace.mlp, strict=True)):
        raise ConfigError(f"{type(model.policy).__name__} decides inside blocks, and has no program yet")
    if isinstance(model.config.policy, KeepAllConfig):
        model.policy.requires_grad_(False)
    batch, height, width = (torch.export.Dim(name, min=1, max=4096) for name in ("batch", "rows", "columns"))
    shapes = ({0: batch, 2: stride * height, 3: stride * width},)
    try:
        with torch.no_grad():
            made = torch.export.export(Program(model), (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of whatever kind, it says what the exporter cannot do
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"{type(model.policy).__name__} cannot be exported: {reason}") from error
    stages = [index - 1 for index, aux in enumerate(trace.aux) if "exited" in aux]
    known = {"prefix": [list(pair) for pair in trace.prefix], "heads": list(trace.head_blocks), "stages": stages}
    return made, known
