"""`sievit init`."""

from pathlib import Path
from typing import Annotated

from sievit.cli.command import parse, print_json
from sievit.cli.out import require_free


def init(args: list[str]) -> int:
    from tyro.conf import arg

    def run(
        recipe: Annotated[str, arg(metavar="RECIPE")],
        /,
        *,
        out: Path,
        seed: int = 0,
        force: bool = False,
    ) -> int:
        """Write a recipe's model with random weights, to try on it what takes a trained one.

        It finds nothing, but costs what the trained one costs: for `sievit eval`, `flops` and `predict` before there
        are weights. Gates and thresholds decide at random too, so a sparse model keeps another share of tokens than a
        trained one does. The last line of the output is one JSON object.

        Args:
            recipe: name of the recipe, see `sievit recipes`.
            out: the .safetensors file to write.
            seed: of the weights.
            force: write over a file that is there.
        """
        return _init(recipe, out, seed, force)

    return parse(run, args, "init")


def _init(recipe: str, out: Path, seed: int, force: bool) -> int:
    import torch

    from sievit.models.build import build, save
    from sievit.recipes import recipe as find

    config = find(recipe).model
    require_free(out, force=force)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(model, out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {recipe} with random weights, {parameters:,} parameters")
    print_json({"out": str(out), "recipe": recipe, "seed": seed, "parameters": parameters})
    return 0
