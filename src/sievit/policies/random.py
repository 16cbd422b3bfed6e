"""Control: tokens chosen at random."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from sievit.config import Seed, variant
from sievit.policies.base import register
from sievit.policies.selection import SharesConfig, SharesPolicy
from sievit.tokens import Tokens


@variant("random")
@dataclass(frozen=True)
class RandomConfig(SharesConfig):
    """A fixed share of tokens per block, drawn by a seeded hash.

    Attributes:
        seed: the draw of a token depends on the seed, the block and its place, and not on the image or the batch.
    """

    seed: Seed = 0


@register(RandomConfig)
class Random(SharesPolicy):
    """Control: a fixed share of tokens per block, at random positions."""

    config: RandomConfig

    def scores(self, index: int, tokens: Tokens) -> Int[Tensor, "b n"]:
        drawn = draw(tokens.grid, seed=self.config.seed * 1000 + index, device=tokens.x.device)
        return drawn.expand(tokens.x.shape[0], -1)


def draw(grid: tuple[int, int], *, seed: int, device: torch.device) -> Int[Tensor, " n"]:
    """(n,) int64: a random number per cell that depends on its row, its column and the seed alone (SplitMix32)."""
    rows = torch.arange(grid[0], device=device)[:, None]
    columns = torch.arange(grid[1], device=device)
    x = (rows * 0x10001 + columns * 0x9E3779B1 + seed * 0x85EBCA6B) & 0xFFFFFFFF
    for multiplier in (0x21F0AAAD, 0x735A2D97):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    return (x ^ (x >> 15)).flatten()
