"""Recipes: everything that a run depends on, by name."""

from pathlib import Path

from sievit.config import ConfigError, nearest
from sievit.engine.recipe import Recipe
from sievit.recipes import detectors, facade, nuclei, segmenters
from sievit.recipes.common import Listed
from sievit.text import load_json

_RECIPES: dict[str, Listed] = {**nuclei.RECIPES, **facade.RECIPES, **detectors.RECIPES, **segmenters.RECIPES}


def recipes() -> dict[str, str]:
    """Every recipe's name, and a line about it."""
    return {name: listed.summary for name, listed in _RECIPES.items()}


def recipe(name: str) -> Recipe:
    """The recipe called `name`, or that of a .json file as `sievit recipes NAME` prints it.

    Raises:
        ConfigError: an unknown name; the nearest is given. A file that cannot be read or is no recipe.
    """
    if name.endswith(".json"):
        return load_json(Recipe, Path(name))
    if name not in _RECIPES:
        raise ConfigError(f"unknown recipe {name!r}{nearest(name, _RECIPES)}")
    return _RECIPES[name].recipe
