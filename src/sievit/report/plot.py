"""Diagrams: accuracy against cost and time, tokens by class, and the course of a training."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from sievit.files import write_atomically

Table = Mapping[str, list[float]]
"""Columns by name."""
COLOURS = ("#0b6e99", "#d1495b", "#4f8a34", "#7d57b2", "#b97a10")
MARKERS = ("o", "s", "^", "D", "v")
INK, GRID = "#333333", "#e2e2e2"
TEXT = 8
"""Size in points of the values."""
BESIDE = ((0, 9), (0, -9), (1, 7), (-1, 7), (1, -7), (-1, -7), (1, 0), (-1, 0), (0, 15), (0, -15))
"""Where a value may stand: to the left or the right of its point, and points above it."""


def draw_curves(points: list[dict[str, Any]], path: Path, *, measure: str, label: str, device: str) -> None:
    """Two panels, accuracy against GFLOPs and against milliseconds, a curve for each model; written as PNG.

    Args:
        points: `model`, `value`, `gflops`, `ms_per_image` and the accuracy (0..1) each; value None is the dense model.
        measure, label: what the accuracy is called in the points, and in the picture.
    """
    figure = _figure(9.6, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    models = list(dict.fromkeys(point["model"] for point in points))
    for axes, key, of_axis in (
        (panels[0], "gflops", "GFLOPs per image (mean)"),
        (panels[1], "ms_per_image", f"milliseconds per image (median; {device})"),
    ):
        _draw(axes, points, models, key, measure)
        _style(axes, of_axis)
    panels[0].set_ylabel(f"{label} in %", color=INK)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, labelcolor=INK)
    figure.draw_without_rendering()  # from here on places on the axes have places in the picture
    for axes, key in zip(panels, ("gflops", "ms_per_image"), strict=True):
        _name_points(axes, points, models, key, measure)
    _write(figure, path)


def draw_variants(rows: list[dict[str, Any]], path: Path, *, measure: str, label: str, device: str) -> None:
    """Two panels, accuracy against GFLOPs and, where they were measured, against milliseconds: a point for each variant
    with the interval of its difference to the dense model, and a line for each curve of several, named at its end.

    Args:
        rows: of `lab.table`.
        measure, label: what the accuracy is called in the rows, and in the picture.
    """
    keys = [("gflops", "GFLOPs per image (mean)")]
    if all("ms" in row for row in rows):
        keys.append(("ms", f"milliseconds per image (median; {device})"))
    figure = _figure(5.6 * len(keys), 5.2)
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    dearest = {row["curve"]: row for row in sorted(rows, key=lambda row: row["gflops"])}
    names = [{**row, "model": curve, "value": curve} for curve, row in dearest.items()]
    for axes, (key, of_axis) in zip(panels, keys, strict=True):
        for i, curve in enumerate(curves):
            colour, points = COLOURS[i % len(COLOURS)], [row for row in rows if row["curve"] == curve]
            points.sort(key=lambda row: row[key])
            x, y = [p[key] for p in points], [100 * p[measure] for p in points]
            axes.plot(x, y, marker=MARKERS[i // len(COLOURS) % len(MARKERS)], color=colour, markersize=4.5, zorder=3)
            for point, px, py in zip(points, x, y, strict=True):
                if (apart := point[f"{measure}_difference"]) is not None:
                    low, high = (py + 100 * (end - apart[0]) for end in apart[1:])
                    axes.plot([px, px], [low, high], color=colour, linewidth=0.8, alpha=0.5, zorder=2)
        for row in rows:
            if row[f"{measure}_difference"] is None:
                axes.axhline(100 * row[measure], linestyle=(0, (2, 3)), linewidth=0.9, color=INK, zorder=1)
        _style(axes, of_axis)
    panels[0].set_ylabel(f"{label} in %", color=INK)
    figure.draw_without_rendering()
    for axes, (key, _) in zip(panels, keys, strict=True):
        _name_points(axes, names, curves, key, measure)
    _write(figure, path)


def draw_corruptions(rows: list[dict[str, Any]], path: Path, *, measure: str, label: str) -> None:
    """A line for each corruption: accuracy, and GFLOPs, of each curve at each severity, the strongest one filled.

    Args:
        rows: of `lab.table`, those with a `corruption`, which is a name and a severity.
        measure, label: what the accuracy is called in the rows, and in the picture.
    """
    kinds = list(dict.fromkeys(row["corruption"][0] for row in rows))
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    severities = sorted({row["corruption"][1] for row in rows})
    figure = _figure(10.0, 1.6 + 0.3 * len(kinds))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, scale, of_axis in (
        (panels[0], measure, 100, f"{label} in %"),
        (panels[1], "gflops", 1, "GFLOPs per image (mean)"),
    ):
        for i, curve in enumerate(curves):
            for severity in severities:
                points = [row for row in rows if row["curve"] == curve and row["corruption"][1] == severity]
                axes.plot(
                    [scale * row[key] for row in points],
                    [kinds.index(row["corruption"][0]) + 0.2 * (i - (len(curves) - 1) / 2) for row in points],
                    linestyle="none",
                    marker=MARKERS[i % len(MARKERS)],
                    markersize=5,
                    color=COLOURS[i % len(COLOURS)],
                    markerfacecolor=COLOURS[i % len(COLOURS)] if severity == severities[-1] else "w",
                    label=f"{curve}, severity {severity}",
                )
        _style(axes, of_axis)
        axes.margins(y=0.03)
    panels[0].set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    panels[0].invert_yaxis()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(curves), frameon=False, labelcolor=INK)
    _write(figure, path)


def draw_shares(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A row for each part of the images, a cell for each block: the share of its tokens that was computed, `keep`."""
    names, shares = list(rows), np.array([row["keep"] for row in rows.values()])
    figure = _figure(1.6 + 0.62 * shares.shape[1], 1.2 + 0.34 * len(names))
    axes = figure.subplots()
    axes.imshow(shares, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for (y, x), share in np.ndenumerate(shares):
        axes.text(
            x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=TEXT, color="w" if share > 0.55 else INK
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(shares.shape[1]))
    axes.set_xlabel("block", color=INK)
    axes.set_title("tokens computed, in %", color=INK, fontsize=TEXT + 2)
    axes.tick_params(colors=INK, length=0)
    axes.spines[:].set_visible(False)
    _write(figure, path)


def draw_runs(runs: Mapping[str, tuple[Table, Table]], path: Path, *, measure: str, label: str) -> None:
    """The course of trainings: loss, tokens that are computed, and accuracy on the validation set, by step.

    Args:
        runs: by name the columns of the log and of the validations.
        measure, label: what the accuracy is called there, and in the picture.
    """
    figure = _figure(12.0, 3.6)
    titles = ["loss", "tokens computed, in %", f"{label} in %"]
    if not any(measure in validations for _, validations in runs.values()):
        del titles[2]
    panels = figure.subplots(1, len(titles))
    for i, (name, (log, validations)) in enumerate(runs.items()):
        look = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.4, "label": name}
        kept = [column for key, column in log.items() if key.startswith("keep_")]
        panels[0].plot(log["step"], log["loss"], **look)
        panels[1].plot(log["step"], [100 * sum(shares) / len(shares) for shares in zip(*kept, strict=True)], **look)
        if measure in validations:
            panels[2].plot(validations["step"], [100 * x for x in validations[measure]], marker="o", **look)
    for axes, title in zip(panels, titles, strict=True):
        _style(axes, "step")
        axes.set_title(title, color=INK, fontsize=TEXT + 2)
    panels[1].set_ylim(-4, 104)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False, labelcolor=INK)
    _write(figure, path)


