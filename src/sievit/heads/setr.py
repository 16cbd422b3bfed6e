"""Heads that classify tokens: linear, an MLP, and SETR's naive and progressive up-sampling (arXiv 2012.15840)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from sievit.config import Count, Rate, variant
from sievit.distributed import world_size
from sievit.heads.semantic import (
    PixelHeadConfig,
    SemanticHead,
    TokenHead,
    extents,
    register_head,
    repeat_edges,
    resize,
)
from sievit.necks.norm import BatchNorm2d
from sievit.tokens import Prediction, Tokens


@variant("linear")
@dataclass(frozen=True)
class LinearConfig(PixelHeadConfig):
    """One linear layer per token (Segmenter's linear decoder, arXiv 2105.05633), behind a layer norm."""


@register_head(LinearConfig)
class Linear(TokenHead):
    """Layer norm and a linear layer."""

    def __init__(self, config: LinearConfig, *, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.loss = config.loss
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.fc = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def classify(self, x: Float[Tensor, "*rows c"]) -> Float[Tensor, "*rows k"]:
        return self.fc(self.norm(x))

    def macs(self, tokens: Num[Tensor, " b"], grid: tuple[int, int]) -> Float[Tensor, " b"]:
        return tokens.double() * self.fc.weight.numel()


@variant("mlp")
@dataclass(frozen=True)
class MLPConfig(PixelHeadConfig):
    """An MLP per token, DToP's stand-in for SETR's convolutions.

    Attributes:
        hidden_dim: width of the hidden layers.
        num_layers: linear layers, the classifying one included.
    """

    hidden_dim: Count = 256
    num_layers: Count = 3


@register_head(MLPConfig)
class MLP(TokenHead):
    """Linear layers with ReLU in between."""

    def __init__(self, config: MLPConfig, *, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.loss = config.loss
        widths = [embed_dim, *[config.hidden_dim] * (config.num_layers - 1), num_classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def classify(self, x: Float[Tensor, "*rows c"]) -> Float[Tensor, "*rows k"]:
        for layer in list(self.layers)[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)

    def macs(self, tokens: Num[Tensor, " b"], grid: tuple[int, int]) -> Float[Tensor, " b"]:
        return tokens.double() * sum(p.numel() for p in self.parameters() if p.ndim == 2)


@variant("setr_naive")
@dataclass(frozen=True)
class SETRNaiveConfig(PixelHeadConfig):
    """SETR-naive: a 1x1 convolution, batch norm, ReLU, up-sampling, and a classifying 1x1 convolution.

    Attributes:
        channels: between the two convolutions.
        dropout: before the second, token by token.
    """

    channels: Count = 256
    dropout: Rate = 0.1


@register_head(SETRNaiveConfig)
class SETRNaive(TokenHead):
    """SETR-naive, token by token: its last convolution commutes with bilinear up-sampling, so it goes first."""

    def __init__(self, config: SETRNaiveConfig, *, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.loss = config.loss
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.fc1 = nn.Linear(embed_dim, config.channels, bias=False)
        self.bn = BatchNorm2d(config.channels)
        self.drop = nn.Dropout(config.dropout)
        self.fc2 = nn.Linear(config.channels, num_classes)

    def classify(self, x: Float[Tensor, "*rows c"]) -> Float[Tensor, "*rows k"]:
        x, bn = self.fc1(self.norm(x)), self.bn
        rows = x.flatten(0, -2)
        if self.training and len(rows) < 2 and world_size() == 1:  # a variance takes two tokens
            rows = F.batch_norm(rows, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        else:
            rows = bn(rows[..., None, None])[..., 0, 0]
        return self.fc2(self.drop(F.relu(rows.view_as(x))))

    def macs(self, tokens: Num[Tensor, " b"], grid: tuple[int, int]) -> Float[Tensor, " b"]:
        return tokens.double() * (self.fc1.weight.numel() + self.fc2.weight.numel())


@variant("setr_pup")
@dataclass(frozen=True)
class SETRPUPConfig(PixelHeadConfig):
    """SETR-PUP: 3x3 convolutions, each followed by up-sampling by two.

    Attributes:
        channels: of all convolutions. num_convs: how many.
        dropout: of whole channels before the classifier.
    """

    channels: Count = 256
    num_convs: Count = 4
    dropout: Rate = 0.1


@register_head(SETRPUPConfig)
class SETRPUP(SemanticHead):
    """SETR-PUP on the whole canvas: tokens that left enter with the features they had then, and keep their maps."""

    def __init__(self, config: SETRPUPConfig, *, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.loss = config.loss
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        widths = [embed_dim, *[config.channels] * config.num_convs]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(BatchNorm2d(config.channels) for _ in self.convs)
        self.drop = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(config.channels, num_classes, 1)
        self.scale = 2**config.num_convs

    def forward(
        self, tokens: Tokens, part: Bool[Tensor, "b n"] | None = None, previous: Prediction | None = None
    ) -> Prediction:
        x = self.norm(tokens.patches).transpose(1, 2).unflatten(2, tokens.grid)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if tokens.valid is None:
                x = F.relu(norm(conv(x)))
            else:  # padding is zero for the convolution and repeats the edge of the image for the up-sampling
                x = F.relu(norm(conv(x * _enlarged(tokens.valid, tokens.grid, 2**i))))
                rows, columns = extents(tokens.valid, tokens.grid)
                x = repeat_edges(x, rows * 2**i, columns * 2**i)
            x = resize(x, (2 * x.shape[2], 2 * x.shape[3]))
        fine = self.classifier(self.drop(x))
        if part is not None and previous is not None:
            earlier = previous.fine
            if earlier is None:
                earlier = resize(previous.maps.unflatten(2, tokens.grid), (fine.shape[2], fine.shape[3]))
            fine = torch.where(_enlarged(part, tokens.grid, self.scale), fine, earlier)
        return Prediction(F.avg_pool2d(fine, self.scale).flatten(2), fine=fine)

    def macs(self, tokens: Num[Tensor, " b"], grid: tuple[int, int]) -> Float[Tensor, " b"]:
        per_cell = self.scale**2 * self.classifier.weight.numel()
        for i, conv in enumerate(self.convs):
            assert isinstance(conv, nn.Conv2d)
            per_cell += 4**i * (conv.weight.numel() + 16 * conv.out_channels)  # and up-sampling to four pixels
        return torch.full(tokens.shape, grid[0] * grid[1] * per_cell, dtype=torch.float64, device=tokens.device)


def _enlarged(mask: Bool[Tensor, "b n"], grid: tuple[int, int], scale: int) -> Bool[Tensor, "b 1 y x"]:
    """(b, h*w) of a grid (h, w) to (b, 1, scale h, scale w)."""
    return mask.unflatten(1, grid)[:, None].repeat_interleave(scale, 2).repeat_interleave(scale, 3)
