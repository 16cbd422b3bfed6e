"""A policy as a user would write it, outside of the package: tokens that are left out go on as one fused token."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sievit.policies import Notes, Policy, PolicyConfig, Projections, register
from sievit.tokens import Tokens, Trace


@dataclass(frozen=True)
class FusedConfig(PolicyConfig):
    """Of the tokens that are left, `share` stay behind the attention of each of these blocks."""

    swept: ClassVar = ("share", (0.9, 0.7, 0.5))
    blocks: tuple[int, ...] = (3, 6, 9)
    share: float = 0.7


@register(FusedConfig)
class Fused(Policy):
    """EViT (arXiv 2202.07800, section 3.2): attentive tokens stay, the others become one token, their weighted mean."""

    cascades = True

    def __init__(self, config: FusedConfig, *, embed_dim: int, depth: int) -> None:
        super().__init__()
        self.config, self.depth, self.embed_dim = config, depth, embed_dim

    def decides_at(self, index: int) -> bool:
        return index == 0

    def decides_inside(self, index: int) -> bool:
        return index in self.config.blocks

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        return (tokens.select(None) if index == 0 else tokens), {}

    def inside_block(self, index: int, tokens: Tokens, trace: Trace, projections: Projections) -> tuple[Tokens, Notes]:
        left = tokens.valid_or_all() if tokens.keep is None else tokens.keep  # (b, n)
        scores = projections.attention().masked_fill(~left, -1.0)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        keep = left & (rank < (left.sum(1, keepdim=True) * self.config.share).ceil())
        weights = torch.where(left & ~keep, scores, 0.0)
        weights = (weights / weights.sum(1, keepdim=True).clamp(min=1e-12)).to(tokens.x.dtype)
        fused = (weights[..., None] * tokens.patches).sum(1, keepdim=True)  # (b, 1, c)
        notes = {"scores": scores, **self.dense_notes(index, tokens)}
        return tokens.select(keep).with_extra(torch.cat([tokens.extra, fused], dim=1)), notes

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        if index not in self.config.blocks:
            return {}
        return {"macs": (tokens.valid_or_all().sum(1).double() + tokens.num_prefix) * self.embed_dim}
