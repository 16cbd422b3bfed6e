"""What a model computes where: tokens by class, by size of object and by image, and tokens that come back."""

import math
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from sievit import terminal
from sievit.config import ConfigError, Count, Natural
from sievit.data.dataset import ImageDataset
from sievit.data.truth import Truth
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import timed
from sievit.files import write_json, write_png
from sievit.models.base import Answer, Model
from sievit.models.build import load
from sievit.policies import PolicyOptions
from sievit.report.figures import answer_figure, answer_note, came_back
from sievit.report.plot import draw_shares
from sievit.tasks import Region, Task, task_of

SIZES = (("small", 32**2), ("medium", 96**2), ("large", math.inf))
"""COCO's sizes of objects, and below how many pixels."""
ELSEWHERE = "elsewhere"
"""Pixels of no object."""


@dataclass
class _Sums:
    """Pixels of a part of the images, and those of them under tokens that were computed, by block."""

    pixels: float = 0.0
    computed: Tensor | float = 0.0
    left: Tensor | float = 0.0
    """Pixels that left at each stage, the last entry never."""

    def add(self, inside: Tensor, keep: Tensor, stages: Tensor | None) -> None:
        """Add the pixels `inside` (h, w); keep (blocks, h, w) bool, stages (stages, h, w) bool."""
        self.pixels += float(inside.sum())
        self.computed = self.computed + (keep & inside).sum((1, 2)).double()
        if stages is not None:
            self.left = self.left + (stages & inside).sum((1, 2)).double()

    def shares(self) -> dict[str, list[float]]:
        """`keep` by block, and `left_at` by stage where tokens leave."""
        names = {"keep": self.computed, "left_at": self.left}
        return {
            name: [round(x, 4) for x in (value / max(self.pixels, 1)).tolist()]
            for name, value in names.items()
            if isinstance(value, Tensor)
        }


@dataclass
class Findings:
    """What is known after some of the images."""

    classes: tuple[str, ...]
    by_class: dict[str, _Sums] = field(default_factory=dict)
    by_size: dict[str, _Sums] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    """Per image `index`, `gflops`, `keep` and the share of its pixels that each class has."""
    gaps: int = 0
    gaps_of_one: int = 0
    tokens: int = 0
    returned: int = 0

    def add(self, index: int, regions: list[Region], answer: Answer, gflops: float) -> None:
        """Add an image."""
        keep = answer.computed(0)
        stages = None
        if answer.trace.exited:
            exits, count = answer.exit_stages(0), len(answer.trace.exited)
            stages = torch.stack([exits == stage for stage in range(count + 1)])
        size = (keep.shape[1], keep.shape[2])
        elsewhere = torch.ones(size, dtype=torch.bool)
        shares: dict[str, float] = {}
        for region in regions:
            inside = _nearest(region.pixels, size)
            elsewhere &= ~inside
            name = self.classes[region.label]
            self.by_class.setdefault(name, _Sums()).add(inside, keep, stages)
            shares[name] = min(1.0, shares.get(name, 0.0) + float(inside.float().mean()))
            if region.area is not None:
                of_size = next(word for word, limit in SIZES if region.area < limit)
                self.by_size.setdefault(of_size, _Sums()).add(inside, keep, stages)
        if elsewhere.any():
            self.by_class.setdefault(ELSEWHERE, _Sums()).add(elsewhere, keep, stages)
        objects = sum(region.area is not None for region in regions)
        mean = answer.shares()[0].mean().item()
        self.images.append({"index": index, "gflops": gflops, "keep": mean, "objects": objects, "shares": shares})
        self._returns(torch.stack(answer.trace.keep)[:, answer.trace.valid])

    def _returns(self, keep: Tensor) -> None:
        """Count how often tokens (blocks, n) were left out and came back."""
        gone, once = (keep[:-1] & ~keep[1:]).any(0), came_back(keep)
        self.gaps += int(once.sum())
        self.gaps_of_one += int((once & keep[:-2]).sum())
        self.tokens += int(gone.sum())
        self.returned += int(once.any(0).sum())

    def content(self) -> dict[str, Any]:
        """For JSON."""
        classes = {name: self.by_class[name] for name in (*self.classes, ELSEWHERE) if name in self.by_class}
        parts = {
            "by_class": {name: {"pixels": sums.pixels, **sums.shares()} for name, sums in classes.items()},
            "by_size": {name: self.by_size[name].shares() for name, _ in SIZES if name in self.by_size},
            "correlation": self.correlations(),
        }
        if self.gaps:
            parts["returned"] = {
                "of_tokens_left_out": round(self.returned / max(self.tokens, 1), 4),
                "in_the_next_block": round(self.gaps_of_one / self.gaps, 4),
            }
        return parts

    def correlations(self) -> dict[str, list[float]]:
        """Pearson's r over images, with the limits of its interval of 95 % (Fisher's transformation), of the GFLOPs
        with the share of the pixels of each class that half of the images or ten of them hold, and with the number of
        objects."""
        cost, many = [image["gflops"] for image in self.images], min(10, len(self.images) // 2)
        sides = {name: [image["shares"].get(name, 0.0) for image in self.images] for name in self.classes}
        sides = {name: side for name, side in sides.items() if sum(map(bool, side)) >= max(3, many)}
        sides["objects"] = [float(image["objects"]) for image in self.images]
        found = {}
        for name, side in sides.items():
            if len(cost) > 3 and min(statistics.pstdev(cost), statistics.pstdev(side)) > 0:
                r = statistics.correlation(cost, side)
                middle, half = math.atanh(max(-0.999999, min(r, 0.999999))), 1.96 / math.sqrt(len(cost) - 3)
                found[name] = [round(x, 3) for x in (r, math.tanh(middle - half), math.tanh(middle + half))]
        return found


def inspect(
    model: Path,
    /,
    images: Path,
    *,
    truth: Truth = Truth(),  # noqa: B008
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    out: Path = Path("out/inspect"),
    limit: Count | None = None,
    pictures: Natural = 5,
    device: str = "auto",
) -> dict[str, Any]:
    """Look inside: which tokens a model computes, by class, size of object and image.

    Writes inspect.json, inspect.png (shares by block) and pictures of the cheapest and the dearest images. A
    detector's tokens are counted in the boxes of the objects, a segmenter's on the pixels of the classes. The last line
    of the output is the content of inspect.json: `by_class` and `by_size` with the share of tokens by block (`keep`)
    and, where tokens leave early, by stage (`left_at`, the last one: never); `correlation` over images of the GFLOPs
    with the pixels of a class (r, and the limits of its 95 % interval); and `returned`: of the tokens that were left
    out the share that came back, and of all returns the share after a single block.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: folder that holds the images.
        truth: the annotations of the images.
        policy: another policy.
        out: folder for the files.
        limit: only the first so many images.
        pictures: so many of the cheapest images, and of the dearest, get a picture.
        device: cpu, cuda, cuda:1, or auto.
    """
    loaded, console = load(model, policy=policy, device=pick_device(device)).eval(), terminal.console()
    task = task_of(loaded.config)
    data = task.open(images, truth)
    indices = range(len(data))[:limit]
    if not indices:
        raise ConfigError(f"{data.source}: no image to look at")
    findings = Findings(loaded.config.classes)
    for index in terminal.track(indices, "looking", console=console):
        image, target = data[index]
        answer, _ = timed(loaded, [image])
        regions = task.regions(target, (image.shape[1], image.shape[2]))
        findings.add(index, regions, answer, loaded.gflops(answer).item())
    content: dict[str, Any] = {**findings.content(), "images": len(indices), "device": device_name(loaded.device)}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "inspect.json", content)
    draw_shares({**content["by_class"], **content["by_size"]}, out / "inspect.png")
    _draw_extremes(task, loaded, data, findings.images, out, count=pictures)
    terminal.console(stderr=False).print(_table(content))
    console.print(f"pictures: {out}", soft_wrap=True)
    return content


