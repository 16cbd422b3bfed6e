"""Propagation: a token that is left out gets the update of the most similar token that is computed.

A block adds an update to each token that it computes; of similar tokens the updates are similar. So a token that is
left out keeps its own features, and is moved as the computed token that is nearest to it, instead of staying behind. In
the attention a token counts for those that follow it (proportional attention, ToMe, arXiv 2210.09461).

Letters: b images, n grid tokens, c channels.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sievit.policies.base import Notes
from sievit.tokens import Tokens, chosen_first, similarities


def with_source(tokens: Tokens, notes: Notes) -> tuple[Tokens, Notes]:
    """The canvas with the `source` of each token for the choice that it carries, and notes with the multiply-adds.

    The source is the token with the largest cosine among those that take part, other than the token itself. With gates
    every token has one: it says what a token that takes part would get otherwise, so gates learn by the difference.
    """
    if tokens.keep is None or tokens.owner is not None:
        return tokens, notes
    keep, valid, n = tokens.keep, tokens.valid_or_all(), tokens.keep.shape[1]
    rows = tokens.directions()
    order, most, fewest = _counts(tokens)
    if most == 0:
        return tokens, notes
    chosen = order[:, :most]
    asking = order if tokens.gate is not None else order[:, fewest:]
    alike = similarities(_taken(rows, asking), _taken(rows, chosen))
    if most != fewest:
        alike = alike.masked_fill(~keep.gather(1, chosen)[:, None], -torch.inf)
    if tokens.gate is not None:
        alike = alike.masked_fill(asking[:, :, None] == chosen[:, None], -torch.inf)
    best = chosen.gather(1, alike.argmax(2))
    source = torch.arange(n, device=keep.device).expand(keep.shape).scatter(1, asking, best)
    kept = keep.sum(1).double()
    macs = kept * (valid.sum(1) - kept) * rows.shape[2]
    return replace(tokens, source=source), {**notes, "propagation": macs}


def propagated(before: Tokens, after: Tokens, *, selected: bool = False) -> Tokens:
    """The canvas `after` some blocks, with the update of its source added to each token that was left out of them.

    Args:
        selected: the blocks computed the chosen tokens alone, so that of the others it is not known what they would get
            by themselves, and their gates learn nothing.
    """
    assert before.source is not None and before.keep is not None
    update = after.patches - before.patches
    weight = before.keep.to(update.dtype)
    if before.gate is not None:
        gate = before.gate.to(update.dtype)
        weight = torch.where(before.keep, gate, gate.detach()) if selected else gate
    left = (1 - weight) * before.valid_or_all()
    return after.replace_patches(after.patches + left[..., None] * _taken(update, before.source))


def _taken(rows: Float[Tensor, "b n c"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    first = rows.shape[1] * torch.arange(rows.shape[0], device=rows.device)[:, None]
    return rows.flatten(0, 1).index_select(0, (index + first).flatten()).unflatten(0, index.shape)


def _counts(tokens: Tokens) -> tuple[Int[Tensor, "b n"], Any, Any]:
    """The positions with the chosen ones first, and how many of them the images have at most and at least."""
    assert tokens.keep is not None
    order = chosen_first(tokens.keep)
    if tokens.order is not None:
        most = tokens.order.shape[1]
        return order, most, most if tokens.real is None else 0
    kept = tokens.keep.sum(1)
    if torch.compiler.is_exporting():
        most = kept.max().clamp(min=2).item()  # programs are made for no shape of 0 or 1
        torch._check(most >= 2)
        torch._check(most <= order.shape[1])
        return order, most, 0
    return order, int(kept.max()), int(kept.min())
