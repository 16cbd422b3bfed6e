"""The simple pyramid of ViTDet (arXiv 2203.16527, section 3): every level is made from the last map alone."""

from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from sievit.config import Count, variant
from sievit.necks import NeckConfig


@variant("pyramid")
@dataclass(frozen=True)
class PyramidConfig(NeckConfig):
    """A light neck.

    Attributes:
        out_channels: channels of each of the four maps.
    """

    out_channels: Count = 256


class SimplePyramid(nn.Module):
    """One map at stride 16 to four maps at strides 4, 8, 16 and 32."""

    def __init__(self, config: PyramidConfig, *, embed_dim: int) -> None:
        super().__init__()
        self.out_channels = config.out_channels
        half, quarter = embed_dim // 2, embed_dim // 4
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(embed_dim, half, 2, stride=2),
                    LayerNorm2d(half, eps=1e-6),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                ),
                nn.ConvTranspose2d(embed_dim, half, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, config.out_channels, 1, bias=False), LayerNorm2d(config.out_channels, eps=1e-6))
            for c in (quarter, half, embed_dim, embed_dim)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(b, c, h, w) at stride 16, h and w even, to maps "0" to "3" at strides 4, 8, 16, 32."""
        pairs = zip(self.levels, self.projections, strict=True)
        return {str(i): projection(level(x)) for i, (level, projection) in enumerate(pairs)}
