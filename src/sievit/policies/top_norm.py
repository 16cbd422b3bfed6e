"""Control: the tokens with the largest norm."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sievit.config import variant
from sievit.policies.base import register
from sievit.policies.selection import SharesConfig, SharesPolicy
from sievit.tokens import Tokens


@variant("top_norm")
@dataclass(frozen=True)
class TopNormConfig(SharesConfig):
    """A fixed share of tokens per block, by the norm of their features."""


@register(TopNormConfig)
class TopNorm(SharesPolicy):
    """Control: plain top-k by L2 norm, a strong baseline (arXiv 2308.04657)."""

    def scores(self, index: int, tokens: Tokens) -> Float[Tensor, "b n"]:
        return tokens.patches.detach().float().norm(dim=2)
