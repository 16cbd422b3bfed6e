"""The picture of a bench: every row's speed-up beside the one that the multiply-adds promise."""

from io import BytesIO
from itertools import groupby
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
    widest = max([1.0, *(max(row["speedup"], row["predicted"]) for row in rows)])
    figure = Figure(dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes, places, top = figure.subplots(), [], 0
    for (model, tokens, batch, _), group in groupby(rows, lambda r: (r["model"], r["tokens"], r["batch"], r["size"])):
        heading = f"{model}, {tokens} tokens, batch {batch}"
        axes.text(0.0, top, heading, va="center", size=8.5, weight="bold", color=INK, in_layout=False)
        for y, row in enumerate(group, start=top + 1):
            speedup, predicted = row["speedup"], row["predicted"]
            axes.barh(y, speedup, height=0.72, color=COLOURS[row["mode"].partition("_")[0]], zorder=2)
            ends = [min(quartile * predicted, 1.1 * widest) for quartile in row["realised_quartiles"]]
            axes.plot(ends, [y, y], color=INK, linewidth=1.2, zorder=3)
            axes.plot([predicted] * 2, [y - 0.42, y + 0.42], color=PROMISED, linewidth=2.2, zorder=4)
            right = max(speedup, predicted, *ends) + 0.015 * widest
            text = f"{speedup:.2f}x, {row['realised']:.0%} of {predicted:.2f}x"
            axes.text(right, y, text, va="center", size=7.5, color=INK, in_layout=False)
            places.append(y)
        top = places[-1] + 1
    where = f" ({rows[0]['device']}, {rows[0]['precision']})" if rows else ""
    figure.set_size_inches(8.4, 1.6 + 0.27 * top)
    axes.axvline(1.0, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=3)
    axes.set_yticks(places, [row["mode"] for row in rows], size=8)
    axes.set(xlim=(0, 1.45 * widest), ylim=(top - 0.3, -0.6), axisbelow=True)
    axes.set_xlabel(f"speed-up over dense; red: what the multiply-adds promise{where}", color=INK, size=8.5)
    axes.set_title(title, color=INK, size=10, loc="left")
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
