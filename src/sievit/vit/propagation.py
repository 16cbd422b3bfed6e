"""Propagation: a token that is left out gets the update of the most similar token that is computed.

A block adds an update to each token that it computes; of similar tokens the updates are similar. So a token that is
left out keeps its own features, and is moved as the computed token that is nearest to it, instead of staying behind.
That one is computed as the mean of itself and of those that follow it, and counts for all of them in the attention, as
a token does in ToMe (arXiv 2210.09461) that others are merged with.

Letters: b images, n grid tokens, c channels.
"""

from dataclasses import replace

import torch

from sievit.policies.base import Notes
from sievit.rows import similarities, taken
from sievit.tokens import Tokens


def with_source(tokens: Tokens, notes: Notes) -> tuple[Tokens, Notes]:
    """The canvas with the `source` of each token for the choice that it carries, and notes with the multiply-adds.

    The source is the token with the largest cosine among those that take part, other than the token itself. With gates
    every token has one: it says what a token that takes part would get otherwise, so gates learn by the difference.
    """
    if tokens.keep is None or tokens.owner is not None:
        return tokens, notes
    keep, valid, n = tokens.keep, tokens.valid_or_all(), tokens.keep.shape[1]
    rows = tokens.directions()
    chosen, rest = tokens.parted()
    itself = torch.arange(n, device=keep.device).expand(keep.shape)
    if not torch.compiler.is_exporting() and not chosen.shape[1]:
        return tokens, notes
    asking = rest if tokens.gate is None else itself
    alike = similarities(taken(rows, asking), taken(rows, chosen))
    if torch.compiler.is_exporting() or chosen.shape[1] + rest.shape[1] != n:
        alike = alike.masked_fill(~keep.gather(1, chosen)[:, None], -torch.inf)
    if tokens.gate is not None:
        alike = alike.masked_fill(asking[:, :, None] == chosen[:, None], -torch.inf)
    best = chosen.gather(1, alike.max(2).indices)  # argmax takes twice as long
    source = itself.scatter(1, asking, best)
    if tokens.valid is not None:
        source = torch.where(valid, source, itself)
    kept = keep.sum(1).double()
    macs = kept * (valid.sum(1) - kept) * rows.shape[2]
    return replace(tokens, source=source), {**notes, "propagation": macs}


def propagated(whole: Tokens, before: Tokens, after: Tokens, *, selected: bool = False) -> Tokens:
    """The canvas `whole`, with the update that its token got added to each, and to a token that was left out that of
    its source.

    Args:
        before: the canvas with which the blocks began, whose tokens stand for those that follow them (`averaged`).
        after: what they made of it.
        selected: the blocks computed the chosen tokens alone, so that of the others it is not known what they would get
            by themselves, and their gates learn nothing.
    """
    leaders, update = whole.leaders(), after.patches - before.patches
    assert whole.source is not None and whole.keep is not None and leaders is not None
    if whole.gate is None:  # what is left out has no update by itself
        return after.replace_patches(whole.patches + taken(update, leaders))
    gate = whole.gate.to(update.dtype)
    weight = torch.where(whole.keep, gate, gate.detach()) if selected else gate
    left = (1 - weight) * whole.valid_or_all()
    return after.replace_patches(whole.patches + update + left[..., None] * taken(update, whole.source))
