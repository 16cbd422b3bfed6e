"""Tokens that are spread over the grid and over what is on it, for all others to follow. No paper's method."""

from dataclasses import dataclass, field
from functools import cache
from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval
from jaxtyping import Float, Int
from torch import Tensor

from sievit.config import variant
from sievit.policies.base import Notes, register
from sievit.policies.selection import SharesConfig, SharesPolicy, dither
from sievit.tokens import Tokens, Trace, similarities

ANCHOR = 2.0
"""Score of a token of the pattern; the others have at most 1."""


@variant("spread")
@dataclass(frozen=True)
class SpreadConfig(SharesConfig):
    """A fixed share of the tokens; the others get the updates of the most similar ones. Needs no training.

    Attributes:
        even: this part of the share stands in a fixed, even pattern; the rest are the tokens that are least similar to
            any of those. At 1 no image changes the choice.
        propagate: as of every policy.
    """

    even: Annotated[float, Interval(gt=0, le=1)] = 0.5
    propagate: bool = field(default=True, kw_only=True)


@register(SpreadConfig)
class Spread(SharesPolicy):
    """Control for what learns its choice: other tokens wherever the share changes, so that every token that is left out
    has a similar one to follow.
    """

    config: SpreadConfig

    def scores(self, index: int, tokens: Tokens) -> Float[Tensor, "b n"]:
        b, config = tokens.x.shape[0], self.config
        if config.even == 1:
            return -dither(tokens.grid, index, device=tokens.x.device).expand(b, -1)
        anchors = self._anchors(index, tokens)
        rows = tokens.directions()
        alike = similarities(rows, rows.index_select(1, anchors))
        if tokens.valid is not None:
            alike = alike.masked_fill(~tokens.valid.index_select(1, anchors)[:, None], -1.0)
        return (-alike.amax(2)).index_fill(1, anchors, ANCHOR)

    def _anchors(self, index: int, tokens: Tokens) -> Int[Tensor, " a"]:
        """The positions of the pattern, which are those of every image and of larger grids too."""
        part = self.config.even * self.shares[index - self.config.first_block]
        if all(isinstance(edge, int) for edge in tokens.grid):
            return torch.tensor(_pattern(tokens.grid, index, part), device=tokens.x.device)
        found = (dither(tokens.grid, index, device=tokens.x.device) < part).nonzero().squeeze(1)
        torch._check(found.shape[0] >= 2)  # programs are made for no shape of 0 or 1
        return found

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        tokens, notes = super().before_block(index, tokens, trace)
        return tokens, {**notes, **self.dense_notes(index, tokens)} if "scores" in notes else notes

    def decides_at(self, index: int) -> bool:
        return index == 0 or self.changes_at(index)

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        decides = index < self.depth and self.changes_at(index)
        if not decides or self.shares[index - self.config.first_block] == 1 or self.config.even == 1:
            return {}
        valid, anchors = tokens.valid_or_all(), self._anchors(index, tokens)
        return {"macs": valid.sum(1).double() * valid.index_select(1, anchors).sum(1) * self.embed_dim}


@cache
def _pattern(grid: tuple[int, int], index: int, part: float) -> tuple[int, ...]:
    pattern = dither(grid, index, device=torch.device("cpu")).numpy()
    return tuple(np.flatnonzero((pattern < part) | (pattern == pattern.min())).tolist())
