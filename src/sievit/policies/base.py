"""What a policy is, and the registry that tests, recipes and the command line go through."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sievit.config import ConfigError, kind_of, nearest, variants
from sievit.tokens import Prediction, Tokens, Trace

Head = Callable[[Tokens, Tensor | None, Prediction | None], Prediction]
"""Looks at the tokens of a choice (b, n) (None: all valid ones) and says what it sees; where it does not look, the
earlier prediction stands."""


Attend = Callable[[int, Tokens], Tensor]
"""Block index and canvas to (b, n): how much attention each grid token gets there."""


@dataclass(frozen=True)
class PolicyConfig:
    """Base of every policy's configuration; each policy file has one, registered under the policy's name."""


class Policy(nn.Module):
    """Decides, before each block, which tokens take part in it.

    A policy sees the canvas and the trace so far and returns values; it writes nothing on itself during `forward`.
    """

    needs_heads: ClassVar[bool] = False
    """Whether it asks the heads that stand behind some of the blocks; they are given to it and stay the model's."""
    needs_attention: ClassVar[bool] = False
    """Whether it asks the blocks whom they attend to."""
    gates_in_training: ClassVar[bool] = False
    """Whether its choices in training are gates (`Tokens.gate`), which can be computed masked or selected."""

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Tensor]]:
        """Choose for block `index` (0-based).

        Returns:
            The canvas with its `keep` (and in training `gate`) set, and what the trace should remember by name.
        """
        raise NotImplementedError

    def decides_at(self, index: int) -> bool:
        """Whether it has anything to say before block `index`; where not, it is not asked and its last choice stands.

        It is asked before the first block of every run of the loop in any case.
        """
        return True

    def after_blocks(self, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Tensor]]:
        """The last word, when all blocks are done; returns what `before_block` returns."""
        return tokens, {}

    def loss(self, trace: Trace) -> dict[str, Tensor]:
        """Training losses by name, already weighted; empty for a policy that learns nothing."""
        return {}

    def macs(self, trace: Trace) -> Tensor:
        """(b,) multiply-adds per image that this policy's own products took in the pass; by default none."""
        return torch.zeros(len(trace.valid), device=trace.valid.device)


P = TypeVar("P", bound=type[Policy])
_POLICIES: dict[type[PolicyConfig], Any] = {}


def register(config_class: type[PolicyConfig]) -> Callable[[P], P]:
    """Class decorator: `build_policy` makes this policy from a `config_class`."""

    def mark(cls: P) -> P:
        _POLICIES[config_class] = cls
        return cls

    return mark


def build_policy(
    config: PolicyConfig,
    *,
    embed_dim: int,
    depth: int,
    heads: Mapping[int, Head] | None = None,
    attention: Attend | None = None,
) -> Policy:
    """The policy that `config` describes, for a backbone of `depth` blocks of `embed_dim` channels.

    Args:
        heads: by block, the head that stands behind it; for policies that ask heads (`Policy.needs_heads`).
        attention: of the backbone, `ViT.attention_to`; for policies that ask it (`Policy.needs_attention`).

    Raises:
        ConfigError: a policy that needs heads, or the backbone's attention, where there are none.
    """
    builder = _POLICIES.get(type(config))
    if builder is None:
        raise ConfigError(f"no policy is registered for {type(config).__name__}{nearest('', policies())}")
    if builder.needs_attention:
        if attention is None:
            raise ConfigError(f"the policy {kind_of(config)!r} needs a backbone whose attention it can ask")
        return builder(config, embed_dim=embed_dim, depth=depth, attention=attention)
    if not builder.needs_heads:
        return builder(config, embed_dim=embed_dim, depth=depth)
    if not heads:
        raise ConfigError(
            f"the policy {kind_of(config)!r} lets tokens leave with the prediction of a head; it goes with a segmenter"
        )
    return builder(config, embed_dim=embed_dim, depth=depth, heads=heads)


def policies() -> dict[str, type[PolicyConfig]]:
    """Every registered policy's configuration class, by name."""
    return variants(PolicyConfig)


def policy_config(name: str) -> PolicyConfig:
    """The default configuration of the policy called `name`; an unknown name is an error with the nearest match."""
    if name not in policies():
        raise ConfigError(f"unknown policy {name!r}{nearest(name, policies())}")
    return policies()[name]()


PAPER_SCHEDULE = (0.7, 0.7, 0.7, 0.49, 0.49, 0.49, 0.343, 0.343, 0.343)
"""SViT's share of tokens to keep, for blocks 3 to 11 of twelve."""


def spread(shares: tuple[float, ...], *, first_block: int, depth: int) -> tuple[float, ...]:
    """One share per block from `first_block` on: the given ones in equal runs, in their order.

    Raises:
        ConfigError: a share outside 0..1, more shares than blocks, or no block left to choose for.
    """
    blocks = depth - first_block
    if not 0 <= first_block < depth:
        raise ConfigError(f"first_block {first_block}: the backbone has blocks 0 to {depth - 1}")
    if not shares or any(not 0.0 <= share <= 1.0 for share in shares):
        raise ConfigError(f"shares of tokens to keep must be between 0 and 1, got {shares}")
    if blocks < len(shares) and len(set(shares)) > blocks:
        raise ConfigError(
            f"{len(shares)} shares for {blocks} blocks from block {first_block} on; give {blocks} or fewer"
        )
    return tuple(shares[i * len(shares) // blocks] for i in range(blocks))


ROUNDING = 1e-6
"""Of shares, so that 0.7 of ten tokens are seven."""


def select_top(tokens: Tokens, scores: Tensor, share: float, *, multiple: int = 1, static: bool = False) -> Tokens:
    """The canvas with a choice: of each image's tokens the `share` with the highest scores (b, n), rounded up.

    Args:
        multiple: counts are rounded up to a multiple of it.
        static: no shape may depend on the sizes of the images either.
    """
    if share >= 1:
        return tokens.select(None)
    valid, scores = tokens.valid, scores.double()
    if valid is not None:
        scores = scores.masked_fill(~valid, -math.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    n = order.shape[1]
    most = min(n, -(-math.ceil(share * n - ROUNDING) // multiple) * multiple)
    if valid is None:
        return tokens.select_order(order[:, :most].sort(dim=1).values)
    count = ((valid.sum(1, keepdim=True).double() * share - ROUNDING).ceil() / multiple).ceil() * multiple
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n, device=order.device).expand_as(order))
    keep = valid & (rank < count)
    return tokens.select_order(order[:, :most].sort(dim=1).values, keep) if static else tokens.select(keep)
