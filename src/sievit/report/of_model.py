"""The sections of a report on a model on a data set: dense against pruned, image by image."""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console

from sievit import terminal
from sievit.data.dataset import ImageDataset
from sievit.engine.bootstrap import LEVEL, drawn
from sievit.engine.evaluate import compare
from sievit.models.base import Answer, Model
from sievit.report.figures import exits_of
from sievit.report.inspect import Findings
from sievit.report.page import PERCENT, Part, chart, choice, column, legend, section, table, tiles
from sievit.report.pictures import Pair, picture
from sievit.tasks import Task, task_of

WORST = "Worst disagreements"
PART_DRAWS = 400
"""Of the bootstrap, for classes and sizes."""
Column = dict[str, Any]


@dataclass
class Seen:
    """What is known of the images after a comparison.

    Attributes:
        task, models, data: the two models, "dense" and "sparse", on a data set.
        min_score: objects of at least this score are compared and drawn.
        findings: what the sparse model computes where.
        rows: per image `name`, and by model `gflops` and `ms`; `keep`, and `differs` where results can be compared.
        parts: by model the sums of GFLOPs of each part of the model.
        places: where tokens leave, in words.
    """

    task: Task
    models: Mapping[str, Model]
    data: ImageDataset
    min_score: float
    findings: Findings
    rows: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, dict[str, float]] = field(default_factory=lambda: {"dense": {}, "sparse": {}})
    places: tuple[str, ...] = ()

    def add(self, index: int, answers: dict[str, tuple[Answer, float]]) -> None:
        """Add an image."""
        row: dict[str, Any] = {"name": self.data.path(index).name, "gflops": {}, "ms": {}}
        for name, (answer, elapsed) in answers.items():
            counted = {part: value.item() for part, value in self.models[name].count(answer).items()}
            for part, value in counted.items():
                self.parts[name][part] = self.parts[name].get(part, 0.0) + value
            row["gflops"][name], row["ms"][name] = sum(counted.values()), elapsed
        dense, sparse = answers["dense"][0], answers["sparse"][0]
        self.places = exits.places if (exits := exits_of(sparse)) else ()
        image, target = self.data[index]
        regions = self.task.regions(target, (image.shape[1], image.shape[2]))
        self.findings.add(index, regions, sparse, row["gflops"]["sparse"])
        row["keep"] = self.findings.images[-1]["keep"]
        row["differs"] = self.task.disagreement(sparse.results[0], dense.results[0], min_score=self.min_score)
        self.rows.append(row)


