"""Tokens that stand for all others: each one that is left out has a similar one to follow."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sievit.config import variant
from sievit.policies.base import Notes, register
from sievit.policies.gates import dither
from sievit.policies.merging import matched
from sievit.policies.selection import SharesConfig, SharesPolicy, counted
from sievit.tokens import Tokens, Trace

SLOWEST = 0.75
"""At least this part of the tokens is left after a round."""

CLOSE = 1e-4
"""Of cosines: of a plain area, where all are 1 but for their last digits, the first tokens are left out."""


@variant("spread")
@dataclass(frozen=True)
class SpreadConfig(SharesConfig):
    """A fixed share of the tokens, most similar ones left out; those get the updates of the others. Needs no training.

    Attributes:
        propagate: as of every policy.
    """

    propagate: bool = field(default=True, kw_only=True)

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The JSON of versions in which a part of the tokens stood in an even pattern."""
        return {name: value for name, value in data.items() if name != "even"}


@register(SpreadConfig)
class Spread(SharesPolicy):
    """Wherever the share changes similar tokens are left out, and those that stay stand for them (`covering`).

    No paper's: the matching of ToMe (arXiv 2210.09461), once for several blocks, without merging.
    """

    config: SpreadConfig

    def scores(self, index: int, tokens: Tokens) -> Float[Tensor, "b n"]:
        return -covering(tokens, self._share(index))

    def _share(self, index: int) -> float:
        return self.shares[index - self.config.first_block]

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        tokens, notes = super().before_block(index, tokens, trace)
        return tokens, {**notes, **self.dense_notes(index, tokens)} if "scores" in notes else notes

    def decides_at(self, index: int) -> bool:
        return index == 0 or self.changes_at(index)

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        if index == self.depth or not self.changes_at(index) or self._share(index) == 1:
            return {}
        return {"macs": covering_macs(tokens, self._share(index))}


def covering(tokens: Tokens, share: float) -> Float[Tensor, "b n"]:
    """(b, n) in 0..1: the share of the tokens that are left when this one is left out.

    In each round the tokens that are left are `matched` by their features, and the most similar ones of the first set
    are left out, until the `share` is left. The order of those is an even pattern over the grid.
    """
    rows, keep = tokens.directions().detach(), tokens.valid_or_all()
    total = left = keep.sum(1, keepdim=True)
    order = rows.new_zeros(keep.shape)
    n = most = keep.shape[1]
    for part in _rounds(share):
        alike, _, _ = matched(tokens.select(keep), rows, most=most)
        rank = (alike / CLOSE).round().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        after, most = counted(total, part), counted(n, part)
        out = rank < left - after
        order, keep, left = torch.where(out, (left - rank - 0.5) / total, order), keep & ~out, after
    return torch.where(keep, left / total * dither(tokens.grid, 0, device=rows.device), order)


def covering_macs(tokens: Tokens, share: float) -> Float[Tensor, " b"]:
    """(b,): what `covering` costs, of a canvas of which only shapes count."""
    total = left = tokens.valid_or_all().sum(1)
    macs = torch.zeros_like(total, dtype=torch.float64)
    for part in _rounds(share):
        macs = macs + (left - left // 2).double() * (left // 2) * tokens.x.shape[2]
        left = counted(total, part)
    return macs


def _rounds(share: float) -> list[float]:
    """The parts of all tokens that are left after each round."""
    if share >= 1:
        return []
    number = math.ceil(math.log(share) / math.log(SLOWEST))
    return [share ** (i / number) for i in range(1, number)] + [share]