def _figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Any, path: Path) -> None:
    """As PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def _draw(axes: Any, points: list[dict[str, Any]], models: list[str], key: str, measure: str) -> None:
    """The curves, and a star for each dense model; it computes no auxiliary heads and is no point of the curve."""
    for i, model in enumerate(models):
        look = {"color": COLOURS[i % len(COLOURS)], "zorder": 3}
        dense = [p for p in points if p["model"] == model and p["value"] is None]
        pruned = [p for p in points if p["model"] == model and p["value"] is not None]
        x, y = [p[key] for p in pruned], [100 * p[measure] for p in pruned]
        axes.plot(x, y, marker=MARKERS[i % len(MARKERS)], markersize=4.5, linewidth=1.4, label=model, **look)
        for p in dense:
            star = {"marker": "*", "markersize": 12, "linestyle": "none", "label": f"{model}, dense"}
            axes.plot([p[key]], [100 * p[measure]], **star, **look)
            axes.axhline(100 * p[measure], linestyle=(0, (2, 3)), linewidth=0.9, **{**look, "zorder": 1})


def _style(axes: Any, label: str) -> None:
    axes.set_xlabel(label, color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.09, y=0.14)
    axes.tick_params(colors=INK, length=0, labelleft=True)
    axes.ticklabel_format(useOffset=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def _name_points(axes: Any, points: list[dict[str, Any]], models: list[str], key: str, measure: str) -> None:
    """Each point's value beside it, within the axes, where it covers the least of curves, points and other values."""
    scale, steps = axes.figure.dpi / 72, np.linspace(0, 1, 61)[1:-1, None, None]
    occupied = np.empty((0, 2))
    for line in axes.get_lines():
        places = line.get_transform().transform(line.get_xydata())
        between = places[:-1] + steps * np.diff(places, axis=0)
        occupied = np.concatenate([occupied, places, between.reshape(-1, 2)])
    for point in points:
        if point["value"] is None:
            continue
        text = point["value"] if isinstance(point["value"], str) else f"{point['value']:g}"
        x, y = axes.transData.transform((point[key], 100 * point[measure]))
        size = scale * TEXT * np.array([0.62 * len(text), 1.0])
        centres = [np.array([x + dx * (size[0] / 2 + 5 * scale), y + dy * scale]) for dx, dy in BESIDE]
        covered = [(abs(occupied - centre) < size / 2 + 2).all(1).sum() for centre in centres]
        beyond = [max(0, axes.bbox.x0 - c[0] + size[0] / 2, c[0] + size[0] / 2 - axes.bbox.x1) for c in centres]
        cx, cy = centres[int(np.argmin(np.add(covered, beyond)))]
        corners = [(cx + size[0] * u / 8, cy + size[1] * v / 4) for u in range(-4, 5) for v in (-2, 0, 2)]
        occupied = np.concatenate([occupied, corners, corners])
        at = ((cx - x) / scale, (cy - y) / scale)
        colour = COLOURS[models.index(point["model"]) % len(COLOURS)]
        axes.annotate(
            text,
            (point[key], 100 * point[measure]),
            xytext=at,
            textcoords="offset points",
            fontsize=TEXT,
            color=colour,
            ha="center",
            va="center",
        )
