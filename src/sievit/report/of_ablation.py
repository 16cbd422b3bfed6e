"""The sections of a report on a comparison of methods, from the folder that `sievit ablate` writes."""

import statistics
from itertools import chain
from pathlib import Path
from typing import Any

from sievit.config import ConfigError
from sievit.engine.checkpoint import RunFolder, reading
from sievit.report.curve import columns
from sievit.report.of_run import curves
from sievit.report.page import PERCENT, Part, chart, choice, column, section, table, tiles
from sievit.tasks import task_of
from sievit.text import read_json

ABLATION = "ablation.json"
Row = dict[str, Any]


def ablation_sections(folder: Path) -> list[dict[str, Any]]:
    """Accuracy against cost and time, the table of all variants, classes, tokens, and the trainings' curves.

    Raises:
        ConfigError: the table is damaged.
    """
    path = folder / ABLATION
    runs = [RunFolder(file.parent) for file in sorted(folder.glob("trainings/*/recipe.json"))]
    task = task_of(runs[0].recipe().model) if runs else None
    with reading(path):
        content = read_json(path)
        rows, labels = content["variants"], {name: name for name in content["measures"]}
        if not rows:
            raise ConfigError(f"{path}: has no variant yet; run sievit ablate until one is done")
        if task is not None:
            labels |= {name: task.config.figures[name] for name in labels if name in task.config.figures}
        classes = () if task is None else task.config.classes
        parts = [_summary(rows, labels), *_fronts(rows, labels), _variants(rows, labels)]
        corrupted = _severities(content.get("severities", []), labels)
        per_class, blocks = _by_class(folder, rows, classes), _by_block(rows)
    drawn = []
    if task is not None:
        tables = {run.path.name: (columns(run.log_file), columns(run.val_file)) for run in runs}
        drawn = curves({name: pair for name, pair in tables.items() if pair[0].get("step")}, task)
    text = (
        "Select a point or a name: it is marked in all charts and in the table. Vertical lines: 95 % intervals of the "
        "difference to the dense model."
    )
    return [
        section("Variants", parts, text=text),
        section("Corrupted images", [corrupted]),
        section("Classes and blocks", [per_class, blocks]),
        section("Trainings", drawn),
    ]


def _summary(rows: list[Row], labels: dict[str, str]) -> Part:
    """The cheapest variant that loses nothing that the interval could show, beside the dense model."""
    measure, label = next(iter(labels.items()))
    dense = next((row for row in rows if row[f"{measure}_difference"] is None), None)
    equal = [
        row for row in rows if "corruption" not in row and (apart := row[f"{measure}_difference"]) and apart[2] >= 0
    ]
    items = [("variants", str(len(rows)), f"seeds of each: {max(len(row['seeds']) for row in rows)}" if rows else "")]
    if dense is not None:
        items.append((f"dense, {label}", f"{100 * dense[measure]:.1f}", f"{dense['gflops']:.1f} GFLOPs"))
    if equal:
        best = min(equal, key=lambda row: row["gflops"])
        note = f"{label} {100 * best[measure]:.1f}, {best['gflops']:.1f} GFLOPs; its interval reaches 0"
        items.append(("cheapest without a proven loss", best["variant"], note))
    return tiles(items)


def _fronts(rows: list[Row], labels: dict[str, str]) -> list[Part | None]:
    """Accuracy against GFLOPs, and against milliseconds where all were timed."""
    keys = [("gflops", "GFLOPs per image")]
    if all("ms" in row or "corruption" in row for row in rows):
        keys.append(("ms", "ms per image"))
    return [
        chart(
            f"Accuracy against {x.split()[0]}",
            x,
            [_choice(rows, key, measure, label) for measure, label in labels.items()],
            table="variants",
            front=True,
            wide=len(keys) == 1,
        )
        for key, x in keys
    ]


