"""One segmenter at many thresholds: accuracy against cost and against time."""

import csv
import hashlib
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sievit.config import ConfigError
from sievit.data.labels import LabelDataset
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import evaluate, timed
from sievit.files import write_atomically
from sievit.heads import SemanticHead
from sievit.models.build import load, model_file
from sievit.models.segmenter import SegmentationNet, Segmenter
from sievit.policies import DToPConfig, KeepAllConfig, PolicyConfig
from sievit.report.common import progress
from sievit.report.plot import draw_curves
from sievit.report.semantic import LabelFiles, open_labels

DENSE = 1.0
"""The threshold that lets nobody leave: the dense model."""
COLUMNS = ("miou", "pixel_accuracy", "mean_accuracy", "gflops", "gflops_std", "gflops_min", "gflops_max")
TIMES = ("ms_per_image", "ms_per_image_p95")


@dataclass(frozen=True, kw_only=True)
class ExitOptions:
    """How tokens leave; by default as the checkpoint's own policy says, else as DToP's default does.

    Attributes:
        keep_per_class: of the tokens above the threshold the best so many of each class stay.
        grade: what is compared with the threshold.
        preserve: tokens that left stay visible to the others.
        rejoin: all tokens come back before the last block.
    """

    keep_per_class: int | None = None
    grade: Literal["max", "margin", "entropy"] | None = None
    preserve: bool | None = None
    rejoin: bool | None = None

    def policy(self, model: Segmenter, threshold: float) -> PolicyConfig:
        """The policy of `model` at a threshold."""
        if threshold >= DENSE:
            return KeepAllConfig()
        own = model.config.policy
        base = own if isinstance(own, DToPConfig) else DToPConfig()
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(base, thresholds=(threshold,), **given)


@dataclass(frozen=True, kw_only=True)
class Labelled(LabelFiles):
    """Images, and a class for each of their pixels.

    Attributes:
        images: folder that holds the images.
        labels: folder of label images: grey or palette images whose values are classes.
    """

    images: Path
    labels: Path


@dataclass(frozen=True)
class Curve:
    """A checkpoint, and the thresholds to evaluate it at."""

    name: str
    path: Path
    thresholds: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, thresholds: tuple[float, ...]) -> "Curve":
        """`NAME=CHECKPOINT`, at `thresholds`, or `NAME=CHECKPOINT@T,T,...` at its own."""
        name, equals, rest = text.partition("=")
        path, at, own = rest.partition("@")
        if not (name and equals and path):
            raise ConfigError(f"--also {text!r}: write NAME=CHECKPOINT, or NAME=CHECKPOINT@0.9,0.95")
        try:
            chosen = tuple(float(value) for value in own.split(",")) if at else thresholds
        except ValueError:
            raise ConfigError(f"--also {text!r}: behind the @ stand thresholds, such as 0.9,0.95") from None
        return cls(name, Path(path), _ordered(chosen))


