"""The wiring of a backbone."""

from torch import Tensor, nn

from sievit.config import ConfigError, kind_of
from sievit.necks import NeckConfig
from sievit.necks.adapter import AdapterConfig, ViTAdapter
from sievit.necks.pyramid import PyramidConfig, SimplePyramid
from sievit.policies import Policy, PolicyConfig
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
        sizes: Sizes | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution = Execution(),
    ) -> tuple[dict[str, Tensor], Trace]:
        """See `ViTAdapter.forward`."""
        policy = self.policy if policy is None else policy
        tokens, trace = self.vit(images, policy, sizes, execution=execution)
        return self.pyramid(tokens.map()), trace


Backbone = ViTAdapter | PyramidBackbone


def build_backbone(neck: NeckConfig, vit: ViTConfig, policy: PolicyConfig) -> Backbone:
    """The backbone that the three configurations describe, with random weights."""
    net = ViT(vit)
    parts = {
        "vit": net,
        "policy": net.build_policy(policy),
    }
    if isinstance(neck, AdapterConfig):
        return ViTAdapter(neck, **parts)
    if isinstance(neck, PyramidConfig):
        return PyramidBackbone(neck, **parts)
    raise ConfigError(f"no backbone is known for the neck {kind_of(neck) or type(neck).__name__!r}")
