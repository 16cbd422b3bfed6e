"""`sievit recipes` and `sievit policies`."""

import json

from sievit.config import to_json
from sievit.policies import policies as known_policies
from sievit.recipes import recipe
from sievit.recipes import recipes as known_recipes
from sievit.text import first_line


def recipes(name: str | None = None, /) -> None:
    """List the recipes, or print one as JSON.

    Args:
        name: of the recipe to print.
    """
    print(recipe_list() if name is None else json.dumps(to_json(recipe(name)), indent=2))


def recipe_list() -> str:
    """Names and what they are, a line each."""
    return "\n".join(f"  {name:<28} {summary}" for name, summary in known_recipes().items())


def policies() -> None:
    """List the policies that `--policy` takes."""
    print("\n".join(f"  {name:<22} {first_line(config)}" for name, config in known_policies().items()))
