"""A plan: a dense model, and what is done to it in each variant that is compared with it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sievit.config import Config, ConfigError, Count, Share
from sievit.engine.recipe import Recipe
from sievit.models.build import build
from sievit.models.inputs import ModelConfig
from sievit.policies import PolicyConfig

DENSE = "dense"
"""The variant that all others are compared with: the dense model, trained on for as long as they are trained."""
START = "start"
"""The weights that every training of a plan starts from."""


@dataclass(frozen=True, kw_only=True)
class Variant(Config):
    """One row of a plan's table.

    Attributes:
        name: of the row.
        curve: variants of one curve are joined in the plot; by default each stands for itself.
        recipe: trained from the plan's dense weights.
        weights: the variant whose trained weights are taken, or `start`, in place of a training; then only what the
            recipe's model is run with counts: its policy, and the size of its images.
        corruption: name and severity of what is done to the images of the evaluation (`lab.corruptions`).
        cost: the dial of the policy is turned until the model costs this share of the dense GFLOPs (`lab.cost`).
    """

    name: str
    curve: str = ""
    recipe: Recipe
    weights: str | None = None
    corruption: tuple[str, Count] | None = None
    cost: Share | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name, re.ASCII):
            raise ConfigError(f"a variant is called {self.name!r}; take letters, digits and _-.")


Plan = Callable[[Recipe], list[Variant]]
"""From the recipe of the dense model, whose training starts from its weights, to the variants. A plan is a function
with a docstring, whose first line `sievit ablate` prints."""


def trained(recipe: Recipe, name: str, policy: PolicyConfig | None = None, *, curve: str = "", **train: Any) -> Variant:
    """The dense model trained with a policy (None: without), and other fields of `train`."""
    model = recipe.model if policy is None else replace(recipe.model, policy=policy)
    return Variant(name=name, curve=curve, recipe=replace(recipe, model=model, train=replace(recipe.train, **train)))


def with_weights(
    variant: Variant, name: str, *, curve: str = "", corruption: tuple[str, int] | None = None, **model: Any
) -> Variant:
    """The weights of another variant, run with other fields of the model (`policy`, `input`), or on other images."""
    recipe = replace(variant.recipe, model=replace(variant.recipe.model, **model))
    weights = variant.weights or variant.name
    return replace(variant, name=name, curve=curve, recipe=recipe, weights=weights, corruption=corruption)


def joined(plans: list[list[Variant]]) -> list[Variant]:
    """The variants of several plans; those that have the same name and recipe once."""
    found: list[Variant] = []
    for variant in (variant for variants in plans for variant in variants):
        if all(replace(variant, curve=other.curve) != other for other in found):
            found.append(variant)
    return found


def checked(variants: list[Variant]) -> list[Variant]:
    """The variants of a plan, the control first.

    Raises:
        ConfigError: two have one name, one takes weights that are not there or cannot be built, or none is the control.
    """
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1 or name == START:
            raise ConfigError(f"the plan has two variants called {name!r}; give others")
    if DENSE not in names:
        raise ConfigError(f"the plan has no variant called {DENSE!r}, which all others are compared with")
    of_their_own = {variant.name for variant in variants if variant.weights is None}
    built: list[ModelConfig] = []
    for variant in variants:
        if variant.weights not in (None, START, *of_their_own):
            raise ConfigError(f"{variant.name} takes the weights of {variant.weights!r}, which is not trained here")
        if variant.recipe.model in built:
            continue
        built.append(variant.recipe.model)
        try:
            with torch.device("meta"):
                build(variant.recipe.model)
        except ConfigError as error:
            raise ConfigError(f"the variant {variant.name!r} of the plan: {error}") from error
    return sorted(variants, key=lambda variant: variant.name != DENSE)
