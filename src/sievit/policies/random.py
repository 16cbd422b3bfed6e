"""Control: tokens chosen at random."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sievit.config import variant
from sievit.policies.base import PAPER_SCHEDULE, Policy, PolicyConfig, register, select_top, spread
from sievit.tokens import Tokens, Trace


@variant("random")
@dataclass(frozen=True)
class RandomConfig(PolicyConfig):
    """A fixed share of tokens per block, drawn by a seeded hash.

    Attributes:
        shares: share of tokens kept, spread over the blocks from `first_block` on.
        seed: the draw of a token depends on the seed, the block and its place, and not on the image or the batch.
    """

    first_block: int = 3
    shares: tuple[float, ...] = PAPER_SCHEDULE
    seed: int = 0


@register(RandomConfig)
class Random(Policy):
    """Control: a fixed share of tokens per block, at random places."""

    def __init__(self, config: RandomConfig, *, embed_dim: int, depth: int) -> None:
        super().__init__()
        self.config = config
        self.shares = spread(config.shares, first_block=config.first_block, depth=depth)

    def decides_at(self, index: int) -> bool:
        return index == 0 or index >= self.config.first_block

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Tensor]]:
        if index < self.config.first_block:
            return tokens.select(None), {}
        scores = draw(tokens.grid, seed=self.config.seed * 1000 + index, device=tokens.x.device)
        share = self.shares[index - self.config.first_block]
        return select_top(tokens, scores.expand(len(tokens.x), -1), share), {}


def draw(grid: tuple[int, int], *, seed: int, device: torch.device) -> Tensor:
    """(n,) int64: a random number per cell that depends on its row, its column and the seed alone (SplitMix32)."""
    rows = torch.arange(grid[0], device=device)[:, None]
    columns = torch.arange(grid[1], device=device)
    x = (rows * 0x10001 + columns * 0x9E3779B1 + seed * 0x85EBCA6B) & 0xFFFFFFFF
    for multiplier in (0x21F0AAAD, 0x735A2D97):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    return (x ^ (x >> 15)).flatten()
