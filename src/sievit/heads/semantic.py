"""The base of heads of semantic segmentation: they classify tokens, all of an image or those that are left.

Letters: b images, n = h*w grid tokens, t packed tokens, c channels, k classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from sievit.config import Config, ConfigError, variants
from sievit.losses import PixelLossConfig, pixel_loss
from sievit.tokens import Prediction, Tokens
from sievit.vit.packed import Packing, unpack


@dataclass(frozen=True)
class SemanticHeadConfig(Config):
    """Base of every semantic head's configuration."""


@dataclass(frozen=True)
class PixelHeadConfig(SemanticHeadConfig):
    """Base of the heads that learn from the cross-entropy of the pixels."""

    loss: PixelLossConfig = field(default_factory=PixelLossConfig, kw_only=True)


class SemanticHead(nn.Module):
    """A head behind some block: tokens to a `Prediction`."""

    loss: PixelLossConfig = PixelLossConfig()
    """Of `losses`; a head with a `PixelHeadConfig` takes it from there."""
    scale: int = 1
    """Predictions per token and side of an image."""

    def forward(
        self, tokens: Tokens, part: Bool[Tensor, "b n"] | None = None, previous: Prediction | None = None
    ) -> Prediction:
        """Predictions for the tokens of `part`, None: for all; elsewhere the maps of `previous`, or zeros."""
        raise NotImplementedError

    def losses(
        self, prediction: Prediction, grid: tuple[int, int], labels: Int[Tensor, "b H W"], ignore_index: int
    ) -> dict[str, Float[Tensor, ""]]:
        """Weighted losses by name, for labels (b, H, W) of the whole canvas."""
        fine = prediction.fine if prediction.fine is not None else prediction.maps.unflatten(2, grid)
        return {"pixel": pixel_loss(fine, labels, ignore_index=ignore_index, config=self.loss)}

    def macs(self, tokens: Num[Tensor, " b"], grid: tuple[int, int]) -> Float[Tensor, " b"]:
        """Multiply-adds for (b,) tokens of a canvas of `grid`."""
        raise NotImplementedError


class TokenHead(SemanticHead):
    """A head that classifies each token by itself."""

    def classify(self, x: Float[Tensor, "*rows c"]) -> Float[Tensor, "*rows k"]:
        """(..., c) to (..., k) logits."""
        raise NotImplementedError

    def forward(
        self, tokens: Tokens, part: Bool[Tensor, "b n"] | None = None, previous: Prediction | None = None
    ) -> Prediction:
        unseen = torch.compiler.is_exporting() and previous is None  # nobody sees what it says of the others
        if part is None or unseen:
            return Prediction(self.classify(tokens.patches).transpose(1, 2))
        packing = Packing.of(part)
        logits = self.classify(tokens.patches.flatten(0, 1).index_select(0, packing.index))
        return Prediction(on_canvas(logits, packing, part.shape, previous))


def on_canvas(
    logits: Float[Tensor, "t k"], packing: Packing, shape: torch.Size, previous: Prediction | None
) -> Float[Tensor, "b k n"]:
    """Logits (t, k) of packed tokens as maps (b, k, n), over those of an earlier prediction."""
    if previous is None:
        canvas = logits.new_zeros(*shape, logits.shape[1])
    else:
        canvas = previous.maps.transpose(1, 2).contiguous()
    return unpack(canvas, logits, packing).transpose(1, 2)


H = TypeVar("H", bound=type[SemanticHead])
_HEADS: dict[type[SemanticHeadConfig], Any] = {}


def register_head(config_class: type[SemanticHeadConfig]) -> Callable[[H], H]:
    """Class decorator: `build_head` makes this head from a `config_class`."""

    def mark(cls: H) -> H:
        _HEADS[config_class] = cls
        return cls

    return mark


def build_head(config: SemanticHeadConfig, *, embed_dim: int, num_classes: int) -> SemanticHead:
    """The head that `config` describes, with random weights."""
    if type(config) not in _HEADS:
        raise ConfigError(f"no head is registered for {type(config).__name__} (known: {', '.join(semantic_heads())})")
    return _HEADS[type(config)](config, embed_dim=embed_dim, num_classes=num_classes)


def semantic_heads() -> dict[str, type[SemanticHeadConfig]]:
    """Every semantic head's configuration, by name."""
    return variants(SemanticHeadConfig)


def resize(maps: Float[Tensor, "b k h w"], size: tuple[int, int]) -> Float[Tensor, "b k H W"]:
    """(b, k, h, w) to (b, k, *size), bilinearly; the maps themselves where they have that size."""
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def extents(valid: Bool[Tensor, "b n"], grid: tuple[int, int]) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """Rows and columns of each image's tokens on a canvas of `grid`."""
    inside = valid.unflatten(1, grid)
    return inside[:, :, 0].sum(1), inside[:, 0].sum(1)


def repeat_edges(
    maps: Float[Tensor, "b k h w"], rows: Int[Tensor, " b"], columns: Int[Tensor, " b"]
) -> Float[Tensor, "b k h w"]:
    """The maps with the last of each image's `rows` and `columns` repeated over the padding behind them, so that
    resizing an image gives the same with and without padding."""
    b, k, h, w = maps.shape
    y = torch.arange(h, device=maps.device).minimum(rows[:, None] - 1)  # (b, h)
    x = torch.arange(w, device=maps.device).minimum(columns[:, None] - 1)
    index = (y[:, :, None] * w + x[:, None, :]).flatten(1)[:, None]
    return maps.flatten(2).gather(2, index.expand(b, k, h * w)).view(b, k, h, w)
