"""The results of a plan: means over seeds, differences to the dense model with their intervals, table and plots."""

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from sievit.engine.bootstrap import interval
from sievit.files import write_atomically, write_json
from sievit.lab.plan import DENSE
from sievit.report.plot import draw_variants
from sievit.tasks import Task


class Results:
    """Figures of all variants and seeds that are there.

    Args:
        against: a variant that all others are compared with, besides the dense model; None for none.
    """

    def __init__(self, out: Path, task: Task, against: str | None = None) -> None:
        self.out, self.task, self.against = out, task, against
        self.files: dict[str, dict[int, dict[str, Any]]] = {}
        self.curves: dict[str, str] = {}
        self.times: dict[str, dict[str, float]] = {}

    def add(self, name: str, curve: str, seed: int, content: dict[str, Any]) -> None:
        self.files.setdefault(name, {})[seed] = content
        self.curves[name] = curve or name

    @property
    def measures(self) -> list[str]:
        """The figures that are compared."""
        first = next(iter(next(iter(self.files.values())).values()))
        return [name for name in self.task.shown if name in first["resampled"]]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each variant: accuracy as mean and spread over seeds, difference to the dense model with interval,
        cost, shares, times, and the share of the speed-up that the GFLOPs promise which is `realised` on the clock."""
        found = []
        for name, seeds in self.files.items():
            figures = [content["figures"] for content in seeds.values()]
            row: dict[str, Any] = {"variant": name, "curve": self.curves[name], "seeds": sorted(seeds)}
            for measure in self.measures:
                values = [f[measure] for f in figures]
                row[measure] = round(statistics.fmean(values), 5)
                row[f"{measure}_spread"] = round(statistics.stdev(values), 5) if len(values) > 1 else None
                row[f"{measure}_difference"] = self._difference(name, DENSE, measure)
                if self.against is not None:
                    row[f"{measure}_to_{self.against}"] = self._difference(name, self.against, measure)
            row["gflops"] = round(statistics.fmean(f["gflops"] for f in figures), 3)
            shares = zip(*(f["keep"] for f in figures), strict=True)
            row["keep"] = [round(statistics.fmean(column), 4) for column in shares]
            row |= self.times.get(name, {})
            found.append(row)
        dense = next((row["gflops"] for row in found if row["variant"] == DENSE), None)
        for row in found:
            if dense is not None and "speedup" in row:
                row["realised"] = round(row["speedup"] * row["gflops"] / dense, 3)
        return found

    def _difference(self, name: str, other: str, measure: str) -> list[float] | None:
        """Of one variant minus another, mean over the seeds that both have: value, low, high (paired bootstrap over
        images)."""
        both = sorted(self.files[name].keys() & self.files.get(other, {}).keys())
        if not both or name == other:
            return None
        apart = [
            np.array(self.files[name][seed]["resampled"][measure]) - self.files[other][seed]["resampled"][measure]
            for seed in both
        ]
        return interval(np.mean(apart, axis=0))

    def content(self) -> dict[str, Any]:
        """Everything, as in ablation.json."""
        return {"measures": self.measures if self.files else [], "variants": self.rows() if self.files else []}


def written(results: Results, *, device: str) -> None:
    """ablation.json, ablation.csv and ablation.png in the folder."""
    if not results.files:
        return
    rows, measures = results.rows(), results.measures
    write_json(results.out / "ablation.json", results.content())
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    scores = [f"{m}{suffix}" for m in measures for suffix in ("", "_spread", "_difference", "_low", "_high")]
    writer.writerow(["variant", "curve", "seeds", *scores, "gflops", "keep", "ms", "speedup", "realised"])
    for row in rows:
        values = []
        for m in measures:
            difference = row[f"{m}_difference"] or [None] * 3
            values += [row[m], row[f"{m}_spread"], *difference]
        kept = round(statistics.fmean(row["keep"]), 4)
        line = [row["variant"], row["curve"], len(row["seeds"]), *values, row["gflops"], kept]
        writer.writerow([*line, row.get("ms"), row.get("speedup"), row.get("realised")])
    write_atomically(results.out / "ablation.csv", buffer.getvalue().encode())
    label = results.task.config.figures[measures[0]]
    draw_variants(rows, results.out / "ablation.png", measure=measures[0], label=label, device=device)


def printed(results: Results) -> Table:
    """The figure that models are compared by, for people; ablation.csv has all."""
    table = Table(title=f"{results.out}", title_justify="left", box=SIMPLE)
    measure = results.measures[0] if results.files else results.task.shown[0]
    table.add_column("variant", no_wrap=True)
    compared = {"to dense": f"{measure}_difference"}
    if results.against is not None:
        compared[f"to {results.against}"] = f"{measure}_to_{results.against}"
    for column in (results.task.config.figures[measure], *compared, "GFLOPs", "keep", "ms", "speed-up", "realised"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results.rows() if results.files else []:
        spread, differences = row[f"{measure}_spread"], [row[name] for name in compared.values()]
        table.add_row(
            row["variant"],
            f"{100 * row[measure]:.1f}" + (f" ±{100 * spread:.1f}" if spread is not None else ""),
            *("" if d is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in d)) for d in differences),
            f"{row['gflops']:.1f}",
            f"{statistics.fmean(row['keep']):.0%}",
            f"{row['ms']:.0f}" if "ms" in row else "",
            f"{row['speedup']:.2f}" if "speedup" in row else "",
            f"{row['realised']:.2f}" if "realised" in row else "",
        )
    return table
