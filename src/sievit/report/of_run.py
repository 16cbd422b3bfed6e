"""The sections of a report on a training, and on the trainings of a comparison."""

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from sievit.engine.checkpoint import RunFolder
from sievit.report.curve import columns
from sievit.report.page import PERCENT, Part, chart, choice, column, section, table, tiles
from sievit.report.plot import Table
from sievit.tasks import Task, task_of
from sievit.text import read_json

POINTS = 300
"""At most so many of a curve are drawn."""
APART = ("step", "epoch", "images_per_s", "s_per_step")
"""Columns of the log that are no loss."""


def run_sections(run: RunFolder) -> list[dict[str, Any]]:
    """The figures so far, curves, every validation, and all options."""
    recipe = run.recipe()
    task, tables = task_of(recipe.model), {run.path.resolve().name: (columns(run.log_file), columns(run.val_file))}
    figures = run.metrics() if run.metrics_file.exists() else {}
    ((log, validations),) = tables.values()
    steps = f"{max(log.get('step', [0])):.0f} steps"
    parts = [tiles([*_headlines(task, figures), ("trained", steps, _speed(log))])]
    options = table(
        "All options",
        [column("option"), column("value", text=True)],
        [[name, value] for name, value in _options(read_json(run.recipe_file))],
        text="Everything that the training depends on, as in its recipe.json; of files the name alone.",
    )
    return [
        section("Training", [*parts, *curves(tables, task)]),
        section("Validations", [*_validations(task, validations), _classes(task, figures)]),
        section("Options", [options]),
    ]


def curves(tables: Mapping[str, tuple[Table, Table]], task: Task) -> list[Part | None]:
    """Charts by step: losses and rates, tokens that are computed, accuracy; of each training a line.

    Args:
        tables: by name the columns of the log and of the validations.
    """
    logs, validations = ({name: pair[i] for name, pair in tables.items()} for i in (0, 1))
    names = dict.fromkeys(name for log in logs.values() for name in log)
    losses = ["loss", *(n for n in names if n not in (*APART, "loss") and not n.startswith("keep_"))]
    kept = {
        name: [statistics.fmean(row) for row in zip(*(v for k, v in log.items() if k.startswith("keep_")), strict=True)]
        for name, log in logs.items()
    }
    shares = {name: {"step": log["step"], "kept": kept[name]} for name, log in logs.items() if kept[name]}
    measures = dict.fromkeys(name for val in validations.values() for name in val if name in task.config.figures)
    several = {name: val for name, val in validations.items() if len(val.get("step", ())) > 1}
    scores = [_line(several, name, f"{task.config.figures[name]} in %", scale=100) for name in measures]
    common = {"xdigits": 0, "small": True}
    return [
        chart("Losses and rates", "step", [_line(logs, n, n, digits=4) for n in losses if n in names], **common),
        chart("Tokens computed", "step", [_line(shares, "kept", "% of the tokens", scale=100)], zero=True, **common),
        chart("Accuracy in validation", "step", scores, **common),
    ]


def _line(tables: Mapping[str, Table], key: str, label: str, *, scale: float = 1, digits: int = 1) -> Part | None:
    """A column by step, a line for each table that has it whole."""
    series = {}
    for name, values in tables.items():
        if len(values.get(key, ())) == len(values.get("step", ())):
            pairs = list(zip(values.get("step", ()), values.get(key, ()), strict=True))
            thin = pairs[:: -(-len(pairs) // POINTS) or 1]
            series[name] = [{"x": step, "y": scale * value} for step, value in thin]
    return choice(label, series, line=True, digits=digits)


def _headlines(task: Task, figures: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The best model so far, on the validation set."""
    if not figures:
        return
    note = f"step {figures['step']}, {figures['images']} images"
    for name in [n for n in task.shown if n in figures][:2]:
        yield task.config.figures[name], f"{100 * figures[name]:.1f}", note
    yield "GFLOPs per image", f"{figures['gflops']:.1f}", f"{figures['gflops_min']:.1f} to {figures['gflops_max']:.1f}"
    yield "tokens computed", f"{statistics.fmean(figures['keep']):.0%}", ""


def _speed(log: Table) -> str:
    rates = log.get("images_per_s", [])
    return f"{statistics.median(rates):.2g} images per second" if rates else ""


def _validations(task: Task, values: Table) -> list[Part | None]:
    """A table of all of them."""
    known = [name for name in values if name in task.config.figures]
    heads = [column(task.config.figures[name], **PERCENT) for name in known]
    names = ("epoch", *known, "gflops", "ms_per_image")
    rows = [[values[name][i] if name in values else -1 for name in names] for i in range(len(values.get("step", ())))]
    steps = [f"step {step:.0f}" for step in values.get("step", ())]
    cells = [[step, *(None if x == -1 else x for x in row)] for step, row in zip(steps, rows, strict=True)]
    after = [column("GFLOPs"), column("ms per image", digits=0)]
    return [table("Every validation", [column("step"), column("epoch", digits=0), *heads, *after], cells)]


def _classes(task: Task, figures: dict[str, Any]) -> Part | None:
    """The accuracy of each class, where the figures have it."""
    rows = zip(task.config.classes, figures.get("iou", ()), strict=False)
    cells = [[name, None if value < 0 else value] for name, value in rows]
    return table("The best model by class", [column("class"), column("IoU in %", **PERCENT)], cells, wide=False)


def _options(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every option by its whole name; of paths the last part, as a report may be handed on."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _options(inner, f"{prefix}.{key}" if prefix else key)
        return
    text = value if isinstance(value, str) else json.dumps(value)
    if PurePath(text).is_absolute():
        text = f"…/{PurePath(text).name}"
    yield prefix, text if len(text) <= 200 else text[:199] + "…"
