"""Choices by score, and what policies of fixed shares have in common.

Letters: b images, n grid tokens.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from sievit.config import ConfigError, Natural, Share
from sievit.policies.base import FEWEST, BlockRange, Dial, Notes, Policy, PolicyConfig
from sievit.rows import is_fixed
from sievit.tokens import Tokens, Trace

PAPER_SCHEDULE = (0.7, 0.7, 0.7, 0.49, 0.49, 0.49, 0.343, 0.343, 0.343)
"""SViT's share of tokens to keep, for blocks 3 to 11 of twelve."""

ROUNDING = 1e-6
"""Of products with shares, so that 0.7 of ten tokens are seven."""
UNIT = 10**5
"""Of shares, as whole numbers."""


def spread(shares: tuple[float, ...], *, first_block: int, depth: int) -> tuple[float, ...]:
    """One share per block from `first_block` on: the given ones in equal runs, in their order.

    Raises:
        ConfigError: more shares than blocks, none, or no block left to choose for.
    """
    blocks = depth - first_block
    if not 0 <= first_block < depth:
        raise ConfigError(f"first_block {first_block}: the backbone has blocks 0 to {depth - 1}")
    if not shares:
        raise ConfigError("the shares of tokens to keep have no value; give at least one")
    if blocks < len(shares) and len(set(shares)) > blocks:
        raise ConfigError(
            f"{len(shares)} shares for {blocks} blocks from block {first_block} on; give {blocks} or fewer"
        )
    return tuple(shares[i * len(shares) // blocks] for i in range(blocks))


def counted(total: Any, share: float, multiple: int = 1) -> Any:
    """The `share` of `total`, rounded up, and up to a multiple; in whole numbers, of ints, SymInts and tensors.

    Exported programs hold numbers like 0.6 in fewer digits, divide negative numbers otherwise, and some runtimes count
    in 32 bits: with five digits of the share a total may be up to 21,000.
    """
    part, unit = max(1, math.floor(share * UNIT + ROUNDING)), UNIT * multiple
    return (total * part + unit - 1) // unit * multiple


def select_top(
    tokens: Tokens, scores: Num[Tensor, "b n"], share: float, *, multiple: int = 1, static: bool = False
) -> Tokens:
    """The canvas with a choice: of each image's tokens the `share` with the highest scores (b, n), rounded up.

    Args:
        multiple: counts are rounded up to a multiple of it.
        static: no shape may depend on the sizes of the images either, as in a program for one size it may not.
    """
    if share >= 1:
        return tokens.select(None)
    valid, scores = tokens.valid, scores.double()
    if valid is not None:
        scores = scores.masked_fill(~valid, -math.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    n = order.shape[1]
    most = min(n, counted(n, share, multiple))
    if valid is None:
        return tokens.select_order(order[:, :most].sort(dim=1).values)
    count = counted(valid.sum(1, keepdim=True), share, multiple)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n, device=order.device).expand_as(order))
    keep = valid & (rank < count)
    if static or is_fixed(order):
        return tokens.select_order(order[:, :most].sort(dim=1).values, keep)
    return tokens.select(keep)


@dataclass(frozen=True)
class SharesConfig(PolicyConfig):
    """A fixed share of tokens.

    Attributes:
        first_block: the first block that leaves tokens out (0-based).
        shares: share of tokens kept, spread over the blocks from `first_block` on.
    """

    first_block: Natural = 3
    shares: tuple[Share, ...] = PAPER_SCHEDULE


class SharesPolicy(Policy):
    """Base of policies that keep a fixed share of the tokens, those with the highest score."""

    is_static = True

    def __init__(self, config: SharesConfig, *, embed_dim: int, depth: int) -> None:
        super().__init__()
        self.config = config
        self.embed_dim, self.depth = embed_dim, depth
        self.shares = spread(config.shares, first_block=config.first_block, depth=depth)

    def scores(self, index: int, tokens: Tokens) -> Num[Tensor, "b n"]:
        """(b, n): the higher, the sooner a token takes part in block `index`."""
        raise NotImplementedError

    def decides_at(self, index: int) -> bool:
        return index == 0 or index >= self.config.first_block

    def changes_at(self, index: int) -> bool:
        """Whether another share begins at block `index`."""
        i = index - self.config.first_block
        return i == 0 or (i > 0 and self.shares[i] != self.shares[i - 1])

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        if not self.decides_at(index):
            return tokens, {}  # the choice stands
        if index < self.config.first_block:
            return tokens.select(None), {}
        share = self.shares[index - self.config.first_block]
        if share >= 1:
            return tokens.select(None), {}
        scores = self.scores(index, tokens)
        return select_top(tokens, scores, share), {"scores": scores}

    def ranges(self) -> list[BlockRange]:
        first = self.config.first_block
        starts = [i for i in range(first, self.depth) if i == first or self.decides_at(i)]
        pairs = zip(starts, [*starts[1:], self.depth], strict=True)
        return [BlockRange(start, stop) for start, stop in pairs if self.shares[start - first] < 1]

    def without(self, starts: Collection[int]) -> PolicyConfig:
        off = {i for run in self.ranges() if run.start in starts for i in range(run.start, run.stop)}
        shares = enumerate(self.shares, start=self.config.first_block)
        return replace(self.config, shares=tuple(1.0 if i in off else share for i, share in shares))

    def dials(self, passes: Callable[[PolicyConfig], Iterable[Trace]]) -> list[Dial]:
        def turn(position: float) -> PolicyConfig:
            return replace(self.config, shares=scaled(self.shares, position))

        return [turn]


@dataclass(frozen=True)
class StagesConfig(SharesConfig):
    """Tokens are left out in stages, and do not come back, `rejoin` excepted.

    Attributes:
        shares: share of an image's tokens that is left, falling, spread over the blocks from `first_block` on; a stage
            begins where it falls.
        preserve: a token that is left out keeps its features on the canvas; otherwise they become zero.
    """

    shares: tuple[Share, ...] = (0.7, 0.49, 0.343)
    preserve: bool = False

    def __post_init__(self) -> None:
        if list(self.shares) != sorted(self.shares, reverse=True):
            raise ConfigError(f"tokens that are left out do not come back: shares are falling, not {self.shares}")
        if (self.rejoin or self.propagate) and not self.preserve:
            raise ConfigError("preserve=False leaves nothing that could come back; set preserve=True with it")


class StagesPolicy(SharesPolicy):
    """Base of policies that leave tokens out in stages, those with the lowest score."""

    cascades = True
    inside: ClassVar[bool] = False
    """Whether it decides between attention and MLP of the block at which a stage begins."""
    config: Any

    def begins(self, index: int) -> bool:
        """Whether a stage begins at block `index`."""
        i = index - self.config.first_block
        return 0 <= i < len(self.shares) and self.shares[i] < (self.shares[i - 1] if i else 1)

    def decides_at(self, index: int) -> bool:
        return index == 0 or (self.begins(index) and not self.inside)

    def decides_inside(self, index: int) -> bool:
        return self.begins(index) and self.inside

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        if index == 0:
            tokens = tokens.select(None)
        if self.inside or not self.begins(index):
            return tokens, {}  # the choice stands
        scores, notes = self.scored(index, tokens)
        return self.drop(index, tokens, scores), notes

    def scored(self, index: int, tokens: Tokens) -> tuple[Float[Tensor, "b n"], Notes]:
        """(b, n): the higher, the sooner a token stays; and what the trace remembers."""
        raise NotImplementedError

    def drop(self, index: int, tokens: Tokens, scores: Num[Tensor, "b n"]) -> Tokens:
        """The canvas with the tokens of the highest scores among those that are left."""
        left = tokens.valid_or_all() if tokens.keep is None else tokens.keep
        share = self.shares[index - self.config.first_block]
        return self.dropped(select_top(tokens, scores.double().masked_fill(~left, -math.inf), share))

    def dropped(self, chosen: Tokens) -> Tokens:
        """The canvas as those that are left out stay on it."""
        if self.config.preserve or chosen.keep is None:
            return chosen
        return chosen.replace_patches(chosen.patches * chosen.keep[..., None].to(chosen.x.dtype))

    def ranges(self) -> list[BlockRange]:
        return [BlockRange(i, self.depth) for i in range(self.config.first_block, self.depth) if self.begins(i)]

    def without(self, starts: Collection[int]) -> PolicyConfig:
        shares, left, before = [], 1.0, 1.0
        for i, share in enumerate(self.shares, start=self.config.first_block):
            if i not in starts:
                left = min(left, share) if share < before else left
            before = share
            shares.append(left)
        return replace(self.config, shares=tuple(shares))


def of_left(tokens: Tokens) -> tuple[Tensor, Bool[Tensor, "b k"], Callable[[Tensor], Tensor]]:
    """The tokens that take part, without the others where every image has equally many.

    Returns:
        Their values (b, k, c); which of these rows take part; and a call that puts values (b, k) of the rows to their
        places (b, n), where all other tokens have minus infinity.
    """
    if tokens.order is None:
        left = tokens.valid_or_all() if tokens.keep is None else tokens.keep
        return tokens.patches, left, lambda values: values.masked_fill(~left, -math.inf)
    order = tokens.order
    real = torch.ones_like(order, dtype=torch.bool) if tokens.real is None else tokens.real

    def back(values: Tensor) -> Tensor:
        canvas = values.new_full((order.shape[0], tokens.patches.shape[1]), -math.inf)
        return canvas.scatter(1, order, values.masked_fill(~real, -math.inf))

    return tokens.patches.gather(1, order[..., None].expand(-1, -1, tokens.x.shape[2])), real, back


def scaled(shares: Sequence[float], position: float) -> tuple[float, ...]:
    """Shares times a factor, by the position of a dial: all are 1 at 0, and FEWEST at 1; to four digits, upwards."""
    factor = (1 - position) / max(FEWEST, min(shares))
    return tuple(tidy(min(1.0, max(FEWEST, share * factor))) for share in shares)


def tidy(share: float, *, up: bool = True) -> float:
    """To four digits."""
    return (math.ceil(share * 1e4 - 1e-6) if up else math.floor(share * 1e4 + 1e-6)) / 1e4


def quantile(values: Num[Tensor, " values"], share: float) -> float:
    """The value that this share of all is below; torch's own takes no more than 16 million values."""
    return float(np.quantile(values.numpy(), share))


def attention_macs(tokens: Tokens, embed_dim: int) -> Float[Tensor, " b"]:
    """(b,): what `Projections.attention` costs inside of a block, the products of one query with all keys."""
    return (tokens.valid_or_all().sum(1).double() + tokens.num_prefix) * embed_dim


def fused(tokens: Tokens, chosen: Tensor, scores: Tensor) -> Tensor:
    """(b, 1, c): the mean of the `chosen` (b, n) tokens, weighted by their scores (b, n)."""
    weights = scores.masked_fill(~chosen, -math.inf).clamp(min=0)
    weights = (weights / weights.sum(1, keepdim=True).clamp(min=1e-12)).to(tokens.x.dtype)
    return (weights[..., None] * tokens.patches).sum(1, keepdim=True)


def dither(grid: tuple[int, int], index: int, *, device: torch.device) -> Float[Tensor, " n"]:
    """(n,) in 0..1: thresholds that spread over the grid as evenly as may be, and move from block to block.

    The additive recurrence R2 of M. Roberts (2018, "The unreasonable effectiveness of quasirandom sequences").
    """
    rows = torch.arange(grid[0], device=device, dtype=torch.float32)[:, None]
    columns = torch.arange(grid[1], device=device, dtype=torch.float32)
    sums = 0.7548776662466927 * columns + 0.5698402909980532 * rows + 0.6180339887498949 * (index + 1)
    return (sums % 1.0).flatten().clamp(1e-4, 1 - 1e-4)
