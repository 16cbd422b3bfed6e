"""ToMe: similar tokens are merged, and separated again for dense tasks (ICLR 2023, arXiv 2210.09461)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from sievit.config import Natural, Share, variant
from sievit.policies.base import FEWEST, Dial, Notes, Policy, PolicyConfig, Projections, register
from sievit.policies.merging import again, matched, matching_macs
from sievit.policies.selection import ROUNDING
from sievit.tokens import Tokens, Trace


@variant("tome")
@dataclass(frozen=True)
class ToMeConfig(PolicyConfig):
    """In each block the most similar pairs of tokens become one.

    Attributes:
        first_block: the first block that merges tokens (0-based).
        share: of an image's tokens that are merged into others, per block; at most half of those that are left.
    """

    swept: ClassVar = ("share", (0.02, 0.04, 0.06))

    first_block: Natural = 0
    share: Share = 0.05


@register(ToMeConfig)
class ToMe(Policy):
    """Token merging (arXiv 2210.09461, section 3): the tokens that are left go, in turns, into two sets; each of the
    first finds the most similar key of the second, and the best pairs are merged between attention and MLP.

    A merged token is the mean of all that it stands for, and the logarithm of their number is added to its logits as a
    key. After each piece of the loop every token has the value of its owner.
    """

    can_propagate = False

    needs = ("num_heads",)

    def __init__(self, config: ToMeConfig, *, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.config, self.depth, self.head_dim = config, depth, embed_dim // num_heads

    def decides_at(self, index: int) -> bool:
        return index == 0

    def decides_inside(self, index: int) -> bool:
        return index >= self.config.first_block and self.config.share > 0

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        return again(index, tokens, trace), {}

    def inside_block(self, index: int, tokens: Tokens, trace: Trace, projections: Projections) -> tuple[Tokens, Notes]:
        keys = F.normalize(projections.keys().detach().float(), dim=2)
        best, owner, macs = matched(tokens, keys)
        count = (tokens.valid_or_all().sum(1, keepdim=True) * self.config.share + ROUNDING).floor()
        rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        itself = torch.arange(owner.shape[1], device=owner.device)
        tokens = tokens.merge(torch.where((rank < count) & best.isfinite(), owner, itself))
        assert tokens.owner is not None
        return tokens, {"owner": tokens.owner, "macs": macs}

    def after_piece(self, tokens: Tokens, trace: Trace) -> Tokens:
        return tokens.unmerge()

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        there = index < self.depth and self.decides_inside(index)
        return {"macs": matching_macs(tokens, self.head_dim)} if there else {}

    def dials(self, passes: Callable[[PolicyConfig], Iterable[Trace]]) -> list[Dial]:
        most = (1 - FEWEST) / max(1, self.depth - self.config.first_block)
        return [lambda position: replace(self.config, share=round(position * most, 4))]
