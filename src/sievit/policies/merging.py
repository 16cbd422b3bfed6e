"""What policies that look for similar tokens have in common."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sievit.policies.selection import counted, dither
from sievit.rows import chosen_first, most_of, similarities, taken
from sievit.tokens import Tokens, Trace

SLOWEST = 0.75
"""At least this part of the tokens is left after a round."""

CLOSE = 1e-4
"""Of cosines: of a plain area, where all are 1 but for their last digits, the first tokens are left out."""


def again(index: int, tokens: Tokens, trace: Trace) -> Tokens:
    """The canvas at the start of a piece of the loop: with all tokens, or merged as it was at the end of the last."""
    if index == 0:
        return tokens.select(None)
    owner = trace.last("owner")
    return tokens if owner is None or tokens.owner is not None else tokens.select(None).merge(owner)


def matched(
    tokens: Tokens, rows: Float[Tensor, "b n d"], *, most: Any = None
) -> tuple[Float[Tensor, "b n"], Int[Tensor, "b n"], Float[Tensor, " b"]]:
    """Bipartite matching: the tokens that take part go, in turns, into two sets, and each of the first is given the
    most similar of the second.

    Args:
        rows: unit vectors; tokens are as similar as their product.
        most: at most so many tokens of an image take part; None: it is counted, so that a shape depends on it.

    Returns:
        The similarity (minus infinity for all that are not of the first set), the position of the other, and the
        multiply-adds.
    """
    left: Bool[Tensor, "b n"] = tokens.valid_or_all() if tokens.keep is None else tokens.keep
    order = chosen_first(left)[:, : most_of(left) if most is None else most]
    first, second = order[:, ::2], order[:, 1::2]
    best = rows.new_full(left.shape, -torch.inf)
    owner = torch.arange(left.shape[1], device=left.device).repeat(left.shape[0], 1)
    macs = _pairs(left) * rows.shape[2]
    if not torch.compiler.is_exporting() and not second.shape[1]:
        return best, owner, macs
    alike = similarities(taken(rows, first), taken(rows, second))
    alike = alike.masked_fill(~left.gather(1, second)[:, None], -torch.inf)
    value, which = alike.max(2)
    value = value.masked_fill(~left.gather(1, first), -torch.inf)
    return best.scatter(1, first, value), owner.scatter(1, first, second.gather(1, which)), macs


def matching_macs(tokens: Tokens, channels: int) -> Float[Tensor, " b"]:
    """(b,): of a matching of all tokens by vectors of so many channels."""
    return _pairs(tokens.valid_or_all()) * channels


def _pairs(left: Bool[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """(b,): pairs of one token of each of the two sets."""
    n = left.sum(1).double()
    return (n / 2).ceil() * (n / 2).floor()


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
