"""EViT: inattentive tokens become one (ICLR 2022, arXiv 2202.07800)."""

from dataclasses import dataclass

import torch

from sievit.config import variant
from sievit.policies.base import Notes, Projections, register
from sievit.policies.selection import StagesConfig, StagesPolicy, attention_macs, fused
from sievit.tokens import Tokens, Trace


@variant("evit")
@dataclass(frozen=True)
class EViTConfig(StagesConfig):
    """The tokens that the class token attends to stay; the others go on as one.

    Attributes:
        fuse: they go on as one token, their mean weighted by that attention; otherwise they are gone.
    """

    fuse: bool = True


@register(EViTConfig)
class EViT(StagesPolicy):
    """EViT (arXiv 2202.07800, section 3): in the first block of each stage, between attention and MLP, the tokens with
    the most attention of the class token stay, and the others become one extra token.

    The fused tokens of earlier stages stay beside it, where the released code ranks them with the others; and it is the
    weighted mean, where that code does not divide by the sum of the weights. The mean query stands in where there is no
    class token.
    """

    inside = True
    config: EViTConfig

    def inside_block(self, index: int, tokens: Tokens, trace: Trace, projections: Projections) -> tuple[Tokens, Notes]:
        left = tokens.valid_or_all() if tokens.keep is None else tokens.keep  # (b, n)
        scores = projections.attention().detach()
        chosen = self.drop(index, tokens, scores)
        assert chosen.keep is not None
        if self.config.fuse:
            chosen = chosen.with_extra(torch.cat([tokens.extra, fused(tokens, left & ~chosen.keep, scores)], dim=1))
        return chosen, {"scores": scores, **self.dense_notes(index, tokens)}

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        return {"macs": attention_macs(tokens, self.embed_dim)} if self.begins(index) else {}
