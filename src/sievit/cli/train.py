"""`sievit train`."""

import os
from pathlib import Path
from typing import Annotated, Any

from sievit.cli.command import parse, print_json
from sievit.cli.lists import recipe_list
from sievit.config import ConfigError, nearest


def train(args: list[str]) -> int:
    from sievit.recipes import recipe as find
    from sievit.recipes import recipes

    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print(
                f"usage: sievit train RECIPE [OPTIONS]\n\n{recipe_list()}\n\n"
                "RECIPE may be a file too: `sievit recipes NAME > mine.json` writes one to change.\n"
                "sievit train RECIPE --help lists options"
            )
            return 0
        raise ConfigError(f"sievit train needs a recipe first, its name or a .json file{nearest('', recipes())}")
    name = args[0]
    default = find(name)

    from dataclasses import replace

    from tyro.conf import arg

    from sievit.engine.recipe import Recipe, with_classes

    def run(
        recipe: Annotated[Recipe, arg(name="")] = default,
        *,
        out: Path = Path("runs") / Path(name).stem,
        resume: Path | None = None,
        data_root: Path | None = None,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        palette: Path | None = None,
    ) -> int:
        """Train a model; the last line of the output is one JSON object with the figures of the last validation.

        Args:
            out: folder of the run.
            resume: go on with the run in this folder, as it was started; takes no other option.
            data_root: folder of the data sets; default the recipe's, else the environment's SIEVIT_DATA, else
                ../shared/data.
            num_classes: of a segmenter's labels, where they are not the recipe's.
            ignore_index: label of pixels of which nothing is known.
            palette: file with a line `red green blue name` for each class; label images may be in these colours.
        """
        if data_root is not None:
            recipe = replace(recipe, data=replace(recipe.data, root=data_root))
        if (num_classes, ignore_index, palette) != (None, None, None):
            recipe = with_classes(recipe, num_classes=num_classes, ignore_index=ignore_index, palette=palette)
        return _run_training(None if resume else recipe, resume or out)

    if any(option.partition("=")[0] == "--resume" for option in args[1:]) and len(args) > 3:
        raise ConfigError("--resume goes on with the run as it was started and takes no other option")
    return parse(run, args[1:], f"train {name}")


def _run_training(recipe: Any, out: Path) -> int:
    """Train `recipe`, or go on with the run in `out` when there is none."""
    from rich.console import Console

    from sievit.engine.train import train

    figures = train(recipe, out=out, resume=recipe is None, console=Console(stderr=True))
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
        print_json(figures)
    return 0
