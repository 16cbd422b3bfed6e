"""Token Cropr: scorers trained by auxiliary heads that are thrown away (CVPR 2025, arXiv 2412.00965)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sievit.config import Count, NonNegative, variant
from sievit.policies.base import Notes, register
from sievit.policies.selection import StagesConfig, StagesPolicy, of_left
from sievit.tokens import Tokens, Trace


@variant("cropr")
@dataclass(frozen=True)
class CroprConfig(StagesConfig):
    """The tokens that an auxiliary head attends to stay; the others wait, and come back before the last block.

    Attributes:
        queries: learned queries of each scorer.
        labels: the auxiliary heads tell which of the labels 0 to `labels` - 1 are in an image; others have no meaning.
        aux_weight: of their loss.
    """

    preserve: bool = True
    rejoin: bool = field(default=True, kw_only=True)
    queries: Count = 16
    labels: Count = 256
    aux_weight: NonNegative = 1.0


class Scorer(nn.Module):
    """Cross-attention of learned queries to tokens, and a head on what they see."""

    def __init__(self, dim: int, *, queries: int, labels: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.key = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.head = nn.Linear(dim, labels)

    def forward(self, x: Float[Tensor, "b k c"]) -> tuple[Float[Tensor, "b q k"], Float[Tensor, "b k c"]]:
        """The products of each query with the tokens' keys, and the normalised tokens."""
        x = self.norm(x)
        return (self.queries @ self.key(x).mT).float(), x

    def labels_of(
        self, products: Float[Tensor, "b q k"], x: Float[Tensor, "b k c"], real: Bool[Tensor, "b k"]
    ) -> Float[Tensor, "b labels"]:
        """Logits of the labels in the image, from the attention to the `real` tokens."""
        logits = (products / x.shape[2] ** 0.5).masked_fill(~real[:, None], -torch.inf)
        seen = logits.softmax(2).to(x.dtype) @ x
        return self.head((seen + self.mlp(seen)).mean(1))


@register(CroprConfig)
class Cropr(StagesPolicy):
    """Token Cropr (arXiv 2412.00965, section 3): the score of a token is the sum of the products of its key with the
    queries of a scorer, before the softmax; the scorer learns with an auxiliary head, of which no gradient reaches the
    backbone.

    The auxiliary task is which labels are in the image, for every kind of model whose targets have `labels`; the paper
    has one of its own for each task. Head and aggregation run in training alone.
    """

    config: CroprConfig

    def __init__(self, config: CroprConfig, *, embed_dim: int, depth: int) -> None:
        super().__init__(config, embed_dim=embed_dim, depth=depth)
        self.stages = [index for index in range(depth) if self.begins(index)]
        self.scorers = nn.ModuleList(
            Scorer(embed_dim, queries=config.queries, labels=config.labels) for _ in self.stages
        )

    def scored(self, index: int, tokens: Tokens) -> tuple[Float[Tensor, "b n"], Notes]:
        x, real, back = of_left(tokens)
        scorer = self.scorers[self.stages.index(index)]
        assert isinstance(scorer, Scorer)
        products, values = scorer(x.detach())
        notes = {"macs": self._macs(real.sum(1))}
        if self.training:
            notes["labels"] = scorer.labels_of(products, values, real)
        return back(products.detach().sum(1)), notes

    def _macs(self, computed: Tensor) -> Float[Tensor, " b"]:
        """Keys, k c^2, and products with the queries, q k c."""
        return computed.double() * self.embed_dim * (self.embed_dim + self.config.queries)

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        return {"macs": self._macs(tokens.valid_or_all().sum(1))} if self.begins(index) else {}

    def loss(
        self, trace: Trace, *, teacher: Trace | None = None, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """`labels`: cross-entropy of each label's presence, sum over the scorers."""
        logits = [aux["labels"].float() for aux in trace.aux if "labels" in aux]
        if not logits or targets is None:
            return {}
        there = torch.zeros_like(logits[0])
        for row, target in zip(there, targets, strict=True):
            labels = target["labels"].unique()
            row[labels[(labels >= 0) & (labels < len(row))]] = 1
        losses = [F.binary_cross_entropy_with_logits(each, there) for each in logits]
        return {"labels": self.config.aux_weight * torch.stack(losses).sum()}
