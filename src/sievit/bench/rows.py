"""The file of a bench: each row is in it as soon as it is measured, so that a run that was stopped can go on.

Beside it lies a picture: every row's speed-up, and the one that the multiply-adds promise.
"""

import json
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

from sievit.config import ConfigError
from sievit.files import write_atomically, write_json

KEY = ("model", "size", "batch", "device", "precision", "mode")
"""What tells the rows of a file apart."""
COLOURS = {"dense": "#8a8a8a", "dynamic": "#0b6e99", "bucketed": "#7d57b2", "static": "#4f8a34"}
"""By what stands first in the name of a mode."""
INK, GRID, PROMISED = "#333333", "#e2e2e2", "#d1495b"


class RowsFile:
    """The rows of a bench, and OUT/<bench>.json, which always holds all of them.

    Args:
        settings: what all rows are measured with; `options` among them are those of the command line.
        out: the folder; None: nothing is written.
        resume: begin with the rows that are in the file, but for those that could not be timed.

    Raises:
        ConfigError: rows to be kept that were measured with other settings, or a file that is none of a bench.
    """

    def __init__(self, bench: str, settings: dict[str, Any], out: Path | None, *, resume: bool) -> None:
        if resume and out is None:
            raise ConfigError("--resume keeps the rows of the file in --out; say which folder")
        self.bench, self.settings = bench, settings
        self.path = None if out is None else out / f"{bench}.json"
        self.rows = _measured(self.path, settings) if resume and self.path is not None and self.path.exists() else []
        self._write()

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether there is a row of the same model, size, batch, device, precision and mode."""
        return any(_key(row) == _key(other) for other in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Put a row behind those of its model, size and batch, and write the file."""
        self.rows.append(row)
        groups: dict[tuple, int] = {}
        self.rows.sort(key=lambda row: groups.setdefault(_key(row)[:-1], len(groups)))
        self._write()

    def content(self) -> dict[str, Any]:
        """What stands in the file."""
        return {"bench": self.bench, **self.settings, "rows": self.rows}

    def draw(self) -> None:
        """Put a picture of the rows beside the file."""
        if self.path is not None:
            draw_rows(self.rows, self.path.with_suffix(".png"), title=f"sievit bench {self.bench}")

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content())


def _key(row: dict[str, Any]) -> tuple:
    return tuple(str(row[name]) for name in KEY)


def _measured(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    way_out = "leave out --resume to start the file anew, or give another --out"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows, were = content["rows"], _flat(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not the file of a bench ({error}); {way_out}") from error
    for name, value in _flat(settings).items():
        if were.get(name, "unknown") != value:
            raise ConfigError(f"{path}: its rows have {name} {were.get(name, 'unknown')}, not {value}; {way_out}")
    return [row for row in rows if "skipped" not in row]


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Settings by name, options among the others."""
    return {**{name: value for name, value in content.items() if name != "options"}, **content.get("options", {})}


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
