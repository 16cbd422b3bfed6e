"""A policy as a user would write it, outside of the package: similar tokens are merged, and separated again."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from sievit.policies import Notes, Policy, PolicyConfig, Projections, register
from sievit.tokens import Tokens, Trace


@dataclass(frozen=True)
class MergingConfig(PolicyConfig):
    """A share of an image's tokens is merged into others in each block."""

    swept: ClassVar = ("share", (0.02, 0.05, 0.08))
    share: float = 0.05


@register(MergingConfig)
class Merging(Policy):
    """Token merging (ToMe, arXiv 2210.09461, section 3), unmerged after each piece of the loop."""

    needs = ("num_heads",)

    def __init__(self, config: MergingConfig, *, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.config, self.depth, self.head_dim = config, depth, embed_dim // num_heads

    def decides_at(self, index: int) -> bool:
        return index == 0

    def decides_inside(self, index: int) -> bool:
        return True

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        tokens = tokens.select(None)
        return (tokens.merge(trace.aux[-1]["owner"]) if trace.aux else tokens), {}  # a new piece of the loop

    def inside_block(self, index: int, tokens: Tokens, trace: Trace, projections: Projections) -> tuple[Tokens, Notes]:
        left = tokens.valid_or_all() if tokens.keep is None else tokens.keep  # (b, n)
        odd = left.cumsum(1) % 2 == 1  # tokens go, in turns, into two sets; those of the first may be merged
        keys = F.normalize(projections.keys().float(), dim=2)  # (b, n, d)
        likeness = (keys @ keys.mT).masked_fill(~(left & ~odd)[:, None], -torch.inf)
        best, owner = likeness.masked_fill(~(left & odd)[..., None], -torch.inf).max(2)  # (b, n)
        rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        count = (tokens.valid_or_all().sum(1, keepdim=True) * self.config.share).floor()
        itself = torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
        tokens = tokens.merge(torch.where((rank < count) & best.isfinite(), owner, itself))
        assert tokens.owner is not None
        return tokens, {"owner": tokens.owner, **self.dense_notes(index, tokens)}

    def after_piece(self, tokens: Tokens, trace: Trace) -> Tokens:
        return tokens.unmerge()

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        n = tokens.valid_or_all().sum(1).double()
        return {"macs": n**2 * self.head_dim} if index < self.depth else {}