def sweep(
    model_path: Path,
    data: Labelled,
    thresholds: Sequence[float],
    out: Path,
    *,
    name: str = "DToP",
    also: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 1,
    timed_images: int = 16,
    exits: ExitOptions | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate at every threshold, and write sweep.json, sweep.csv and sweep.png to `out`.

    The dense model is always among the points, as threshold 1. Points are written as soon as they are known; what `out`
    holds of the same settings is not computed again. What goes wrong at one threshold is listed in `failures`. At the
    end all models and thresholds are timed in turns on the same first images, one image at a time: a machine that slows
    down in between slows all of them down.

    Args:
        name: of the model's curve. also: further checkpoints as curves of their own, see `Curve.parse`.
        limit: only the first so many images.
        timed_images: how many are timed.

    Raises:
        ConfigError: no segmenter, data that cannot be opened, or `out` holds a sweep of something else.
    """
    console, exits, where = Console(stderr=True), exits or ExitOptions(), pick_device(device)
    wanted = _ordered((DENSE, *thresholds))
    curves = [Curve(name, model_path, wanted), *(Curve.parse(text, wanted) for text in also)]
    if len({curve.name for curve in curves}) < len(curves):
        raise ConfigError(f"--also: two curves of one name among {', '.join(curve.name for curve in curves)}")
    models = {curve.name: _load_segmenter(curve.path, where) for curve in curves}
    datasets = {of: open_labels(model, data.images, data.labels, data) for of, (model, _) in models.items()}
    for curve in curves:
        for threshold in curve.thresholds:
            exits.policy(models[curve.name][0], threshold)  # says now what is wrong with it
    settings: dict[str, Any] = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(data).items()},
        "limit": limit,
        "batch_size": batch_size,
        **asdict(exits),
        "device": device_name(where),
    }
    table = _Points(out, settings, {of: digest for of, (_, digest) in models.items()})
    jobs = [(curve.name, threshold) for curve in curves for threshold in curve.thresholds]
    done = [job for job in jobs if table.has(*job)]
    if done:
        console.print(f"{len(done)} of {len(jobs)} points are in {out / 'sweep.json'} already")
    for of, threshold in jobs:
        if (of, threshold) not in done:
            model = with_policy(models[of][0], exits.policy(models[of][0], threshold))
            _evaluate(table, of, threshold, model, datasets[of], batch_size, limit, console)
    _time(table, models, datasets, exits, min(timed_images, limit or timed_images), console)
    table.draw()
    Console().print(table.for_people())
    console.print(f"{out / 'sweep.png'}, sweep.csv, sweep.json", soft_wrap=True)
    return table.content()


def _evaluate(
    table: "_Points",
    name: str,
    threshold: float,
    model: Segmenter,
    dataset: LabelDataset,
    batch_size: int,
    limit: int | None,
    console: Console,
) -> None:
    """Add a point, or what went wrong with it."""
    title = f"{name} {threshold:g}"
    try:
        figures = evaluate(
            model, dataset, batch_size=batch_size, limit=limit, skip_failures=True, console=console, title=title
        )
    except (ConfigError, OSError, RuntimeError) as error:
        console.print(f"error: {title}: {error}", soft_wrap=True, markup=False, highlight=False)
        table.failed(name, threshold, str(error))
    else:
        table.add(name, threshold, figures)


def with_policy(model: Segmenter, policy: PolicyConfig) -> Segmenter:
    """The same weights, not copied, with another policy."""
    heads = [head for head in model.net.heads if isinstance(head, SemanticHead)]
    net = SegmentationNet(vit=model.vit, policy=policy, heads=heads, out_indices=model.net.out_indices)
    return Segmenter(replace(model.config, policy=policy), net).eval()


def _ordered(thresholds: Sequence[float]) -> tuple[float, ...]:
    """Each once, the highest first."""
    return tuple(sorted(set(thresholds), reverse=True))


def _load_segmenter(path: Path, device: Any) -> tuple[Segmenter, str]:
    """The model, and the digest of its file."""
    path = model_file(path)
    model = load(path, device=device)
    if not isinstance(model, Segmenter):
        raise ConfigError(f"{path}: is a detector; sweep compares thresholds of a segmenter")
    if len(model.net.out_indices) < 2:
        raise ConfigError(f"{path}: has no auxiliary head behind which tokens could leave")
    with path.open("rb") as file:
        return model, hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _time(
    table: "_Points",
    models: dict[str, tuple[Segmenter, str]],
    datasets: dict[str, LabelDataset],
    exits: ExitOptions,
    count: int,
    console: Console,
) -> None:
    """Time all points in turns, unless they have been timed together before."""
    points = table.points
    if not points or (len({point.get("timing") for point in points}) == 1 and "timing" in points[0]):
        return
    swept = [with_policy(m := models[p["model"]][0], exits.policy(m, p["threshold"])) for p in points]
    dataset = datasets[points[0]["model"]]
    pictures = []
    for index in range(len(dataset)):
        try:
            pictures.append(dataset[index][0])
        except ConfigError:
            continue  # evaluation has told
        if len(pictures) == count:
            break
    for model in swept:
        timed(model, pictures[:1])
    taken: list[list[float]] = [[] for _ in points]
    with progress(console) as bar:
        for i, picture in enumerate(bar.track(pictures, description="timing")):
            for turn in range(len(points)):
                which = (turn + i) % len(points)
                taken[which].append(timed(swept[which], [picture])[1])
    table.timed(taken)


class _Points:
    """The points of a folder: those that it holds, and those that are added."""

    def __init__(self, out: Path, settings: dict[str, Any], checkpoints: dict[str, str]) -> None:
        """
        Raises:
            ConfigError: the folder holds points of other settings or checkpoints, or something else.
        """
        self.out, self.settings, self.checkpoints = out, settings, checkpoints
        self.points: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        out.mkdir(parents=True, exist_ok=True)
        path = out / "sweep.json"
        if not path.is_file():
            return
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            before, points, digests = known["settings"], known["points"], known["checkpoints"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: no sweep ({error!r}); delete it, or give another --out") from error
        for name in settings:
            if before.get(name) != settings[name]:
                raise ConfigError(
                    f"{path}: was made with {name} {before.get(name)}, now it is {settings[name]}; give another --out"
                )
        for name, digest in checkpoints.items():
            if digests.get(name, digest) != digest:
                raise ConfigError(f"{path}: its points of {name!r} are of another checkpoint; give another --out")
        for point in points:
            if point["model"] not in checkpoints:
                raise ConfigError(
                    f"{path}: has points of {point['model']!r} too; name it with --also, or give another --out"
                )
        self.points = points

    def has(self, model: str, threshold: float) -> bool:
        return any((point["model"], point["threshold"]) == (model, threshold) for point in self.points)

    def add(self, model: str, threshold: float, figures: dict[str, Any]) -> None:
        """One more point; the file holds it from now on."""
        if not figures.get("images"):
            self.failed(model, threshold, f"no image could be used: {figures['failures'][0]}")
            return
        self.points.append({"model": model, "threshold": threshold, **figures})
        order = list(self.checkpoints)
        self.points.sort(key=lambda point: (order.index(point["model"]), -point["threshold"]))
        self._write()

    def failed(self, model: str, threshold: float, error: str) -> None:
        self.failures.append({"model": model, "threshold": threshold, "error": error})
        self._write()

    def timed(self, milliseconds: list[list[float]]) -> None:
        """Times of all points, of the same images."""
        timing = hashlib.sha256(json.dumps(milliseconds).encode()).hexdigest()[:8]
        for point, taken in zip(self.points, milliseconds, strict=True):
            ordered = sorted(taken)
            point["ms_per_image"] = round(statistics.median(ordered), 2)
            point["ms_per_image_p95"] = round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2)
            point["timing"] = timing
        self._write()

    def content(self) -> dict[str, Any]:
        """Everything, as in sweep.json."""
        return {
            "settings": self.settings,
            "checkpoints": self.checkpoints,
            "points": self.points,
            "failures": self.failures,
        }

    def _write(self) -> None:
        write_atomically(self.out / "sweep.json", (json.dumps(self.content(), indent=1) + "\n").encode())
        stages = max((len(point.get("left_at", ())) for point in self.points), default=0)
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        left = [f"left_at_{stage}" for stage in range(stages)]
        writer.writerow(["model", "threshold", *COLUMNS, *TIMES, "images", *left])
        for point in self.points:
            row = [point[name] for name in ("model", "threshold", *COLUMNS, *TIMES, "images")]
            gone = point.get("left_at", [])
            writer.writerow([*row, *gone, *[0.0] * (stages - len(gone))])
        write_atomically(self.out / "sweep.csv", buffer.getvalue().encode())

    def draw(self) -> None:
        """The picture of all points."""
        if self.points:
            draw_curves(self.points, self.out / "sweep.png", device=self.settings["device"])

    def for_people(self) -> Table:
        table = Table(title=f"sweep, {self.settings['device']}", title_justify="left", box=SIMPLE)
        for column in ("model", "above", "mIoU", "GFLOPs", "min to max", "ms", "leave"):
            table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
        for point in self.points:
            table.add_row(
                point["model"],
                "dense" if point["threshold"] >= DENSE else f"{point['threshold']:g}",
                f"{100 * point['miou']:.2f}",
                f"{point['gflops']:.2f}",
                f"{point['gflops_min']:.1f} to {point['gflops_max']:.1f}",
                f"{point['ms_per_image']:.0f}",
                " ".join(f"{share:.0%}" for share in point.get("left_at", ())[:-1]),
            )
        return table
