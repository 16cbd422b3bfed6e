"""`sievit flops`."""

from pathlib import Path
from typing import Any

from sievit import terminal
from sievit.config import ConfigError, Count, nearest
from sievit.devices import pick_device
from sievit.hub.fetch import HUB, shipped
from sievit.measure.costs import costs, per_image
from sievit.models.build import load, model_file, read
from sievit.policies import PolicyOptions
from sievit.recipes import recipe, recipes


def flops(
    target: str,
    /,
    *,
    size: tuple[Count, Count] | None = None,
    images: Path | None = None,
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    batch_size: Count = 1,
    limit: Count | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Count what a model costs, by part; the last line of the output is one JSON object.

    Without --images every token takes part: `gflops` is by the papers' rule, `gflops_full` is everything.

    Args:
        target: recipe, checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        size: height and width in pixels; default the training crop, of a detector the largest test image.
        images: folder of images that a trained model is run on, for what it spends on each.
        policy: another policy, for --images.
        batch_size: images that go through the network together.
        limit: only the first so many images.
        device: cpu, cuda, cuda:1, or auto.
    """
    names, models, console = recipes(), shipped(), terminal.console(stderr=False)
    if images is None and (policy, batch_size, limit, device) != (PolicyOptions(), 1, None, "auto"):
        raise ConfigError("--policy, --set, --batch-size, --limit and --device are of runs over images; give --images")
    is_model = target in models or target.startswith(HUB) or Path(target).exists()
    if target in names and not is_model:
        if images is not None:
            raise ConfigError(f"{target!r} is a recipe, its weights are random; --images needs a trained model")
        return costs(recipe(target).model, size=size, console=console)
    if not is_model:
        raise ConfigError(f"{target!r} is neither a recipe nor a model{nearest(target, {*names, *models})}")
    path = model_file(target)
    figures = costs(read(path)[0], size=size, console=console)
    if images is not None:
        model, bar = load(path, policy=policy, device=pick_device(device)), terminal.console()
        found = per_image(model, images, batch_size=batch_size, limit=limit, console=console, progress=bar)
        figures |= {"failures": found.pop("failures", []), "per_image": found}
    return figures
