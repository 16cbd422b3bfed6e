"""`sievit recipes` and `sievit policies`."""

import json

from sievit.cli.command import first_line, parse


def recipes(args: list[str]) -> int:
    def run(name: str | None = None, /) -> int:
        """List the recipes, or print one as JSON.

        Args:
            name: of the recipe to print.
        """
        from sievit.config import to_json
        from sievit.recipes import recipe

        print(recipe_list() if name is None else json.dumps(to_json(recipe(name)), indent=2))
        return 0

    return parse(run, args, "recipes")


def recipe_list() -> str:
    from sievit.recipes import recipes

    return "\n".join(f"  {name:<28} {summary}" for name, summary in recipes().items())


def policies(args: list[str]) -> int:
    def run() -> int:
        """List the policies that `--policy` takes."""
        from sievit.policies import policies

        print("\n".join(f"  {name:<22} {first_line(config)}" for name, config in policies().items()))
        return 0

    return parse(run, args, "policies")
