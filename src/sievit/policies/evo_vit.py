"""Evo-ViT: the rest of the tokens is updated by a representative (AAAI 2022, arXiv 2108.01390)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sievit.config import Natural, Share, variant
from sievit.policies.base import Notes, Projections, register
from sievit.policies.selection import SharesConfig, SharesPolicy, attention_macs, fused, select_top
from sievit.tokens import Tokens, Trace


@variant("evo_vit")
@dataclass(frozen=True)
class EvoViTConfig(SharesConfig):
    """Each block computes the tokens with the most attention; what it does to one token for the rest, the rest gets.

    Attributes:
        momentum: of the mean of the attention over blocks.
    """

    first_block: Natural = 4
    shares: tuple[Share, ...] = (0.5,)
    momentum: Share = 0.5


@register(EvoViTConfig)
class EvoViT(SharesPolicy):
    """Evo-ViT (arXiv 2108.01390, section 3): slow updates of attentive tokens, fast ones of all others.

    The score of a token is a running mean over blocks of the attention that the class token (without one, the mean
    query) gives to it; tokens that were not computed keep their score. The others of a block are represented by their
    mean, weighted by the score, and get what the block adds to it. No token is dropped.
    """

    can_propagate = False

    config: EvoViTConfig

    def decides_inside(self, index: int) -> bool:
        return index >= self.config.first_block - 1

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        tokens = self.after_piece(tokens, trace)
        scores = trace.last("scores")
        if index < self.config.first_block or scores is None:
            return tokens.select(None), {}
        chosen = select_top(tokens, scores, self.shares[index - self.config.first_block])
        if chosen.keep is None:
            return chosen, {}
        represents = fused(tokens, tokens.valid_or_all() & ~chosen.keep, scores)
        return chosen.with_extra(represents), {"represents": represents}

    def inside_block(self, index: int, tokens: Tokens, trace: Trace, projections: Projections) -> tuple[Tokens, Notes]:
        new = projections.attention().detach()
        old = trace.last("scores")
        old = new if old is None else old
        kept = self.config.momentum
        computed = tokens.valid_or_all() if tokens.keep is None else tokens.keep
        scores = torch.where(computed, kept * old + (1 - kept) * new, old)
        return tokens, {"scores": scores, "macs": attention_macs(tokens, self.embed_dim)}

    def after_piece(self, tokens: Tokens, trace: Trace) -> Tokens:
        """The canvas with what the last block did to the representative added to all that it stands for."""
        if not tokens.num_extra:
            return tokens
        assert tokens.keep is not None
        rest = (tokens.valid_or_all() & ~tokens.keep)[..., None].to(tokens.x.dtype)
        added: Float[Tensor, "b 1 c"] = tokens.extra - trace.aux[-1]["represents"]
        return tokens.replace_patches(tokens.patches + rest * added).with_extra(None)

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        there = index < self.depth and self.decides_inside(index)
        return {"macs": attention_macs(tokens, self.embed_dim)} if there else {}
