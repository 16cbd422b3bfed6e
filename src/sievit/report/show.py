"""One picture of one image: what a model answers densely and pruned, and which tokens it took for that."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from sievit import terminal, viz
from sievit.config import ConfigError, Share
from sievit.data.images import read_image, to_tensor
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import timed_in_turns
from sievit.files import write_png
from sievit.models.base import Answer, Model
from sievit.models.build import load
from sievit.policies import KeepAllConfig, PolicyOptions
from sievit.report.figures import answer_note, came_back, exits_of
from sievit.tasks import Task, task_of


def show(
    model: Path,
    image: Path,
    /,
    *,
    out: Path = Path("out/show.png"),
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    score_threshold: Share = 0.5,
    device: str = "auto",
) -> dict[str, Any]:
    """Show what a model sees in an image: dense and pruned prediction, and the tokens that it computes.

    One picture: the image, both predictions, where they differ, how many blocks computed each token, where tokens left
    or how often they came back, and the tokens of each block. "Dense" is the same model when no token is left out. The
    last line of the output is one JSON object: per block `keep`, the share of the tokens that was computed; `left_at`
    where tokens leave early; `returned`, how often a token came back; `differs`, the share of the pixels that get
    another class, or of the objects that only one of the two finds; and of both `gflops` and `ms`.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        image: an image file.
        out: the picture, a PNG file.
        policy: another policy.
        score_threshold: objects are shown that have at least this score.
        device: cpu, cuda, cuda:1, or auto.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: the picture is a PNG file; give a name that ends in .png")
    if out.exists() and out.samefile(image):
        raise ConfigError(f"--out {out}: is the image itself; give another name")
    picture = read_image(image)
    sparse = load(model, policy=policy, device=pick_device(device)).eval()
    dense, pixels = sparse.with_config(policy=KeepAllConfig()), to_tensor(picture)
    turns = timed_in_turns([dense, sparse], [pixels], console=None, kept=lambda answer: answer)
    times, answers = [ms for ((ms, _),) in turns], [answer for ((_, answer),) in turns]
    drawn, figures = _drawn(task_of(sparse.config), [dense, sparse], answers, times, picture, score_threshold)
    title = f"{model.stem if model.suffix else model.name} on {image.name}"
    write_png(out, drawn(title=title, columns=4))
    terminal.console().print(str(out), soft_wrap=True)
    return {**figures, "device": device_name(sparse.device)}


def _drawn(
    task: Task, models: list[Model], answers: list[Answer], times: list[float], image: Image.Image, min_score: float
) -> tuple[partial[Image.Image], dict[str, Any]]:
    """The figure, from `title` and `columns`; and what it shows, for JSON."""
    costs = [model.gflops(answer).item() for model, answer in zip(models, answers, strict=True)]
    notes = [
        f"{answer_note(task, model, answer, min_score=min_score)} · {ms:.0f} ms"
        for model, answer, ms in zip(models, answers, times, strict=True)
    ]
    sparse, results = answers[1], [answer.results[0] for answer in answers]
    panels = [
        viz.Panel(name, note, partial(task.picture, image, result, min_score=min_score))
        for name, note, result in zip(("dense", "pruned"), notes, results, strict=True)
    ]
    differs = task.disagreement(results[1], results[0], min_score=min_score)
    if differs is not None:
        alone = task.only_in(results[1], results[0], min_score=min_score)
        draw = partial(task.picture, image.convert("L"), alone, min_score=min_score)
        panels.append(viz.Panel("only in pruned", f"{differs:.1%} differ", draw))
    keep = sparse.computed(0)
    back, exits = came_back(keep).sum(0), exits_of(sparse)
    panels.append(viz.heat_panel(image, keep))
    if exits is not None:
        panels.append(viz.exits_panel(image, exits))
    if back.any():
        note = f"{(back > 0).float().mean().item():.0%} of the tokens came back"
        panels.append(viz.counts_panel(image, back, int(back.max()), title="times a token came back", note=note))
    shares, tokens = sparse.shares()[0].tolist(), sparse.tokens()[0].tolist()
    note = f"% of the tokens by block, {max(tokens):.0f} to {min(tokens):.0f}"
    panels.append(viz.bars_panel(shares, title="tokens per block", note=note))
    legends = [task.legend(results), *([] if exits is None else [viz.exits_legend(exits)])]
    below: list[Callable[[int], Image.Image]] = [partial(viz.legend, legend) for legend in legends if legend]
    if exits is None:
        below.append(lambda width: viz.keep_maps(image, keep, width=width))
    reported = {name: values[0].tolist() for name, values in sparse.reported(models[1].policy).items()}
    figures = {
        "keep": [round(share, 4) for share in shares],
        **{name: [round(share, 4) for share in values] for name, values in reported.items()},
        "returned": round(back.double().mean().item(), 4),
        "differs": None if differs is None else round(differs, 4),
        "gflops": {"dense": round(costs[0], 3), "pruned": round(costs[1], 3)},
        "ms": {"dense": round(times[0], 2), "pruned": round(times[1], 2)},
    }
    return partial(viz.figure, image, panels, below=below), figures
