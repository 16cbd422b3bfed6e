"""The wiring of a backbone, and what it costs."""

import torch
from torch import Tensor, nn

from sievit.config import ConfigError, kind_of
from sievit.measure.flops import block_macs, count_macs, traced_macs
from sievit.models.inputs import padded_size
from sievit.necks import NeckConfig
from sievit.necks.adapter import AdapterConfig, ViTAdapter
from sievit.necks.pyramid import PyramidConfig, SimplePyramid
from sievit.policies import KeepAllConfig, Policy, PolicyConfig
from sievit.tokens import Trace
from sievit.vit import Execution, Sizes, ViT, ViTConfig


class PyramidBackbone(nn.Module):
    """A plain ViT with the simple pyramid; the light alternative to `ViTAdapter`, called in the same way."""

    size_divisor = 32

    def __init__(self, config: PyramidConfig, *, vit: ViT, policy: Policy) -> None:
        super().__init__()
        if vit.config.stride != 16:
            raise ConfigError(f"the pyramid needs a token per 16 pixels, not {vit.config.stride}: set token_stride=16")
        self.out_channels = config.out_channels
        self.vit = vit
        self.policy = policy
        self.pyramid = SimplePyramid(config, embed_dim=vit.config.embed_dim)

    def forward(
        self,
        images: Tensor,
        sizes: Sizes | Tensor | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution = Execution(),
    ) -> tuple[dict[str, Tensor], Trace]:
        """See `ViTAdapter.forward`."""
        policy = self.policy if policy is None else policy
        tokens, trace = self.vit(images, policy, sizes, execution=execution)
        return self.pyramid(tokens.map()), trace

    def sampling_macs(self, size: tuple[int, int]) -> float:
        """See `ViTAdapter.sampling_macs`."""
        return 0.0

    def timed_parts(self) -> list[tuple[object, str, str]]:
        """See `ViTAdapter.timed_parts`."""
        return [(self.pyramid, "forward", "neck: pyramid")]


Backbone = ViTAdapter | PyramidBackbone


def build_backbone(neck: NeckConfig, vit: ViTConfig, policy: PolicyConfig) -> Backbone:
    """The backbone that the three configurations describe, with random weights."""
    net = ViT(vit)
    if isinstance(neck, AdapterConfig):
        return ViTAdapter(neck, vit=net, policy=net.build_policy(policy))
    if isinstance(neck, PyramidConfig):
        return PyramidBackbone(neck, vit=net, policy=net.build_policy(policy))
    raise ConfigError(f"no backbone is known for the neck {kind_of(neck) or type(neck).__name__!r}")


def backbone_gflops(backbone: Backbone, trace: Trace, sizes: Sizes) -> dict[str, Tensor]:
    """(b,) GFLOPs by part: blocks as traced, the policy's products, and the rest by each image's size.

    Args:
        sizes: per image (height, width) in pixels; what pads it to the backbone's divisor is counted.
    """
    config, padded = backbone.vit.config, [padded_size(size, backbone.size_divisor) for size in sizes]
    per_pixel = 3 * config.embed_dim * (config.patch_size / config.stride) ** 2
    patches = [per_pixel * height * width for height, width in padded]
    blocks = traced_macs(config, trace)
    rest = [_rest_macs(backbone, size) - embed for size, embed in zip(padded, patches, strict=True)]
    parts = {
        "patch_embed": torch.tensor(patches, dtype=torch.float64, device=blocks.device),
        "blocks": blocks,
        "policy": backbone.policy.cost(trace),
        "neck": torch.tensor(rest, dtype=torch.float64, device=blocks.device),
    }
    return {name: macs / 1e9 for name, macs in parts.items()}


def _rest_macs(backbone: Backbone, size: tuple[int, int]) -> float:
    """Multiply-adds of everything in the backbone that is neither a block nor the policy."""
    config = backbone.vit.config
    images = torch.empty(1, 3, *size, device="meta")
    total = count_macs(backbone, images, policy=backbone.vit.build_policy(KeepAllConfig()))
    tokens = backbone.vit.num_prefix + (size[0] // config.stride) * (size[1] // config.stride)
    return total - config.depth * float(block_macs(config, torch.tensor(tokens))) + backbone.sampling_macs(size)
