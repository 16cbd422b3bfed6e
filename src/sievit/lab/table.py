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
from sievit.report.plot import draw_corruptions, draw_variants
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
        self.corruptions: dict[str, list[Any]] = {}
        self.times: dict[str, dict[str, float]] = {}

    def add(self, name: str, curve: str, seed: int, content: dict[str, Any]) -> None:
        self.files.setdefault(name, {})[seed] = content
        self.curves[name] = curve or name
        if (corruption := content["settings"]["corruption"]) is not None:
            self.corruptions[name] = corruption

    @property
    def measures(self) -> list[str]:
        """The figures that are compared."""
        first = next(iter(next(iter(self.files.values())).values()))
        return [name for name in self.task.shown if name in first["resampled"]]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each variant: accuracy as mean and spread over seeds, difference to the dense model with interval
        (on corrupted images to the dense model on the same ones), cost, shares, times, and the share of the speed-up
        that the GFLOPs promise which is `realised` on the clock."""
        found = []
        for name, seeds in self.files.items():
            figures = [content["figures"] for content in seeds.values()]
            row: dict[str, Any] = {"variant": name, "curve": self.curves[name], "seeds": sorted(seeds)}
            for measure in self.measures:
                values = [f[measure] for f in figures]
                row[measure] = round(statistics.fmean(values), 5)
                row[f"{measure}_spread"] = round(statistics.stdev(values), 5) if len(values) > 1 else None
                row[f"{measure}_difference"] = self._difference([(name, self._control(name))], measure)
                if self.against is not None:
                    row[f"{measure}_to_{self.against}"] = self._difference([(name, self.against)], measure)
            row["gflops"] = round(statistics.fmean(f["gflops"] for f in figures), 3)
            shares = zip(*(f["keep"] for f in figures), strict=True)
            row["keep"] = [round(statistics.fmean(column), 4) for column in shares]
            row |= self.times.get(name, {})
            if name in self.corruptions:
                row["corruption"] = self.corruptions[name]
            found.append(row)
        dense = next((row["gflops"] for row in found if row["variant"] == DENSE), None)
        for row in found:
            if dense is not None and "speedup" in row:
                row["realised"] = round(row["speedup"] * row["gflops"] / dense, 3)
        return found

    def severities(self) -> list[dict[str, Any]]:
        """A row for each curve and severity of corrupted images: means over the corruptions, and the difference to the
        dense model on the same images; of that one to itself on clean images."""
        rows, found = self.rows(), []
        groups = sorted({(severity, self.curves[name]) for name, (_, severity) in self.corruptions.items()})
        for severity, curve in groups:
            names = [n for n, (_, s) in self.corruptions.items() if (s, self.curves[n]) == (severity, curve)]
            of_these = [row for row in rows if row["variant"] in names]
            row: dict[str, Any] = {"curve": curve, "severity": severity, "corruptions": len(names)}
            for measure in self.measures:
                row[measure] = round(statistics.fmean(each[measure] for each in of_these), 5)
                pairs = [(name, self._control(name)) for name in names]
                row[f"{measure}_difference"] = self._difference(pairs, measure)
            row["gflops"] = round(statistics.fmean(each["gflops"] for each in of_these), 3)
            found.append(row)
        return found

    def _control(self, name: str) -> str:
        """The dense model, on the same images where they are corrupted."""
        for other, corruption in self.corruptions.items():
            if corruption == self.corruptions.get(name) and self.curves[other] == DENSE != self.curves[name]:
                return other
        return DENSE

    def _difference(self, pairs: list[tuple[str, str]], measure: str) -> list[float] | None:
        """Of the first of each pair minus the second, mean over pairs and over the seeds that both have: value, low,
        high (paired bootstrap over images)."""
        apart = [
            np.array(self.files[name][seed]["resampled"][measure]) - self.files[other][seed]["resampled"][measure]
            for name, other in pairs
            if name != other
            for seed in sorted(self.files[name].keys() & self.files.get(other, {}).keys())
        ]
        return interval(np.mean(apart, axis=0)) if apart else None

    def content(self) -> dict[str, Any]:
        """Everything, as in ablation.json."""
        found = {"measures": self.measures if self.files else [], "variants": self.rows() if self.files else []}
        return found | ({"severities": self.severities()} if self.corruptions else {})


def written(results: Results, *, device: str) -> None:
    """ablation.json, ablation.csv, ablation.png and, of corrupted images, corruptions.png in the folder."""
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
    look = {"measure": measures[0], "label": label}
    if clean := [row for row in rows if "corruption" not in row]:
        draw_variants(clean, results.out / "ablation.png", device=device, **look)
    if corrupted := [row for row in rows if "corruption" in row]:
        draw_corruptions(corrupted, results.out / "corruptions.png", **look)


def printed(results: Results) -> list[Table]:
    """The figure that models are compared by, for people, and of corrupted images the means; ablation.csv has all."""
    measure = results.measures[0] if results.files else results.task.shown[0]
    compared = {"to dense": f"{measure}_difference"}
    if results.against is not None:
        compared[f"to {results.against}"] = f"{measure}_to_{results.against}"
    names = results.task.config.figures[measure], *compared, "GFLOPs", "keep", "ms", "speed-up", "realised"
    table = _table(f"{results.out}", "variant", *names)
    for row in results.rows() if results.files else []:
        if "corruption" in row:
            continue
        spread = row[f"{measure}_spread"]
        table.add_row(
            row["variant"],
            f"{100 * row[measure]:.1f}" + (f" ±{100 * spread:.1f}" if spread is not None else ""),
            *(_with_interval(row[name]) for name in compared.values()),
            f"{row['gflops']:.1f}",
            f"{statistics.fmean(row['keep']):.0%}",
            f"{row['ms']:.0f}" if "ms" in row else "",
            f"{row['speedup']:.2f}" if "speedup" in row else "",
            f"{row['realised']:.2f}" if "realised" in row else "",
        )
    if not results.corruptions:
        return [table]
    means = _table("mean over corruptions", "variant", "severity", "corruptions", names[0], "to dense there", "GFLOPs")
    for row in results.severities():
        apart = "" if row["curve"] == DENSE else _with_interval(row[f"{measure}_difference"])
        counts = str(row["severity"]), str(row["corruptions"])
        means.add_row(row["curve"], *counts, f"{100 * row[measure]:.1f}", apart, f"{row['gflops']:.1f}")
    return [table, means]


def _table(title: str, first: str, *columns: str) -> Table:
    """An empty table, the first column of names and the others of numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _with_interval(apart: list[float] | None) -> str:
    return "" if apart is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in apart))