def _nearest(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w) bool at another size."""
    rows, columns = (torch.arange(new) * old // new for new, old in zip(size, pixels.shape, strict=True))
    return pixels[rows][:, columns]


def _draw_extremes(
    task: Task, model: Model, data: ImageDataset, images: list[dict[str, Any]], out: Path, *, count: int
) -> None:
    """Pictures of the images that cost the least and the most."""
    ranked = sorted(images, key=lambda image: image["gflops"])
    groups = {"cheapest": ranked[:count], "dearest": ranked[::-1][:count]}
    for word, chosen in groups.items():
        for place, each in enumerate(chosen, start=1):
            image, _ = data[each["index"]]
            answer, _ = timed(model, [image])
            name = data.path(each["index"]).stem
            shown = {"prediction": (answer_note(task, model, answer), answer.results[0])}
            title = f"{word} {place}: {each['gflops']:.1f} GFLOPs, {each['keep']:.0%} of the tokens"
            write_png(out / f"{word}_{place}_{name}.png", answer_figure(task, image, shown, answer, title=title))


def _table(content: dict[str, Any]) -> Table:
    """For people: of each class and size the share of tokens in three parts of the blocks, or where they leave."""
    rows: dict[str, dict[str, list[float]]] = {**content["by_class"], **content["by_size"]}
    blocks = len(next(iter(rows.values()))["keep"]) if rows else 0
    edges = sorted({0, blocks // 3, 2 * blocks // 3, blocks})
    stages = max((len(row.get("left_at", ())) for row in rows.values()), default=0)
    names = [f"at {stage}" for stage in range(stages - 1)] + ["never"]
    if not stages:
        names = [f"blocks {low}-{high - 1}" for low, high in pairwise(edges)]
    what = "where tokens left, by stage" if stages else "tokens computed"
    table = Table(title=f"{what}, {content['images']} images", title_justify="left")
    for column in ("", *names, "r(GFLOPs)"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in rows.items():
        shares = row.get("left_at") or [statistics.fmean(row["keep"][low:high]) for low, high in pairwise(edges)]
        r = content["correlation"].get(name)
        table.add_row(name, *(f"{x:.0%}" for x in shares), f"{r[0]:+.2f}" if r else "")
    return table
