"""`sievit train`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from sievit import terminal
from sievit.cli.command import parse
from sievit.cli.lists import recipe_list
from sievit.config import ConfigError, Count, Label, nearest
from sievit.engine.recipe import Recipe, with_classes
from sievit.engine.train import train as run_training
from sievit.recipes import recipe as find
from sievit.recipes import recipes


def train(args: list[str]) -> dict[str, Any] | None:
    """Train the recipe that the arguments begin with; its fields are the options."""
    given = [arg for arg in args if arg.partition("=")[0] == "--resume"]
    if given:
        return _resumed(args, given[0])
    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print(
                f"usage: sievit train RECIPE [OPTIONS]\n\n{recipe_list()}\n\n"
                "RECIPE may be a file too: `sievit recipes NAME > mine.json` writes one to change.\n"
                "sievit train RECIPE --help lists options; sievit train --resume RUN goes on with a run"
            )
            return None
        raise ConfigError(f"sievit train needs a recipe first, its name or a .json file{nearest('', recipes())}")
    name = args[0]
    default = find(name)

    def run(
        recipe: Annotated[Recipe, arg(name="")] = default,
        *,
        out: Path = Path("runs") / Path(name).stem,
        resume: Path | None = None,
        data_root: Path | None = None,
        num_classes: Count | None = None,
        ignore_index: Label | None = None,
        palette: Path | None = None,
    ) -> dict[str, Any] | None:
        """Train a model; the last line of the output is one JSON object with the figures of the last validation.

        Args:
            out: folder of the run.
            resume: go on with the run in this folder, as it was started; takes no other option, and no recipe.
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
        return _printed(run_training(recipe, out=out, name=name, console=terminal.console()))

    return parse(run, args[1:], f"train {name}", prefixes=True)


def _resumed(args: list[str], option: str) -> dict[str, Any] | None:
    """`[RECIPE] --resume RUN`, or `--resume=RUN`."""
    name = args[0] if args[0] != option else None
    values = [option.partition("=")[2]] if "=" in option else args[args.index(option) + 1 :]
    if len(values) != 1 or not values[0] or len(args) != (name is not None) + (1 if "=" in option else 2):
        raise ConfigError(
            "--resume takes the folder of a run, which goes on as it was started, and no other option; write "
            "sievit train --resume RUN"
        )
    return _printed(run_training(None, out=Path(values[0]), resume=True, name=name, console=terminal.console()))


def _printed(figures: dict[str, Any]) -> dict[str, Any] | None:
    return figures if os.environ.get("RANK", "0") == "0" else None  # one of torchrun's processes prints
