"""The picture of a sweep: accuracy against cost, and against time."""

from io import BytesIO
from pathlib import Path
from typing import Any

from sievit.files import write_atomically

COLOURS = ("#0b6e99", "#d1495b", "#5a8f3c", "#8a5fbf", "#c98b1b")
MARKERS = ("o", "s", "^", "D", "v")
INK, GRID = "#333333", "#dddddd"


def draw_curves(points: list[dict[str, Any]], path: Path, *, device: str) -> None:
    """Two panels, mIoU against GFLOPs and against milliseconds, a curve for each model; written as PNG.

    Args:
        points: `model`, `threshold`, `miou` (0..1), `gflops` and `ms_per_image` each; threshold 1 is the dense model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    _panel(panels[0], points, "gflops", "GFLOPs per image, mean")
    _panel(panels[1], points, "ms_per_image", f"ms per image, median ({device})")
    panels[0].set_ylabel("mIoU in %")
    models = list(dict.fromkeys(point["model"] for point in points))
    if len(models) > 1:
        panels[0].legend(frameon=False, loc="lower right", labelcolor=INK)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def _panel(axes: Any, points: list[dict[str, Any]], key: str, label: str) -> None:
    """One panel: the curves, each point with its threshold."""
    models = list(dict.fromkeys(point["model"] for point in points))
    for i, model in enumerate(models):
        own = sorted((p for p in points if p["model"] == model), key=lambda point: -point["threshold"])
        x, y = [point[key] for point in own], [100 * point["miou"] for point in own]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.5, label=model, zorder=3)
        for point, px, py in zip(own, x, y, strict=True):
            dense = point["threshold"] >= 1
            if dense:
                axes.plot([px], [py], marker="*", markersize=13, color=colour, zorder=4)
            text = "dense" if dense else f"{point['threshold']:g}"
            place = (0, 9) if i % 2 == 0 else (0, -14)
            axes.annotate(
                text, (px, py), xytext=place, textcoords="offset points", fontsize=8, color=colour, ha="center"
            )
    axes.set_xlabel(label, color=INK)
    axes.grid(color=GRID, linewidth=0.6, zorder=0)
    axes.margins(x=0.08, y=0.18)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
