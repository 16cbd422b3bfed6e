"""Control: the tokens with the largest norm."""

from dataclasses import dataclass

from torch import Tensor

from sievit.config import variant
from sievit.policies.base import PAPER_SCHEDULE, Policy, PolicyConfig, register, select_top, spread
from sievit.tokens import Tokens, Trace


@variant("top_norm")
@dataclass(frozen=True)
class TopNormConfig(PolicyConfig):
    """A fixed share of tokens per block, by the norm of their features.

    Attributes:
        shares: share of tokens kept, spread over the blocks from `first_block` on.
    """

    first_block: int = 3
    shares: tuple[float, ...] = PAPER_SCHEDULE


@register(TopNormConfig)
class TopNorm(Policy):
    """Control: plain top-k by L2 norm, a strong baseline (arXiv 2308.04657)."""

    def __init__(self, config: TopNormConfig, *, embed_dim: int, depth: int) -> None:
        super().__init__()
        self.config = config
        self.shares = spread(config.shares, first_block=config.first_block, depth=depth)

    def decides_at(self, index: int) -> bool:
        return index == 0 or index >= self.config.first_block

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Tensor]]:
        if index < self.config.first_block:
            return tokens.select(None), {}
        scores = tokens.patches.detach().float().norm(dim=2)  # (b, n)
        share = self.shares[index - self.config.first_block]
        return select_top(tokens, scores, share), {"scores": scores}
