"""ATS: tokens sampled by their significance (ECCV 2022, arXiv 2111.15667)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sievit.config import Share, variant
from sievit.policies.base import Notes, Projections, register
from sievit.policies.selection import PAPER_SCHEDULE, StagesConfig, StagesPolicy, attention_macs, counted
from sievit.tokens import Tokens, Trace


@variant("ats")
@dataclass(frozen=True)
class ATSConfig(StagesConfig):
    """Each block samples so many tokens by their significance; what is drawn twice counts once.

    Attributes:
        shares: the largest share of an image's tokens that may be left, per block; fewer are where few are significant.
    """

    shares: tuple[Share, ...] = PAPER_SCHEDULE


@register(ATSConfig)
class ATS(StagesPolicy):
    """Adaptive token sampler (arXiv 2111.15667, section 3): significance is the attention of the class token (without
    one, of the mean query) times the norm of the value; sampled at fixed quantiles of its sum.

    Here tokens are in their own order, and the first that reaches a quantile is taken; the released code sorts them by
    significance, and takes the nearest. It decides between attention and MLP of each block, so that the rows of the
    attention that are thrown away are computed, which the paper saves; all values of the tokens that stay are its own.
    """

    is_static = False
    inside = True

    def decides_inside(self, index: int) -> bool:
        i = index - self.config.first_block
        return 0 <= i < len(self.shares) and self.shares[i] < 1

    def inside_block(self, index: int, tokens: Tokens, trace: Trace, projections: Projections) -> tuple[Tokens, Notes]:
        left = tokens.valid_or_all() if tokens.keep is None else tokens.keep
        scores = (projections.attention() * projections.value_norms()).detach() * left
        samples = counted(tokens.valid_or_all().sum(1), self.shares[index - self.config.first_block])
        keep = sampled(scores, samples) & left
        return self.dropped(tokens.select(keep)), {"scores": scores, **self.dense_notes(index, tokens)}

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        return {"macs": attention_macs(tokens, self.embed_dim)} if self.decides_inside(index) else {}


def sampled(scores: Float[Tensor, "b n"], samples: Int[Tensor, " b"]) -> Bool[Tensor, "b n"]:
    """(b, n): the tokens that so many `samples` (b,) of each image fall on: the first whose cumulative share of the
    scores reaches (2k - 1) / 2K, for k = 1 to K (equations 3 and 4)."""
    total = scores.double().cumsum(1)
    shares = total / total[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    reached = (shares * samples[:, None] + 0.5).floor()  # so many of the points
    return reached.diff(dim=1, prepend=torch.zeros_like(reached[:, :1])) > 0
