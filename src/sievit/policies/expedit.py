"""Expedit: blocks on cluster centres, tokens rebuilt from them (NeurIPS 2022, arXiv 2210.01035)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sievit.config import Count, Natural, Positive, Share, variant
from sievit.policies.base import Dial, Notes, Policy, PolicyConfig, register
from sievit.policies.selection import ROUNDING
from sievit.rows import is_fixed
from sievit.tokens import Tokens, Trace


@variant("expedit")
@dataclass(frozen=True)
class ExpeditConfig(PolicyConfig):
    """From one block on the centres of clusters take the place of the tokens, which are rebuilt from them at the end.

    Attributes:
        first_block: the first block on the centres (0-based).
        side: rows of centres per row of tokens, and columns per column.
        neighbours: a token belongs to the centres within so many rows and columns of its own, an odd number.
        rounds: of the clustering.
        temperature: of the squared distance of a token to a centre, relative to the mean one, in its weight.
        nearest: centres that a token is rebuilt from.
    """

    swept: ClassVar = ("side", (0.9, 0.75, 0.6))

    first_block: Natural = 4
    side: Share = 0.75
    neighbours: Count = 5
    rounds: Count = 5
    temperature: Positive = 0.1
    nearest: Count = 20


@register(ExpeditConfig)
class Expedit(Policy):
    """Expedit (arXiv 2210.01035, section 3): a clustering layer that learns nothing, super-pixels in the space of
    features, and a reconstruction layer with the weights of the distances before the blocks in between.

    A centre is computed in the place of the first token of the cell that it starts from. Between two pieces of the loop
    the centres wait as extra tokens, and move by the mean change of the tokens nearest to them.
    """

    can_propagate = False

    is_static = True

    def __init__(self, config: ExpeditConfig, *, embed_dim: int, depth: int) -> None:
        super().__init__()
        self.config, self.depth, self.embed_dim = config, depth, embed_dim

    def decides_at(self, index: int) -> bool:
        return index == 0 or index == self.config.first_block

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        if index == self.config.first_block and self.config.side < 1:
            return self._clustered(tokens)
        if index == 0:
            return tokens.select(None), {}
        if not tokens.num_extra:
            return tokens, {}
        links = self._links(trace)
        change = tokens.patches - rebuilt(tokens.extra, *links)
        centres = tokens.extra + pooled(change, links[0][..., 0], tokens.valid_or_all(), tokens.num_extra)
        return self._placed(tokens.with_extra(None), centres), {}

    def after_piece(self, tokens: Tokens, trace: Trace) -> Tokens:
        if not self._runs_on_centres(trace):
            return tokens
        centres = tokens.patches[:, self._cells(tokens)[1]]
        values = rebuilt(centres, *self._links(trace))
        whole = tokens.replace_patches(torch.where(tokens.valid_or_all()[..., None], values, tokens.patches))
        return whole.with_extra(centres)

    def after_blocks(self, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        return tokens.with_extra(None), {}

    def _runs_on_centres(self, trace: Trace) -> bool:
        first = self.config.first_block
        return len(trace.keep) > first and "nearest" in trace.aux[first] and not self.rejoins_at(len(trace.keep) - 1)

    def _links(self, trace: Trace) -> tuple[Tensor, Tensor]:
        notes = trace.aux[self.config.first_block]
        return notes["nearest"], notes["weights"]

    def _cells(self, tokens: Tokens) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """The cell (n,) of each token, the position (k,) of the first token of each cell, and rows and columns of
        cells; none depends on how far an image is padded."""
        device, side = tokens.x.device, self.config.side
        places = (torch.arange(edge, device=device, dtype=torch.float64) for edge in tokens.grid)
        row, column = ((place * side + ROUNDING).long() for place in places)
        counts = int((tokens.grid[0] - 1) * side + ROUNDING) + 1, int((tokens.grid[1] - 1) * side + ROUNDING) + 1
        cell = (row[:, None] * counts[1] + column).flatten()
        above, left = (
            (edge < torch.arange(count, device=device)[:, None]).sum(1)
            for edge, count in zip((row, column), counts, strict=True)
        )
        return cell, (above[:, None] * tokens.grid[1] + left).flatten(), counts

    def _placed(self, tokens: Tokens, centres: Float[Tensor, "b k c"]) -> Tokens:
        """The canvas with the centres in their places, which alone take part."""
        first = self._cells(tokens)[1].expand(tokens.x.shape[0], -1)
        patches = tokens.patches.scatter(1, first[..., None].expand_as(centres), centres.to(tokens.x.dtype))
        tokens = tokens.replace_patches(patches)
        if tokens.valid is None:
            return tokens.select_order(first)
        keep = torch.zeros_like(tokens.valid).scatter(1, first, True)
        return tokens.select_order(first, keep & tokens.valid) if is_fixed(keep) else tokens.select(keep)

    def _clustered(self, tokens: Tokens) -> tuple[Tokens, Notes]:
        x, valid = tokens.patches, tokens.valid_or_all()
        cell, first, counts = self._cells(tokens)
        there = valid[:, first]  # (b, k)
        centres = pooled(x, cell.expand(x.shape[0], -1), valid, len(first))
        near = _close(cell, counts, self.config.neighbours // 2) & there[:, None] & valid[..., None]  # (b, n, k)
        for _ in range(self.config.rounds):
            share = self._weights(squared_distances(x, centres), near).to(x.dtype)
            centres = share.mT @ x / share.sum(1)[..., None].clamp(min=1e-6)
        apart = squared_distances(x, centres)
        everywhere = (there[:, None] & valid[..., None]).expand_as(apart)
        nearest = apart.masked_fill(~everywhere, torch.inf).topk(
            min(self.config.nearest, len(first)), dim=2, largest=False
        )
        weights = self._weights(nearest.values, everywhere.gather(2, nearest.indices)).to(x.dtype)
        notes = {"nearest": nearest.indices, "weights": weights, "macs": self._macs(tokens)}
        return self._placed(tokens, centres), notes

    def _weights(self, apart: Tensor, there: Tensor) -> Tensor:
        """(b, n, k): softmax over the centres that are `there`, by squared distance relative to the mean of all."""
        number = there.sum((1, 2), keepdim=True).clamp(min=1)
        apart = torch.where(there, apart, 0.0)  # infinite ones have no gradient
        scale = (apart.sum((1, 2), keepdim=True) / number).clamp(min=1e-12)
        logits = (-apart / (self.config.temperature * scale)).masked_fill(~there, torch.finfo(apart.dtype).min)
        return torch.where(there, logits.softmax(2), 0.0)  # where none is there too, and without a NaN

    def _macs(self, tokens: Tokens) -> Tensor:
        """Distances and means of each round, the distances that tokens are rebuilt by, and the rebuilt ones."""
        valid = tokens.valid_or_all()
        centres = valid[:, self._cells(tokens)[1]].sum(1)
        return (2.0 * self.config.rounds + 2) * valid.sum(1) * centres * self.embed_dim

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        there = index == self.config.first_block and self.config.side < 1
        return {"macs": self._macs(tokens)} if there else {}

    def dials(self, passes: Callable[[PolicyConfig], Iterable[Trace]]) -> list[Dial]:
        return [lambda position: replace(self.config, side=round(1 - 0.9 * position, 4))]


def _close(cell: Tensor, counts: tuple[int, int], reach: int) -> Bool[Tensor, "n k"]:
    """Whether a token's own cell and a centre's are at most `reach` rows and columns apart."""
    k = torch.arange(counts[0] * counts[1], device=cell.device)
    rows = cell[:, None] // counts[1] - k // counts[1]
    columns = cell[:, None] % counts[1] - k % counts[1]
    return (rows.abs() <= reach) & (columns.abs() <= reach)


def squared_distances(x: Float[Tensor, "b n c"], centres: Float[Tensor, "b k c"]) -> Float[Tensor, "b n k"]:
    """(b, n, k) in float32; computed in float64, for they are small differences of large products."""
    x, centres = x.double(), centres.double()
    with torch.autocast(x.device.type, enabled=False):
        products = x @ centres.mT
    apart = x.square().sum(2, keepdim=True) + centres.square().sum(2)[:, None] - 2 * products
    return apart.clamp(min=0).float()


def rebuilt(
    centres: Float[Tensor, "b k c"], nearest: Tensor, weights: Float[Tensor, "b n m"]
) -> Float[Tensor, "b n c"]:
    """(b, n, c): of each token the weighted sum of its nearest centres."""
    full = weights.new_zeros(*weights.shape[:2], centres.shape[1]).scatter(2, nearest, weights)
    return full.to(centres.dtype) @ centres


def pooled(
    values: Float[Tensor, "b n c"], owner: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"], number: int
) -> Float[Tensor, "b k c"]:
    """(b, k, c): the mean of the values of the tokens of each of `number` owners; zero where there is none."""
    if is_fixed(owner):
        owned = (owner[:, None] == torch.arange(number, device=owner.device)[:, None]) & valid[:, None]
        return owned.to(values.dtype) @ values / owned.sum(2, keepdim=True).clamp(min=1)
    weight = valid[..., None].to(values.dtype)
    sums = values.new_zeros(values.shape[0], number, values.shape[2])
    sums = sums.scatter_add(1, owner[..., None].expand_as(values), values * weight)
    total = values.new_zeros(values.shape[0], number, 1).scatter_add(1, owner[..., None], weight)
    return sums / total.clamp(min=1)
