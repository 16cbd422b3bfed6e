"""Control: the dense model."""

from dataclasses import dataclass

from sievit.config import variant
from sievit.policies.base import Notes, Policy, PolicyConfig, register
from sievit.tokens import Tokens, Trace


@variant("keep_all")
@dataclass(frozen=True)
class KeepAllConfig(PolicyConfig):
    """Every token takes part in every block."""


@register(KeepAllConfig)
class KeepAll(Policy):
    """Control: every token takes part in every block."""

    is_static = True

    def __init__(self, config: KeepAllConfig, *, embed_dim: int, depth: int) -> None:
        super().__init__()
        self.config, self.depth = config, depth

    def decides_at(self, index: int) -> bool:
        return index == 0

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        return tokens.select(None), {}
