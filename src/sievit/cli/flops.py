"""`sievit flops`."""

import sys
from pathlib import Path
from typing import Annotated

from sievit.cli.command import parse, print_json
from sievit.config import ConfigError, nearest


def flops(args: list[str]) -> int:
    from tyro.conf import arg

    def run(
        target: Annotated[str, arg(metavar="TARGET")],
        /,
        *,
        size: tuple[int, int] | None = None,
        images: Path | None = None,
        policy: str | None = None,
        thresholds: tuple[float, ...] | None = None,
        batch_size: int = 1,
        limit: int | None = None,
        device: str = "auto",
    ) -> int:
        """Count what a model costs, by part; the last line of the output is one JSON object.

        Without --images every token takes part: `gflops` is by the papers' rule, `gflops_full` is everything.

        Args:
            target: recipe, checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
            size: height and width in pixels; default the training crop, of a detector the largest test image.
            images: folder of images that a trained model is run on, for what it spends on each.
            policy: takes the place of the model's own, for --images.
            thresholds: of the early exits of a segmenter, for --images.
            batch_size: images that go through the network together.
            limit: only the first so many images.
            device: cpu, cuda, cuda:1, or auto.
        """
        return _run_flops(target, size, images, policy, thresholds, batch_size, limit, device)

    return parse(run, args, "flops")


def _run_flops(
    target: str,
    size: tuple[int, int] | None,
    images: Path | None,
    policy: str | None,
    thresholds: tuple[float, ...] | None,
    batch_size: int,
    limit: int | None,
    device: str,
) -> int:
    from rich.console import Console

    from sievit.hub.fetch import HUB, shipped
    from sievit.measure.costs import costs, per_image
    from sievit.models.build import model_file, read
    from sievit.recipes import recipe, recipes
    from sievit.report import open_model

    names, models = recipes(), shipped()
    if images is None and (policy is not None or thresholds is not None):
        raise ConfigError("--policy and --thresholds say who is left out, which depends on the image; give --images")
    is_model = target in models or target.startswith(HUB) or Path(target).exists()
    if target in names and not is_model:
        if images is not None:
            raise ConfigError(f"{target!r} is a recipe, its weights are random; --images needs a trained model")
        print_json(costs(recipe(target).model, size=size, console=Console()))
        return 0
    if not is_model:
        raise ConfigError(f"{target!r} is neither a recipe nor a model{nearest(target, {*names, *models})}")
    path = model_file(target)
    figures = costs(read(path)[0], size=size, console=Console())
    if images is not None:
        model = open_model(path, policy=policy, thresholds=thresholds, device=device)
        figures["per_image"] = per_image(
            model, images, batch_size=batch_size, limit=limit, console=Console(), progress=Console(stderr=True)
        )
    failures = figures.get("per_image", {}).get("failures", ())
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    print_json(figures)
    return 1 if failures else 0
