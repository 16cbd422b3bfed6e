"""Tokens that the class token attends to: a choice that needs no training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sievit.config import variant
from sievit.policies.base import PAPER_SCHEDULE, Attend, Policy, PolicyConfig, register, select_top, spread
from sievit.tokens import Tokens, Trace


@variant("attention")
@dataclass(frozen=True)
class AttentionConfig(PolicyConfig):
    """A fixed share of tokens, by the attention that they get.

    Attributes:
        shares: share of tokens kept, spread over the blocks from `first_block` on. Tokens are chosen anew where the
            share changes, from all of them, and stay chosen until then.
    """

    first_block: int = 3
    shares: tuple[float, ...] = PAPER_SCHEDULE


@register(AttentionConfig)
class Attention(Policy):
    """The tokens with the most attention of the class token (EViT's score, arXiv 2202.07800), without its fusion.

    The score is that of the block that comes next, over all tokens of the canvas, so that a token may come back. In
    families without a class token the mean of the tokens asks. The trace holds `scores` (b, n) where it chose.
    """

    needs_attention = True

    def __init__(self, config: AttentionConfig, *, embed_dim: int, depth: int, attention: Attend) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = embed_dim
        self.attention = attention
        self.shares = spread(config.shares, first_block=config.first_block, depth=depth)

    def decides_at(self, index: int) -> bool:
        stage = index - self.config.first_block
        return index == 0 or stage == 0 or (stage > 0 and self.shares[stage] != self.shares[stage - 1])

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Tensor]]:
        if not self.decides_at(index):
            return tokens, {}  # the choice stands
        stage = index - self.config.first_block
        if stage < 0:
            return tokens.select(None), {}
        scores = self.attention(index, tokens).detach().float()
        return select_top(tokens, scores, self.shares[stage]), {"scores": scores}

    def macs(self, trace: Trace) -> Tensor:
        """Keys of every token of the canvas, n c^2, and their products with the query, n c, where it chose."""
        n, asked = trace.grid[0] * trace.grid[1] + trace.num_prefix, sum("scores" in aux for aux in trace.aux)
        macs = float(asked * n * self.embed_dim * (self.embed_dim + 1))
        return torch.full((len(trace.valid),), macs, device=trace.valid.device)
