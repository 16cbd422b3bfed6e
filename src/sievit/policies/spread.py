"""Tokens that stand for all others: each one that is left out has a similar one to follow."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sievit.config import variant
from sievit.policies.base import Notes, register
from sievit.policies.merging import covering, covering_macs
from sievit.policies.selection import SharesConfig, SharesPolicy
from sievit.tokens import Tokens, Trace


@variant("spread")
@dataclass(frozen=True)
class SpreadConfig(SharesConfig):
    """A fixed share of the tokens, most similar ones left out; those get the updates of the others. Needs no training.

    Attributes:
        propagate: as of every policy.
    """

    propagate: bool = field(default=True, kw_only=True)

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The JSON of versions in which a part of the tokens stood in an even pattern."""
        return {name: value for name, value in data.items() if name != "even"}


@register(SpreadConfig)
class Spread(SharesPolicy):
    """Wherever the share changes similar tokens are left out, and those that stay stand for them (`covering`).

    No paper's: the matching of ToMe (arXiv 2210.09461), once for several blocks, without merging.
    """

    config: SpreadConfig

    def scores(self, index: int, tokens: Tokens) -> Float[Tensor, "b n"]:
        return -covering(tokens, self._share(index))

    def _share(self, index: int) -> float:
        return self.shares[index - self.config.first_block]

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        tokens, notes = super().before_block(index, tokens, trace)
        return tokens, {**notes, **self.dense_notes(index, tokens)} if "scores" in notes else notes

    def decides_at(self, index: int) -> bool:
        return index == 0 or self.changes_at(index)

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        if index == self.depth or not self.changes_at(index) or self._share(index) == 1:
            return {}
        return {"macs": covering_macs(tokens, self._share(index))}
