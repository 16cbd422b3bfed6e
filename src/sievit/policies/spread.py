"""Tokens that are spread evenly over the grid, for all others to follow. No paper's method; needs no training."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from sievit.config import variant
from sievit.policies.base import register
from sievit.policies.selection import SharesConfig, SharesPolicy, dither
from sievit.tokens import Tokens


@variant("spread")
@dataclass(frozen=True)
class SpreadConfig(SharesConfig):
    """A fixed share of tokens, evenly over the grid; the others get the updates of the most similar ones.

    Attributes:
        propagate: as of every policy.
    """

    propagate: bool = field(default=True, kw_only=True)


@register(SpreadConfig)
class Spread(SharesPolicy):
    """Control for what chooses by the image, and the best that needs no training: other tokens wherever the share
    changes, at the places of a fixed pattern.

    An even sample of the tokens is what attention needs to see of an image, and each token that is left out finds a
    similar one in it. What chooses by importance takes no token of a plain area, and there is none to follow.
    """

    config: SpreadConfig

    def scores(self, index: int, tokens: Tokens) -> Float[Tensor, "b n"]:
        pattern = dither(tokens.grid, index, device=tokens.x.device)
        return -pattern.expand(tokens.x.shape[0], -1)

    def decides_at(self, index: int) -> bool:
        i = index - self.config.first_block
        return index == 0 or i == 0 or (i > 0 and self.shares[i] != self.shares[i - 1])
