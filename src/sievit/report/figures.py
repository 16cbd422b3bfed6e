"""Pictures of what a model answers for an image, and of the tokens that it took; and the loop over images."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sievit import viz
from sievit.models.base import Answer, Model
from sievit.tasks import Task


def answer_figure(
    task: Task,
    image: viz.Picture,
    results: Mapping[str, tuple[str, Any]],
    answer: Answer,
    *,
    index: int = 0,
    title: str = "",
    min_score: float = 0.5,
) -> Image.Image:
    """Results for one image side by side, and below them the tokens that one of the models took.

    Args:
        results: by title, each with a note.
        answer: of a pass over this image, its `index`-th, whose tokens are shown.
        min_score: of what is drawn, where results have scores.
    """
    panels = [
        viz.Panel(name, note, partial(task.picture, image, result, min_score=min_score))
        for name, (note, result) in results.items()
    ]
    legends = [task.legend([result for _, result in results.values()])]
    exits, below = exits_of(answer, index), []
    if exits is None:
        keep = answer.computed(index)
        panels.append(viz.heat_panel(image, keep))
        below = [lambda width: viz.keep_maps(image, keep, width=width)]
    else:
        panels.append(viz.exits_panel(image, exits))
        legends.append(viz.exits_legend(exits))
    below = [*(partial(viz.legend, legend) for legend in legends if legend), *below]
    return viz.figure(image, panels, below=below, title=title, columns=None if len(panels) < 4 else 3)


def answer_note(task: Task, model: Model, answer: Answer, *, index: int = 0, min_score: float = 0.5) -> str:
    """What is written below the title of a result: of the `index`-th image of a pass."""
    gflops = model.gflops(answer)[index].item()
    parts = (task.summary(answer.results[index], min_score=min_score), f"{gflops:.1f} GFLOPs")
    return " · ".join(part for part in parts if part)


def exits_of(answer: Answer, index: int = 0) -> viz.Exits | None:
    """Where the tokens of the `index`-th image left for good; None where none can."""
    blocks = [block for block, notes in enumerate(answer.trace.aux, start=-1) if "exited" in notes]
    if not blocks:
        return None
    places = [f"after block {block}" for block in blocks[:-1]]
    return viz.Exits(answer.exit_stages(index).clamp(max=len(places)), (*places, "never"))


def came_back(keep: Tensor) -> Tensor:
    """(blocks - 2, ...) bool, from the third block on: it computed what the block before left out and one before that
    had computed; keep (blocks, ...) bool."""
    before = torch.cummax(keep.int(), 0).values[:-2].bool()
    return keep[2:] & ~keep[1:-1] & before
