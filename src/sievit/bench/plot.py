"""The picture of a bench: every row's speed-up beside the one that the multiply-adds promise."""

from io import BytesIO
from pathlib import Path
from typing import Any

from sievit.files import write_atomically

COLOURS = {"dense": "#8a8a8a", "dynamic": "#0b6e99", "bucketed": "#7d57b2", "static": "#4f8a34"}
"""By what stands first in the name of a mode."""
INK, GRID, PROMISED = "#333333", "#e2e2e2", "#d1495b"


def draw_rows(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """A bar for each row that was timed, its predicted speed-up as a mark on it; written as PNG.

    Args:
        rows: of a bench; those with `skipped` are left out. Whiskers are the quartiles of what was realised.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if "skipped" not in row]
    places, headings, y, before = [], [], 0.0, None
    for row in rows:
        group = (row["model"], row["tokens"], row["batch"], str(row["size"]))
        if group != before:
            y += 1.0 if before is None else 1.5
            headings.append((y - 0.85, group))
            before = group
        places.append(y)
        y += 1.0
    figure = Figure(figsize=(8.4, 1.6 + 0.27 * y), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    widest = max([1.0, *(max(row["speedup"], row["predicted"]) for row in rows)])
    for at, row in zip(places, rows, strict=True):
        colour = COLOURS[row["mode"].partition("_")[0]]
        axes.barh(at, row["speedup"], height=0.72, color=colour, zorder=2)
        ends = [min(q * row["predicted"], 1.1 * widest) for q in row["realised_quartiles"]]
        axes.plot(ends, [at, at], color=INK, linewidth=1.2, zorder=3)
        axes.plot([row["predicted"]] * 2, [at - 0.42, at + 0.42], color=PROMISED, linewidth=2.2, zorder=4)
        text = f"{row['speedup']:.2f}x, {row['realised']:.0%} of {row['predicted']:.2f}x"
        right = max(row["speedup"], row["predicted"], *ends) + 0.015 * widest
        axes.text(right, at, text, va="center", size=7.5, color=INK, in_layout=False)
    for at, (model, tokens, batch, _) in headings:
        axes.text(
            0.0,
            at,
            f"{model}, {tokens} tokens, batch {batch}",
            va="center",
            size=8.5,
            weight="bold",
            color=INK,
            in_layout=False,
        )
    axes.axvline(1.0, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=3)
    axes.set_yticks(places, [row["mode"] for row in rows], size=8)
    axes.set_xlim(0, 1.45 * widest)
    axes.set_ylim(y - 0.3, -0.4)
    axes.set_xlabel(f"speed-up over dense; red: what the multiply-adds promise{_where(rows)}", color=INK, size=8.5)
    axes.set_title(title, color=INK, size=10, loc="left")
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _where(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    return f" ({rows[0]['device']}, {rows[0]['precision']})"
