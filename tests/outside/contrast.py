"""A pruning method as a user would write it, outside of the package, and a plan that compares it with others."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from sievit.engine.recipe import Recipe
from sievit.lab import Variant, trained
from sievit.policies import RandomConfig, SharesConfig, SharesPolicy, register
from sievit.tokens import Tokens


@dataclass(frozen=True)
class ContrastConfig(SharesConfig):
    """The tokens that differ most from those around them."""

    swept: ClassVar = ("shares", ("0.8", "0.6", "0.4"))
    first_block: int = 1
    shares: tuple[float, ...] = (0.6,)


@register(ContrastConfig)
class Contrast(SharesPolicy):
    """Control: the distance of a token to the mean of the three by three in whose middle it stands."""

    def scores(self, index: int, tokens: Tokens) -> Tensor:
        there = tokens.valid_or_all().unflatten(1, tokens.grid)[:, None].float()  # (b, 1, h, w)
        x = tokens.map().detach().float() * there
        around, number = (F.avg_pool2d(each, 3, stride=1, padding=1) for each in (x, there))
        return (x - around / number.clamp(min=1e-6)).norm(dim=1).flatten(1)  # (b, n)


def plan(recipe: Recipe) -> list[Variant]:
    """Tokens that differ from those around them, beside tokens at random."""
    policies = {"dense": None, "contrast": ContrastConfig(), "random": RandomConfig(first_block=1, shares=(0.6,))}
    return [trained(recipe, name, policy) for name, policy in policies.items()]
