"""Choices by score, and what policies of fixed shares have in common.

Letters: b images, n grid tokens.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor

from sievit.config import ConfigError, Natural, Share
from sievit.policies.base import FEWEST, BlockRange, Dial, Notes, Policy, PolicyConfig
from sievit.tokens import Tokens, Trace

PAPER_SCHEDULE = (0.7, 0.7, 0.7, 0.49, 0.49, 0.49, 0.343, 0.343, 0.343)
"""SViT's share of tokens to keep, for blocks 3 to 11 of twelve."""

ROUNDING = 1e-6
"""Of shares, so that 0.7 of ten tokens are seven."""


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


def select_top(
    tokens: Tokens, scores: Num[Tensor, "b n"], share: float, *, multiple: int = 1, static: bool = False
) -> Tokens:
    """The canvas with a choice: of each image's tokens the `share` with the highest scores (b, n), rounded up.

    Args:
        multiple: counts are rounded up to a multiple of it.
        static: no shape may depend on the sizes of the images either.
    """
    if share >= 1:
        return tokens.select(None)
    valid, scores = tokens.valid, scores.double()
    if valid is not None:
        scores = scores.masked_fill(~valid, -math.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    n = order.shape[1]
    most = min(n, -(-math.ceil(share * n - ROUNDING) // multiple) * multiple)
    if valid is None:
        return tokens.select_order(order[:, :most].sort(dim=1).values)
    count = ((valid.sum(1, keepdim=True).double() * share - ROUNDING).ceil() / multiple).ceil() * multiple
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n, device=order.device).expand_as(order))
    keep = valid & (rank < count)
    return tokens.select_order(order[:, :most].sort(dim=1).values, keep) if static else tokens.select(keep)


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
