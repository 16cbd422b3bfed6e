"""Tokens that the class token attends to: a choice that needs no training."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from sievit.config import variant
from sievit.policies.base import Notes, Project, register
from sievit.policies.selection import SharesConfig, SharesPolicy
from sievit.tokens import Tokens, Trace


@variant("attention")
@dataclass(frozen=True)
class AttentionConfig(SharesConfig):
    """A fixed share of tokens, by the attention that they get.

    Tokens are chosen anew where the share changes, from all of them, and stay chosen until then.
    """


@register(AttentionConfig)
class Attention(SharesPolicy):
    """The tokens with the most attention of the class token (EViT's score, arXiv 2202.07800), without its fusion.

    The score is that of the block that comes next, over all tokens of the canvas, so that a token may come back. In
    families without a class token it is the attention of the mean token. The trace holds `scores` (b, n) of a choice.
    """

    needs = ("project",)

    def __init__(self, config: AttentionConfig, *, embed_dim: int, depth: int, project: Project) -> None:
        super().__init__(config, embed_dim=embed_dim, depth=depth)
        self.project = project

    def decides_at(self, index: int) -> bool:
        return index == 0 or self.changes_at(index)

    def scores(self, index: int, tokens: Tokens) -> Float[Tensor, "b n"]:
        return self.project(index, tokens.select(None)).attention().detach().float()

    def macs(self, trace: Trace) -> Num[Tensor, " b"]:
        """Of a choice: keys, n c^2, products with the query, n c, and the query: c^2 of the class token, else n c^2."""
        n, c = trace.valid.sum(1).double(), self.embed_dim
        total = torch.zeros_like(n)
        for aux, (prefix, _) in zip(trace.aux, trace.prefix, strict=False):
            if "scores" in aux:
                total += (n + prefix) * c * (c + 1) + (1 if prefix else n) * c**2
        return total

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        decides = self.config.first_block <= index < self.depth and self.decides_at(index)
        return {"scores": tokens.valid_or_all()} if decides else {}
