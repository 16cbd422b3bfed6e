"""ALGM: tokens are merged in small windows first, and anywhere later (CVPR 2024, arXiv 2406.09936)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from sievit.config import Finite, Natural, variant
from sievit.policies.base import Dial, Notes, Policy, PolicyConfig, Projections, register
from sievit.policies.merging import again, matched, matching_macs
from sievit.tokens import Tokens, Trace


@variant("algm")
@dataclass(frozen=True)
class ALGMConfig(PolicyConfig):
    """Tokens that are similar enough are merged: early within windows of two by two, later wherever they are.

    Attributes:
        local_block: in which windows are merged, between attention and MLP (0-based).
        global_block: in which similar pairs are merged, wherever they stand.
        threshold: cosine similarity from which on tokens are merged; in a window the mean of its pairs.
    """

    swept: ClassVar = ("threshold", (0.98, 0.95, 0.9, 0.85, 0.8))

    local_block: Natural = 0
    global_block: Natural = 5
    threshold: Finite = 0.88


@register(ALGMConfig)
class ALGM(Policy):
    """Adaptive local-then-global merging (arXiv 2406.09936, section 3). The number of tokens follows the image; before
    a head each token has the value of its owner."""

    can_propagate = False

    def __init__(self, config: ALGMConfig, *, embed_dim: int, depth: int) -> None:
        super().__init__()
        self.config, self.depth, self.embed_dim = config, depth, embed_dim

    def decides_at(self, index: int) -> bool:
        return index == 0

    def decides_inside(self, index: int) -> bool:
        return index in (self.config.local_block, self.config.global_block)

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        return again(index, tokens, trace), {}

    def inside_block(self, index: int, tokens: Tokens, trace: Trace, projections: Projections) -> tuple[Tokens, Notes]:
        rows = tokens.directions().detach()
        notes: Notes = {}
        if index == self.config.local_block:
            owner = self._windows(tokens, rows)
        else:
            best, other, notes["macs"] = matched(tokens, rows)
            owner = torch.where(best > self.config.threshold, other, torch.arange(other.shape[1], device=other.device))
        tokens = tokens.merge(owner)
        assert tokens.owner is not None
        return tokens, {"owner": tokens.owner, **notes}

    def _windows(self, tokens: Tokens, rows: Tensor) -> Int[Tensor, "b n"]:
        """(b, n): the first token of each window whose tokens, all on the image, are similar; else each its own."""
        (height, width), n = tokens.grid, rows.shape[1]
        index = torch.arange(n, device=rows.device)
        even = index.view(tokens.grid)[: height // 2 * 2, : width // 2 * 2]
        windows = even.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 1, 3).reshape(-1, 4)  # (w, 4)
        x = rows[:, windows]  # (b, w, 4, c)
        # the mean of six products of unit vectors, by the square of their sum
        alike = (x.sum(2).square().sum(2) - 4) / 12
        merged = (alike > self.config.threshold) & tokens.valid_or_all()[:, windows].all(2)
        owner = index.repeat(rows.shape[0], 1)
        first = torch.where(merged[..., None], windows[:, :1], windows).flatten(1)
        return owner.scatter(1, windows.flatten().expand(rows.shape[0], -1), first)

    def after_piece(self, tokens: Tokens, trace: Trace) -> Tokens:
        return tokens.unmerge()

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        """Windows are compared by sums and squares, which are not counted."""
        there = index == self.config.global_block != self.config.local_block
        return {"macs": matching_macs(tokens, self.embed_dim)} if there else {}

    def dials(self, passes: Callable[[PolicyConfig], Iterable[Trace]]) -> list[Dial]:
        return [lambda position: replace(self.config, threshold=round(1.0 - 2.0 * position, 4))]
