"""Control: tokens chosen at random."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sievit.config import variant
from sievit.policies.base import PAPER_SCHEDULE, Policy, PolicyConfig, keep_top, register, spread
from sievit.tokens import Tokens, Trace


@variant("random")
@dataclass(frozen=True)
class RandomConfig(PolicyConfig):
    """A fixed share of tokens per block, drawn from a seeded generator.

    Attributes:
        shares: share of tokens kept, spread over the blocks from `first_block` on.
        seed: the draw of a block depends on the seed, the block and the grid, and not on the image or the batch.
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

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Tensor]]:
        if index < self.config.first_block:
            return tokens.select(None), {}
        generator = torch.Generator().manual_seed(self.config.seed * 1000 + index)
        scores = torch.rand(tokens.grid[0] * tokens.grid[1], generator=generator).to(tokens.x.device)
        valid = tokens.valid_or_all()
        share = self.shares[index - self.config.first_block]
        return tokens.select(keep_top(scores.expand(valid.shape), share, valid)), {}