def model_sections(
    dense: Model,
    sparse: Model,
    data: ImageDataset,
    *,
    limit: int | None,
    pictures: int,
    min_score: float,
    console: Console,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The sections, and what `engine.evaluate.compare` returns.

    Args:
        pictures: so many of the easiest images, of the hardest, and of the worst disagreements.
        min_score: objects of at least this score are compared and drawn.
    """
    task, models = task_of(sparse.config), {"dense": dense, "sparse": sparse}
    seen = Seen(task, models, data, min_score, Findings(sparse.config.classes))
    metrics = {name: task.metric(data) for name in models}
    figures = compare(dense, sparse, data, limit=limit, metrics=metrics, seen=seen.add, console=console)
    draws = drawn(len(seen.rows), draws=PART_DRAWS)
    parts = {name: metric.parts(draws) for name, metric in metrics.items()}
    shown = Pair(task, models, data, min_score)
    groups = _groups(seen.rows, pictures)
    chosen = {index for indices in groups.values() for index in indices}
    drawings = {
        i: picture(shown, i, seen.rows[i], tokens=i not in groups[WORST])
        for i in terminal.track(sorted(chosen), "drawing", console=console)
    }
    return [
        section("Summary", [_summary(task, figures)]),
        section("Accuracy", _accuracy(task, figures, parts, seen.findings), text=_INTERVALS),
        section("Tokens", _tokens(figures, seen.findings, seen.places)),
        section("Cost and speed", _costs(seen, figures)),
        section("Images", _images(seen.rows, chosen)),
        *_galleries(task, groups, drawings),
    ], figures


_INTERVALS = "In parentheses intervals of 95 %, by a bootstrap over images; differences are paired, pruned minus dense."


def _summary(task: Task, figures: dict[str, Any]) -> Part:
    dense, sparse = figures["dense"], figures["sparse"]
    name = task.headline(sparse)
    limits = "{:+.1f} to {:+.1f}".format(*(100 * limit for limit in figures["differences"][name][1:])).replace("-", "−")
    low, high = figures["speedup_quartiles"]
    costs = [
        (
            label,
            f"{dense[key]:.{digits}f} → {sparse[key]:.{digits}f}",
            f"{100 * (sparse[key] / dense[key] - 1):+.0f} %".replace("-", "−"),
        )
        for label, key, digits in (("GFLOPs per image", "gflops", 1), ("ms per image", "ms_per_image", 0))
    ]
    label = task.config.figures[name]
    return tiles(
        [
            (f"{label}, dense → pruned", f"{100 * dense[name]:.1f} → {100 * sparse[name]:.1f}", f"difference {limits}"),
            *costs,
            ("speed-up", f"{figures['speedup']:.2f}", f"quartiles {low:.2f} to {high:.2f}"),
            ("tokens computed", f"{statistics.fmean(sparse['keep']):.0%}", "mean over blocks"),
            ("images", str(sparse["images"]), "one at a time, in alternating order"),
        ]
    )


def _accuracy(task: Task, figures: dict[str, Any], parts: dict[str, Any], findings: Findings) -> Iterator[Part | None]:
    """All of the data set, and by class and size, with intervals."""
    heads = [column("dense", **PERCENT), column("pruned", **PERCENT), column("difference", **PERCENT, sign=True)]
    pairs = [
        (task.config.figures[name], figures["dense"][name], figures["sparse"][name], figures["differences"].get(name))
        for name in task.config.figures
        if name in figures["sparse"] and isinstance(figures["sparse"][name], float)
    ]
    rows = [[label, a, b, apart or b - a] for label, a, b, apart in pairs if min(a, b) >= 0]
    yield table("Accuracy in %", [column("figure"), *heads], rows)
    measure = "IoU" if "miou" in figures["sparse"] else task.config.figures[task.headline(figures["sparse"])]
    sums = {"class": findings.by_class, "size": findings.by_size}
    for kind, values in parts["sparse"].items():
        rows = []
        for name, after in values.items():
            before = parts["dense"][kind][name]
            cells = [_interval(before), _interval(after), _interval(after - before)]
            if any(cell is not None for cell in cells):
                kept = sums.get(kind, {}).get(name)
                rows.append([name, *cells, statistics.fmean(kept.shares()["keep"]) if kept else None])
        heads_of = [column(kind), *heads, column("tokens in %", **PERCENT, note="computed, mean over blocks")]
        yield table(f"{measure} by {kind} in %", heads_of, rows)


def _interval(values: np.ndarray) -> list[float] | None:
    """[value, low, high] of one on all images and others on images that were drawn; None where there is none."""
    whole, spread = values[0], values[1:][~np.isnan(values[1:])]
    if np.isnan(whole) or not len(spread):
        return None
    return [round(float(x), 5) for x in (whole, *np.quantile(spread, (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)))]


def _tokens(figures: dict[str, Any], findings: Findings, places: tuple[str, ...]) -> Iterator[Part | None]:
    """By block, class and size of object; where tokens leave, what came back, and what makes an image dear."""
    content, sparse = findings.content(), figures["sparse"]
    points = [{"x": i, "y": 100 * share, "name": f"block {i}"} for i, share in enumerate(sparse["keep"])]
    bars = {"bars": True, "zero": True, "xdigits": 0}
    yield chart("Tokens computed by block", "block", [choice("% of the tokens", {"tokens": points})], **bars)
    yield table(
        "What makes an image dear",
        [column("pixels of, or number of", text=True), column("r", digits=2, sign=True)],
        content["correlation"].items(),
        text="Correlation of an image's GFLOPs with what it holds, with 95 % intervals.",
        wide=False,
    )
    rows = {**content["by_class"], **content["by_size"]}
    blocks = [column(str(block), scale=100, digits=0, heat=True) for block in range(len(sparse["keep"]))]
    cells = [[name, *row["keep"]] for name, row in rows.items()]
    yield table("Tokens computed by class, size of object and block, in %", [column("part"), *blocks], cells)
    heads = [column(place, scale=100, digits=0, heat=True) for place in places]
    early = len(places) - 1  # those that leave after the last block never do
    cells = [[name, *row["left_at"][:early], sum(row["left_at"][early:])] for name, row in rows.items() if places]
    yield table("Where tokens left, in %", [column("part"), *heads], cells)
    if "returned" in content:
        back = content["returned"]
        yield tiles(
            [
                ("of the tokens left out", f"{back['of_tokens_left_out']:.0%}", "came back in a later block"),
                ("of all returns", f"{back['in_the_next_block']:.0%}", "came after a single block"),
            ]
        )


def _costs(seen: Seen, figures: dict[str, Any]) -> Iterator[Part | None]:
    """GFLOPs by part, milliseconds, and each image as a point."""
    count = len(seen.rows)
    parts = [
        [name, seen.parts["dense"].get(name, 0.0) / count, seen.parts["sparse"].get(name, 0.0) / count]
        for name in dict.fromkeys([*seen.parts["dense"], *seen.parts["sparse"]])
    ]
    heads = [column("dense", digits=2), column("pruned", digits=2)]
    yield table("GFLOPs by part of the model", [column("part"), *heads], parts, wide=False)
    names = {"gflops": "GFLOPs, mean", "gflops_min": "GFLOPs, least", "gflops_max": "GFLOPs, most"}
    names |= {"ms_per_image": "ms, median", "ms_per_image_p95": "ms, 95 % are below"}
    rows = [[label, figures["dense"][key], figures["sparse"][key]] for key, label in names.items()]
    yield table("Cost of an image", [column("figure"), column("dense"), column("pruned")], rows, wide=False)

    def points(values: list[float | None]) -> dict[str, list[dict[str, Any]]]:
        pairs = enumerate(zip(seen.rows, values, strict=True))
        return {
            "images": [
                {"x": row["gflops"]["sparse"], "y": value, "name": row["name"], "row": i}
                for i, (row, value) in pairs
                if value is not None
            ]
        }

    choices = [
        choice("ms, pruned", points([row["ms"]["sparse"] for row in seen.rows]), digits=0),
        choice("speed-up", points([row["ms"]["dense"] / row["ms"]["sparse"] for row in seen.rows]), digits=2),
        choice("% that differs from dense", points([_percent(row["differs"]) for row in seen.rows])),
    ]
    text = "Each point is an image; selected, it is marked in the table of images below."
    yield chart("Images by cost", "GFLOPs, pruned", choices, table="images", wide=True, text=text)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _images(rows: list[dict[str, Any]], drawn_ones: set[int]) -> Iterator[Part | None]:
    """A row for each."""
    heads = [
        column("image"),
        column("GFLOPs, dense"),
        column("GFLOPs, pruned"),
        column("tokens in %", **PERCENT),
        column("ms, dense", digits=0),
        column("ms, pruned", digits=0),
        column("speed-up", digits=2),
        column("differs in %", **PERCENT, note="pixels of another class, or objects that one model alone has found"),
    ]
    cells = []
    for row in rows:
        (a, b), (before, after) = ((row[key]["dense"], row[key]["sparse"]) for key in ("gflops", "ms"))
        values = [a, b, row["keep"], before, after, before / after, row["differs"]]
        cells.append([row["name"], *(None if value is None else float(f"{value:.5g}") for value in values)])
    to = [f"picture-{i}" if i in drawn_ones else None for i in range(len(rows))]
    yield table("All images", heads, cells, name="images", to=to)


def _groups(rows: list[dict[str, Any]], count: int) -> dict[str, list[int]]:
    """The images with pictures, by what they are shown for; each once."""
    ranked = sorted(range(len(rows)), key=lambda i: rows[i]["gflops"]["sparse"])
    apart = sorted(range(len(rows)), key=lambda i: -(rows[i]["differs"] or -math.inf))
    worst = [i for i in apart if rows[i]["differs"]][:count]
    left = [i for i in ranked if i not in worst]
    easy = left[: min(count, -(-len(left) // 2))]
    hard = [i for i in left[::-1] if i not in easy][:count]
    return {WORST: worst, "Easiest images": easy, "Hardest images": hard}


_ABOUT = {
    WORST: "The images whose pruned results differ most from the dense ones.",
    "Easiest images": "Among the others, those that cost the pruned model least.",
    "Hardest images": "Those that cost it most.",
}


def _galleries(task: Task, groups: dict[str, list[int]], drawings: dict[int, Any]) -> Iterator[dict[str, Any]]:
    """A section for each group."""
    help_text = "The slider leaves in the picture what a block computed."
    for title, indices in groups.items():
        results = [result for i in indices for result in drawings[i].results]
        entries = [(name, colour) for name, colour in task.legend(results) if colour is not None] if results else []
        parts = [legend("Classes", entries), *(drawings[i].part for i in indices)]
        yield section(title, parts if indices else [], text=f"{_ABOUT[title]} {help_text}")
