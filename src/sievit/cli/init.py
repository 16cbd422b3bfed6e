"""`sievit init`."""

from pathlib import Path
from typing import Any

import torch

from sievit.config import Seed
from sievit.hub.file import require_free
from sievit.models.build import build, save
from sievit.recipes import recipe as find


def init(recipe: str, /, *, out: Path, seed: Seed = 0, force: bool = False) -> dict[str, Any]:
    """Write a recipe's model with random weights, to try on it what takes a trained one.

    It finds nothing, but costs what the trained one costs: for `sievit eval`, `flops` and `predict` before there are
    weights. Gates and thresholds decide at random too, so a sparse model keeps another share of tokens than a trained
    one does. The last line of the output is one JSON object.

    Args:
        recipe: name of the recipe, see `sievit recipes`.
        out: the .safetensors file to write.
        seed: of the weights.
        force: write over a file that is there.
    """
    config = find(recipe).model
    require_free(out, force=force)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(model, out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {recipe} with random weights, {parameters:,} parameters")
    return {"out": str(out), "recipe": recipe, "seed": seed, "parameters": parameters}