def _choice(rows: list[Row], key: str, measure: str, label: str) -> Part | None:
    """A series for each curve, sorted by cost."""
    series: dict[str, list[dict[str, Any]]] = {}
    for index, row in enumerate(rows):
        if "corruption" in row:
            continue
        point = {"x": row[key], "y": 100 * row[measure], "name": row["variant"], "row": index, "label": True}
        if (apart := row[f"{measure}_difference"]) is not None:
            low, high = (100 * (row[measure] - apart[0] + end) for end in apart[1:])
            point |= {"low": low, "high": high}
        series.setdefault(row["curve"], []).append(point)
    return choice(
        f"{label} in %", {name: sorted(points, key=lambda p: p["x"]) for name, points in series.items()}, line=True
    )


def _variants(rows: list[Row], labels: dict[str, str]) -> Part | None:
    """Every variant and figure."""
    timed = [column("ms", digits=0), column("speed-up", digits=2), column("realised", digits=2)]
    costs = [column("GFLOPs"), column("tokens in %", **PERCENT, note="computed, mean over blocks"), *timed]
    note = "difference to the dense model, with its 95 % interval"
    scores = [
        [
            column(f"{label} in %", **PERCENT),
            column("to dense", **PERCENT, sign=True, note=note),
            column("spread", **PERCENT, note="standard deviation over seeds"),
        ]
        for label in labels.values()
    ]
    ends = [column("seeds", digits=0), column("curve", text=True)]
    heads = [column("variant"), *scores[0], *costs, *chain(*scores[1:]), *ends]
    cells = []
    for row in rows:
        values = [[row.get(f"{name}{end}") for end in ("", "_difference", "_spread")] for name in labels]
        spent = [row["gflops"], statistics.fmean(row["keep"]), *map(row.get, ("ms", "speedup", "realised"))]
        cells.append([row["variant"], *values[0], *spent, *chain(*values[1:]), len(row["seeds"]), row["curve"]])
    return table("All variants", heads, cells, name="variants")


def _severities(rows: list[Row], labels: dict[str, str]) -> Part | None:
    """Means over the corruptions, for each model and severity."""
    note = "difference to the dense model on the same images; of that one to itself on clean images"
    scores = [
        [column(f"{label} in %", **PERCENT), column("to dense", **PERCENT, sign=True, note=note)]
        for label in labels.values()
    ]
    heads = [column("variant"), column("severity", digits=0), column("corruptions", digits=0), column("GFLOPs")]
    cells = []
    for row in rows:
        values = [row.get(f"{name}{end}") for name in labels for end in ("", "_difference")]
        cells.append([row["curve"], row["severity"], row["corruptions"], row["gflops"], *values])
    return table("Means over corruptions", [*heads, *chain(*scores)], cells)


def _by_class(folder: Path, rows: list[Row], classes: tuple[str, ...]) -> Part | None:
    """IoU of each class, mean over seeds, where the variants' files have it."""
    cells = []
    for row in rows:
        paths = [folder / "figures" / f"{row['variant']}-{seed}.json" for seed in row["seeds"]]
        found = [read_json(path)["figures"].get("iou") for path in paths if path.is_file()]
        columns_of = list(zip(*(values for values in found if values), strict=True))
        if len(columns_of) == len(classes) > 0:
            means = [statistics.fmean(values) for values in columns_of]
            cells.append([row["variant"], *(None if mean < 0 else mean for mean in means)])
    heads = [column("variant"), *(column(name, **PERCENT, heat=True) for name in classes)]
    return table("IoU by class in %", heads, cells)


def _by_block(rows: list[Row]) -> Part | None:
    """Tokens of each block."""
    depth = max((len(row["keep"]) for row in rows), default=0)
    heads = [column("variant"), *(column(str(block), scale=100, digits=0, heat=True) for block in range(depth))]
    cells = [[row["variant"], *row["keep"], *[None] * (depth - len(row["keep"]))] for row in rows]
    return table("Tokens computed by block in %", heads, cells)
