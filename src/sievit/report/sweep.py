"""One model at many values of a field of its policy: accuracy against cost and against time."""

import csv
import hashlib
import io
import json
import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sievit import terminal
from sievit.config import ConfigError, Count, Natural, kind_of, to_json
from sievit.data.dataset import ImageDataset
from sievit.data.truth import Truth
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import evaluate, timed_in_turns
from sievit.files import digest, held, write_atomically, write_json
from sievit.measure.clock import median_and_p95
from sievit.models.base import Model
from sievit.models.build import load, model_file
from sievit.policies import KeepAllConfig, PolicyOptions, chosen_policy
from sievit.report.plot import draw_curves
from sievit.tasks import Task, task_of
from sievit.text import read_json

COLUMNS = ("gflops", "gflops_std", "gflops_min", "gflops_max")
TIMES = ("ms_per_image", "ms_per_image_p95")
Value = float | str | None
"""Of the field that is swept; None: every token is computed."""


def sweep(
    model: Path,
    /,
    images: Path,
    *,
    truth: Truth = Truth(),  # noqa: B008
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    field: str | None = None,
    values: tuple[str, ...] = (),
    out: Path = Path("out/sweep"),
    name: str | None = None,
    also: tuple[str, ...] = (),
    smaller: tuple[str, ...] = (),
    limit: Count | None = None,
    batch_size: Count = 1,
    timed_images: Natural = 16,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate a model at many values of a field of its policy, such as thresholds, and densely.

    Writes sweep.json, sweep.csv and sweep.png; the last line of the output is one JSON object with all `points`.
    Stopped, it goes on where it was. At the end all points are timed in turns on the same first images, one at a time.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: folder that holds the images.
        truth: the annotations of the images.
        policy: another policy, e.g. dtop for a dense segmenter with auxiliary heads.
        field: of the policy; by default the one that sets how many tokens are left out.
        values: of the field, as --set takes them; by default those that the policy names.
        out: folder for table, JSON and plot.
        name: of the model's curve in table and plot; by default the policy's.
        also: further checkpoints as curves of their own: NAME=CHECKPOINT, or NAME=CHECKPOINT@0.9,0.95.
        smaller: dense models on smaller images, as curves to compare with: NAME=CHECKPOINT@322,448 resizes images to
            these short edges in pixels.
        limit: only the first so many images.
        batch_size: images that go through the network together.
        timed_images: so many images are timed, by all in turns.
        device: cpu, cuda, cuda:1, or auto.
    """
    console = terminal.console()
    shared: dict[str, Any] = {"images": images, "truth": truth, "policy": policy, "field": field}
    shared["device"] = pick_device(device)
    curves = [_curve(name, model, values, **shared), *(_curve(*_parsed(text, values), **shared) for text in also)]
    curves += [_by_size(text, images, truth, shared["device"]) for text in smaller]
    if len({curve.name for curve in curves}) < len(curves):
        raise ConfigError(f"two curves of one name among {', '.join(curve.name for curve in curves)}; give others")
    settings = to_json({"images": images, **vars(truth), **vars(policy)}) | {"device": device_name(shared["device"])}
    settings |= {"field": curves[0].field, "limit": limit, "batch_size": batch_size}
    task = task_of(curves[0].model.config)
    with held(out):
        table = _Points(out, settings, {curve.name: curve.digest for curve in curves}, task)
        jobs = [(curve, value) for curve in curves for value in curve.changes]
        done = [job for job in jobs if table.has(job[0].name, job[1])]
        if done:
            console.print(f"{len(done)} of {len(jobs)} points are in {out / 'sweep.json'} already")
        for curve, value in jobs:
            if (curve, value) not in done:
                _evaluate(table, curve, value, batch_size, limit, console)
        _time(table, {curve.name: curve for curve in curves}, min(timed_images, limit or timed_images), console)
        table.draw()
        terminal.console(stderr=False).print(table.for_people())
        console.print(f"{out / 'sweep.png'}, sweep.csv, sweep.json", soft_wrap=True)
        return table.content()


@dataclass(frozen=True, eq=False)
class Curve:
    """A model, and what is changed of its configuration at each value of the field; None is the dense model."""

    name: str
    model: Model
    digest: str
    data: ImageDataset
    field: str
    changes: dict[Value, dict[str, Any]]

    def at(self, value: Value) -> Model:
        """The model of a value."""
        return self.model.with_config(**self.changes[value])


def _curve(
    name: str | None,
    path: Path,
    values: Sequence[str],
    with_dense: bool = True,
    *,
    images: Path,
    truth: Truth,
    policy: PolicyOptions,
    field: str | None,
    device: torch.device,
) -> Curve:
    """A checkpoint at these values of the field, the highest first; further arguments as of `sweep`.

    Raises:
        ConfigError: it cannot be loaded, the data is not for it, or a value does not fit its policy.
    """
    path = model_file(path)
    model = load(path, policy=policy, device=device)
    own = model.config.policy
    usual, texts = own.swept or (None, ())
    field = field or usual
    if field is None or not (values or field == usual):
        raise ConfigError(
            f"{path}: which values of its policy {kind_of(own)!r}? Give --field and --values, or another --policy"
        )
    of_values: dict[Value, dict[str, Any]] = {None: {"policy": KeepAllConfig()}} if with_dense else {}
    for value in sorted({_number(str(text)) for text in values or texts}, key=_order):
        changed = chosen_policy(own, PolicyOptions(set=(f"{field}={value}",)))
        model.new_policy(changed)  # raises now where the value does not fit
        of_values[value] = {"policy": changed}
    name = name or (policy.policy or kind_of(own) or type(own).__name__).rpartition(":")[2]
    return Curve(name, model, digest(path), task_of(model.config).open(images, truth), field, of_values)


def _by_size(text: str, images: Path, truth: Truth, device: torch.device) -> Curve:
    """The curve of `NAME=CHECKPOINT@EDGE,EDGE,...`: the dense model on images of these short edges."""
    name, path, edges, with_dense = _parsed(text, ())
    model = load(model_file(path), policy=PolicyOptions(policy="keep_all"), device=device)
    given = model.config.input
    if with_dense or not all(edge.isdigit() and int(edge) for edge in edges):
        raise ConfigError(f"--smaller {text!r}: write NAME=CHECKPOINT@322,448, short edges in pixels")
    if given.min_size is None:
        raise ConfigError(f"--smaller {text!r}: the model takes images at the size that they have")
    changes: dict[Value, dict[str, Any]] = {}
    for edge in sorted(map(int, edges), reverse=True):
        longest = -(-given.max_size * edge // given.min_size)
        changes[float(edge)] = {"input": replace(given, min_size=edge, max_size=longest)}
    return Curve(name, model, digest(model_file(path)), task_of(model.config).open(images, truth), "min_size", changes)


def _parsed(text: str, values: Sequence[str]) -> tuple[str, Path, Sequence[str], bool]:
    """`NAME=CHECKPOINT`, at `values`, or `NAME=CHECKPOINT@V,V,...` at its own and not densely."""
    name, equals, rest = text.partition("=")
    path, at, own = rest.partition("@")
    if not (name and equals and path and (own or not at)):
        raise ConfigError(f"--also or --smaller {text!r}: write NAME=CHECKPOINT, or NAME=CHECKPOINT@0.9,0.95")
    return name, Path(path), own.split(",") if at else values, not at


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _order(value: Value) -> tuple[bool, float, str]:
    """Dense first, then the highest number, then texts."""
    return (True, 0.0, value) if isinstance(value, str) else (False, -math.inf if value is None else -value, "")


def _evaluate(
    table: "_Points", curve: Curve, value: Value, batch_size: int, limit: int | None, console: Console
) -> None:
    """Add a point, or what went wrong with it."""
    title = f"{curve.name} {_shown(value)}"
    options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "console": console, "title": title}
    try:
        figures = evaluate(curve.at(value), curve.data, skip_failures=True, **options)
    except (ConfigError, OSError, RuntimeError) as error:
        console.print(f"error: {title}: {error}", soft_wrap=True)
        table.failed(curve.name, value, str(error))
    else:
        table.add(curve.name, value, figures)


def _shown(value: Value) -> str:
    """In tables and messages."""
    return "dense" if value is None else value if isinstance(value, str) else f"{value:g}"


def _time(table: "_Points", curves: dict[str, Curve], count: int, console: Console) -> None:
    """Time all points in turns, unless they have been timed together before."""
    points = table.points
    if not points or (len({point.get("timing") for point in points}) == 1 and "timing" in points[0]):
        return
    swept = [curves[point["model"]].at(point["value"]) for point in points]
    dataset = curves[points[0]["model"]].data
    images = []
    for index in range(len(dataset)):
        with suppress(ConfigError):  # the evaluation has reported it
            images.append(dataset[index][0])
        if len(images) == count:
            break
    taken = timed_in_turns(swept, images, console=console)
    table.timed([[elapsed for elapsed, _ in of_call] for of_call in taken])


class _Points:
    """The points of a folder: those that it holds, and those that are added."""

    def __init__(self, out: Path, settings: dict[str, Any], checkpoints: dict[str, str], task: Task) -> None:
        """
        Raises:
            ConfigError: the folder holds points of other settings or checkpoints, or something else.
        """
        self.out, self.settings, self.checkpoints, self.task = out, settings, checkpoints, task
        self.points: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        path = out / "sweep.json"
        if not path.is_file():
            return
        known = read_json(path)
        try:
            before, points, digests = known["settings"], known["points"], known["checkpoints"]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}: no sweep ({error!r}); delete it, or give another --out") from error
        for name in settings:
            if before.get(name) != settings[name]:
                raise ConfigError(
                    f"{path}: was made with {name} {before.get(name)}, now it is {settings[name]}; give another --out"
                )
        for name, now in checkpoints.items():
            if digests.get(name, now) != now:
                raise ConfigError(f"{path}: its points of {name!r} are of another checkpoint; give another --out")
        for point in points:
            if point["model"] not in checkpoints:
                raise ConfigError(
                    f"{path}: has points of {point['model']!r} too; name it with --also, or give another --out"
                )
        self.points = points

    def has(self, model: str, value: Value) -> bool:
        return any((point["model"], point["value"]) == (model, value) for point in self.points)

    def add(self, model: str, value: Value, figures: dict[str, Any]) -> None:
        """One more point; the file holds it from now on."""
        if not figures.get("images"):
            self.failed(model, value, f"no image could be used: {figures['failures'][0]}")
            return
        self.points.append({"model": model, "value": value, **figures})
        order = list(self.checkpoints)
        self.points.sort(key=lambda point: (order.index(point["model"]), _order(point["value"])))
        self._write()

    def failed(self, model: str, value: Value, error: str) -> None:
        self.failures.append({"model": model, "value": value, "error": error})
        self._write()

    def timed(self, milliseconds: list[list[float]]) -> None:
        """Times of all points, of the same images."""
        timing = hashlib.sha256(json.dumps(milliseconds).encode()).hexdigest()[:8]
        for point, taken in zip(self.points, milliseconds, strict=True):
            point |= {**median_and_p95("ms_per_image", taken), "timing": timing}
        self._write()

    def content(self) -> dict[str, Any]:
        """Everything, as in sweep.json."""
        return {name: getattr(self, name) for name in ("settings", "checkpoints", "points", "failures")}

    def _write(self) -> None:
        write_json(self.out / "sweep.json", self.content())
        stages = max((len(point.get("left_at", ())) for point in self.points), default=0)
        first = self.points[0] if self.points else {}
        scores = [n for n, v in first.items() if isinstance(v, float) and n not in ("value", *COLUMNS, *TIMES)]
        columns = ["model", "value", *scores, *COLUMNS, *TIMES, "images"]
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow([*columns, *(f"left_at_{stage}" for stage in range(stages))])
        for point in self.points:
            gone = point.get("left_at", [])
            row = ["dense" if point["value"] is None else point["value"], *(point.get(name) for name in columns[2:])]
            writer.writerow([point["model"], *row, *gone, *[0.0] * (stages - len(gone))])
        write_atomically(self.out / "sweep.csv", buffer.getvalue().encode())

    def draw(self) -> None:
        """The picture of all points."""
        if self.points:
            measure, device = self.task.headline(self.points[0]), self.settings["device"]
            label = self.task.config.figures[measure]
            draw_curves(self.points, self.out / "sweep.png", measure=measure, label=label, device=device)

    def for_people(self) -> Table:
        """The points as a table."""
        table = Table(title=f"sweep, {self.settings['device']}", title_justify="left", box=SIMPLE)
        measure = self.task.headline(self.points[0]) if self.points else self.task.shown[0]
        columns = ("model", self.settings["field"], self.task.config.figures[measure])
        for column in (*columns, "GFLOPs", "min to max", "ms", "keep"):
            table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
        for point in self.points:
            table.add_row(
                point["model"],
                _shown(point["value"]),
                f"{100 * point[measure]:.2f}",
                f"{point['gflops']:.2f}",
                f"{point['gflops_min']:.1f} to {point['gflops_max']:.1f}",
                f"{point['ms_per_image']:.0f}",
                f"{statistics.fmean(point['keep']):.0%}",
            )
        return table
