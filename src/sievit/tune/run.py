"""Tuning: what pays on this device, at this size and batch, and no more than the target allows."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from sievit.bench.common import fitted
from sievit.bench.network import as_given
from sievit.config import ConfigError, kind_of, to_json
from sievit.data.coco import CocoDetection
from sievit.data.images import list_images, read_image, to_tensor
from sievit.data.labels import LabelDataset
from sievit.detector import Detector
from sievit.devices import device_name
from sievit.engine.evaluate import evaluate, headline
from sievit.execution import Execution
from sievit.files import write_atomically
from sievit.model import Model, model_file, read, save
from sievit.policies import PolicyConfig
from sievit.report import open_model
from sievit.report.common import find_model
from sievit.report.detection import open_annotations
from sievit.report.semantic import LabelFiles, open_labels
from sievit.tune.goals import Aim, AsItIs, Drop, Found, Milliseconds, Operations
from sievit.tune.guard import Verdict, judge, loses, unsure
from sievit.tune.kinds import Kind, StaticExits, StaticGates, Turn, kinds
from sievit.tune.subject import DENSE, Clock, Ratio, Setup, Subject, wall_clock

Size = tuple[int, int]
DENSES = ("dense", "dense_compiled")
"""What the dense model is called in reports, as it stands and compiled."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is wanted; at most one of them. Without any the model's own setting stays, where it pays.

    Attributes:
        target_ms: milliseconds per image, at most; everything from images in memory to answers on their pixels.
        target_gflops: GFLOPs per image, at most, mean over the images.
        max_drop: points of AP or mIoU, at most, below the dense model; needs annotated images.
    """

    target_ms: float | None = None
    target_gflops: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        given = {f"--{name.replace('_', '-')}": v for name, v in vars(self).items() if v is not None}
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: give one target at a time")
        for name, value in given.items():
            if value < 0 or (value == 0 and name != "--max-drop"):
                raise ConfigError(f"{name} {value:g}: must be positive")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Annotated images, for the accuracy.

    Attributes:
        annotations: COCO annotation file, for a detector.
        labels: folder of label images, for a segmenter.
        eval_limit: only the first so many annotated images are judged.
    """

    annotations: Path | None = None
    labels: Path | None = None
    eval_limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How it is measured.

    Attributes:
        size: height and width that images are cropped and resized to; by default the model's own rule decides.
        batch_size: images at once.
        repeats: timed rounds, in each of which everything that is compared runs once; at least 3.
        num_images: so many images of the folder, evenly spread, are timed and counted.
        modes: `dynamic` chooses by image, `bucketed` too, but computes counts of few sizes, `static` as many tokens in
            every image; by default the first and the last, and on CUDA with --compile all.
        precision: float32, or bfloat16 under autocast; of everything, and of the model that is written.
        compile: the dense model and the modes of few shapes race under torch.compile too, on CUDA with CUDA graphs;
            takes minutes for each.
        quantile: of the shares that the images keep, for static counts; by default their mean.
        multiple: static counts are rounded up to a multiple of it.
    """

    size: Size | None = None
    batch_size: int = 1
    repeats: int = 15
    num_images: int = 16
    modes: tuple[str, ...] = ()
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    quantile: float | None = None
    multiple: int = 8

    def __post_init__(self) -> None:
        if self.repeats < 3 or self.batch_size < 1 or self.num_images < 1 or self.multiple < 1:
            raise ConfigError("--repeats is at least 3; --batch-size, --num-images and --multiple are at least 1")
        if self.quantile is not None and not 0 <= self.quantile <= 1:
            raise ConfigError(f"--quantile {self.quantile:g}: is from 0 to 1")
        if not set(self.modes) <= {"dynamic", "bucketed", "static"}:
            raise ConfigError(f"--modes {' '.join(self.modes)}: are dynamic, bucketed and static")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"--precision {self.precision}: is float32 or bfloat16")


@dataclass
class Candidate:
    """A policy in one mode, tuned, and how it is run."""

    kind: Kind
    found: Found
    verdicts: list[Verdict]
    off: set[int]
    execution: Execution

    @property
    def name(self) -> str:
        """The mode, as the benches call it."""
        mode = "bucketed" if self.execution.mode == "bucketed" else self.kind.mode
        return mode + "_padded" * (self.execution.backend == "padded") + "_compiled" * self.execution.compiled

    @property
    def setup(self) -> Setup:
        return Setup(self.config, self.execution)

    @property
    def config(self) -> PolicyConfig:
        return self.found.config


@dataclass(frozen=True)
class Times:
    """Milliseconds per image of the dense model, as it stands and perhaps compiled, and of another setup, in turns."""

    dense: list[list[float]]
    own: list[float]

    @property
    def ratio(self) -> Ratio:
        """Of the dense model that it is harder to be faster than."""
        return min((Ratio.of(dense, self.own) for dense in self.dense), key=lambda ratio: ratio.low)


@dataclass(frozen=True)
class Outcome:
    """Who won.

    Attributes:
        chosen: None where it is the dense model.
        setup: what is written, and `times` its last race.
        candidates: all that there were, with the times of those that ran in `raced`, by their id.
    """

    chosen: Candidate | None
    setup: Setup
    why: str
    times: Times
    candidates: list[Candidate]
    raced: dict[int, Times]


@torch.inference_mode()
def tune(
    path: Path,
    images: Path,
    out: Path,
    *,
    goal: Goal = Goal(),
    judged: Judged = Judged(),
    tuning: Tuning = Tuning(),
    label_files: LabelFiles = LabelFiles(),  # noqa: B008
    policy: str | None = None,
    device: str = "auto",
    clock: Clock = wall_clock,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write a model that is as fast as the policy allows on this device, and never slower than dense; and a report.

    Blocks that are slower with tokens left out are computed for all tokens; the dial of the policy (SViT: the threshold
    of its logits, or its budget; DToP: the grade; others: their shares) is turned to the target; then all modes, and
    where they may differ the back-ends of attention, race with the dense model, as they stand and compiled if that is
    wanted. The winner has to beat the dense model in all its forms, and once more against those alone. Where no policy
    wins, by the lower quartile of paired ratios, what is written computes every token. The model remembers how it ran.

    Args:
        path: checkpoint, folder of a training run, or name of a model that comes with sievit.
        images: folder of images to measure on, like those that the model will see.
        out: the .safetensors file to write; the report is written beside it, as .json.
        policy: takes the place of the model's own.
        clock: takes times; to be replaced in tests.
        console: where progress goes; None for nowhere.

    Returns:
        The report. `policy`, `mode`, `execution` and `settings` are what was written, and `why`; `dense`, with
        --compile `dense_compiled`, and `tuned` hold `gflops`, `ms` and `ms_p95` per image, `keep` per block and, with
        annotations, the accuracy in points; `speedup` is the median of paired ratios, to the faster dense one, and
        their quartiles; `target` says whether it was met; `candidates` are all policies that ran, with their settings,
        figures, `blocks` (dense against pruned, and which were made dense) and what the dial `tried`; `load` is the
        machine's load average, `failures` are images that could not be read.

    Raises:
        ConfigError: options that do not go together, a policy without anything to tune, no readable image, or a target
            that no setting reaches; nothing is written then.
    """
    where = find_model(path)
    if goal.max_drop is not None and judged.annotations is None and judged.labels is None:
        raise ConfigError("--max-drop needs annotated images: give --annotations (detector) or --labels (segmenter)")
    if out.resolve() == model_file(where).resolve():
        raise ConfigError(f"{out}: is the model that is tuned, which would be lost; give another --out")
    if tuning.compile and goal.target_ms is not None:
        raise ConfigError("--target-ms with --compile: each step of the dial would be compiled; give --target-gflops")
    own = open_model(where, policy=policy, device=device)
    execution = Execution(precision=tuning.precision)
    accuracy = _accuracy(own, images, judged, label_files, execution, console)
    pictures, failures = _pictures(images, tuning)
    if tuning.compile and len({picture.shape for picture in pictures}) > 1:
        raise ConfigError("--compile: the images are of several sizes, each compiled by itself; give --size")
    model = own if tuning.size is None else as_given(own)
    subject = Subject(model, _batches(pictures, tuning.batch_size), clock, console, execution)
    say = (lambda text: None) if console is None else lambda text: console.print(text, style="dim", highlight=False)
    say(f"{len(pictures)} images, counting")
    ways = kinds(subject, _modes(subject, tuning), quantile=tuning.quantile, multiple=tuning.multiple)
    if tuning.compile:
        say("compiling the dense model")  # first, so that one that cannot be compiled is told of soon
        subject.warmed(_denses(subject, tuning)[-1])
    aim = _aim(goal, subject, tuning, accuracy)
    candidates, why = _candidates(subject, ways, aim, tuning, say)
    outcome = _race(subject, candidates, aim, tuning, why, say)
    figures = _report(subject, goal, outcome, accuracy)
    figures = {
        "out": str(out),
        "report": str(out.with_suffix(".json")),
        "model": str(path),
        "images": len(pictures),
        "size": None if tuning.size is None else list(tuning.size),
        "batch_size": tuning.batch_size,
        "repeats": tuning.repeats,
        "precision": tuning.precision,
        "device": device_name(model.device),
        "torch": torch.__version__,
        "load": [round(value, 2) for value in os.getloadavg()],
        **figures,
        **({"failures": failures} if failures else {}),
    }
    half = any(tensor.dtype == torch.float16 for tensor in read(model_file(where))[1].values())
    out.parent.mkdir(parents=True, exist_ok=True)
    save(subject.set_up(outcome.setup, own), out, half=half)
    write_atomically(out.with_suffix(".json"), (json.dumps(figures, indent=1) + "\n").encode())
    return figures


def _pictures(folder: Path, tuning: Tuning) -> tuple[list[Tensor], list[str]]:
    """Images (3, h, w), evenly spread over a folder, and what is wrong with those that cannot be read."""
    paths = list_images(folder)
    if tuning.num_images < len(paths):
        paths = [paths[i * len(paths) // tuning.num_images] for i in range(tuning.num_images)]
    pictures, failures = [], []
    for path in paths:
        try:
            picture = to_tensor(read_image(path))
        except ConfigError as error:
            failures.append(str(error))
            continue
        pictures.append(picture if tuning.size is None else fitted(picture.float() / 255, tuning.size))
    if not pictures:
        raise ConfigError(f"{folder}: none of its {len(paths)} images can be read; the first: {failures[0]}")
    return pictures, failures


def _batches(pictures: Sequence[Tensor], batch_size: int) -> list[list[Tensor]]:
    """Full batches; where there are fewer images than one holds, they are repeated."""
    count = max(1, len(pictures) // batch_size)
    return [[pictures[(i * batch_size + j) % len(pictures)] for j in range(batch_size)] for i in range(count)]


def _accuracy(
    model: Model,
    images: Path,
    judged: Judged,
    files: LabelFiles,
    execution: Execution,
    console: Console | None,
) -> "_Accuracy | None":
    """What judges policies, if there are annotations."""
    if judged.annotations is None and judged.labels is None:
        return None
    dataset: CocoDetection | LabelDataset
    if isinstance(model, Detector):
        if judged.annotations is None or judged.labels is not None:
            raise ConfigError("the model is a detector; give --annotations, a file in COCO's format")
        dataset = open_annotations(model, images, judged.annotations)
    else:
        if judged.labels is None or judged.annotations is not None:
            raise ConfigError("the model is a segmenter; give --labels, a folder of label images")
        dataset = open_labels(model, images, judged.labels, files)
    return _Accuracy(Subject(model, [], execution=execution), dataset, judged.eval_limit, console)


class _Accuracy:
    """Points (0..100) of policies on annotated images, as `sievit eval` finds them."""

    def __init__(
        self, subject: Subject, dataset: CocoDetection | LabelDataset, limit: int | None, console: Console | None
    ) -> None:
        self.subject, self.dataset, self.limit, self.console = subject, dataset, limit, console
        self.measure = ""
        self.known: dict[PolicyConfig, float] = {}

    def __call__(self, config: PolicyConfig) -> float:
        if config not in self.known:
            figures = evaluate(
                self.subject.set_up(self.subject.plain(config)),
                self.dataset,
                limit=self.limit,
                skip_failures=True,
                console=self.console,
                title="evaluating",
            )
            self.measure = headline(figures)
            self.known[config] = 100 * figures[self.measure]
        return self.known[config]


def _aim(goal: Goal, subject: Subject, tuning: Tuning, accuracy: _Accuracy | None) -> Aim:
    if goal.target_gflops is not None:
        return Operations(subject, goal.target_gflops)
    if goal.target_ms is not None:
        return Milliseconds(subject, goal.target_ms, max(3, tuning.repeats // 2))
    if goal.max_drop is not None:
        assert accuracy is not None
        return Drop(subject, goal.max_drop, accuracy)
    return AsItIs()


def _candidates(
    subject: Subject, ways: Sequence[Kind], aim: Aim, tuning: Tuning, say: Callable[[str], None]
) -> tuple[list[Candidate], str]:
    """Each mode turned to the target, and why there is none, if so.

    Raises:
        ConfigError: no setting of any mode reaches the target.
    """
    if aim.dense_suffices():
        return [], "the dense model meets the target"
    candidates, missed, why = [], [], ""
    before: Found | None = None
    for kind in ways:
        if before is not None and isinstance(kind, StaticGates | StaticExits):
            kind.calibrate(before.config)
        say(f"{kind.mode}: turning the dial")
        own = kind.own()
        found = aim.find(_dials(kind, aim), own, lambda config: config, start=None if before is None else own)
        if isinstance(aim, Drop) and not found.met:
            why = "every setting that was tried loses more accuracy than it may"
            continue
        if kind.mode == "dynamic":
            before = found
        say(f"{kind.mode}: blocks, dense against pruned")
        verdicts = judge(subject, kind, found.config, tuning.repeats)
        off = {verdict.part.start for verdict in verdicts if loses(verdict)}
        if verdicts and len(off) == len(verdicts):
            why = "every block is slower with tokens left out"
            candidates.append(Candidate(kind, found, verdicts, off, subject.execution))
            continue
        if off:
            found = _again(kind, aim, off, found)
        candidate = Candidate(kind, found, verdicts, off, subject.execution)
        if found.met:
            candidates.append(candidate)
        elif not isinstance(aim, Drop):
            missed.append(candidate)
    if missed and not candidates:
        raise ConfigError(_unreachable(aim, missed[0]))
    return candidates, why


def _dials(kind: Kind, aim: Aim) -> list[Turn]:
    return [] if isinstance(aim, AsItIs) else kind.dials()


def _again(kind: Kind, aim: Aim, off: set[int], before: Found) -> Found:
    """The dial once more, with some of the blocks dense."""
    start = before.config if isinstance(kind, StaticGates | StaticExits) else None
    found = aim.find(_dials(kind, aim), kind.own(), lambda config: kind.without(config, off), start=start)
    return replace(found, tried=before.tried + found.tried)


def _unreachable(aim: Aim, candidate: Candidate) -> str:
    """What is told of a target that no setting reaches."""
    least = min((step[aim.name] for step in candidate.found.tried), default=None)
    assert isinstance(aim, Milliseconds | Operations)
    blocks = f" (blocks {', '.join(map(str, sorted(candidate.off)))} are faster dense)" if candidate.off else ""
    return (
        f"--target-{aim.name} {aim.target:g}: out of reach; with hardly any tokens left the model takes {least:g}, "
        f"the dense one {aim.cost(DENSE):g}{blocks}; give a target in between, a smaller --size or a smaller model"
    )


def _modes(subject: Subject, tuning: Tuning) -> tuple[str, ...]:
    """The modes that race: buckets save nothing but graphs, so that on their own account they do where those count."""
    graphs = tuning.compile and subject.model.device.type == "cuda"
    return tuning.modes or (("dynamic", "bucketed", "static") if graphs else ("dynamic", "static"))


def _denses(subject: Subject, tuning: Tuning) -> list[Setup]:
    """The dense model, in all forms that are to be beaten."""
    plain = subject.plain(DENSE)
    return [plain, replace(plain, execution=replace(plain.execution, compiled=True))] if tuning.compile else [plain]


def _run_in_all_ways(candidate: Candidate, subject: Subject, tuning: Tuning) -> list[Candidate]:
    """The same policy in all the ways to run it that may differ in time."""
    kind, plain, modes = candidate.kind, candidate.execution, _modes(subject, tuning)
    ways = [plain] if kind.mode in modes else []
    if ways and kind.ragged and subject.ragged(candidate.config):
        ways.append(replace(plain, backend="padded"))
    if kind.ragged and "bucketed" in modes:
        ways.append(replace(plain, mode="bucketed"))
    if tuning.compile:
        ways += [replace(way, compiled=True) for way in ways if kind.one_graph or way.mode == "bucketed"]
    return [replace(candidate, execution=way) for way in ways]


def _race(
    subject: Subject, candidates: list[Candidate], aim: Aim, tuning: Tuning, why: str, say: Callable[[str], None]
) -> Outcome:
    """All that is left against the dense model, in turns."""
    denses = _denses(subject, tuning)
    paying = [c for c in candidates if not c.verdicts or len(c.off) < len(c.verdicts)]
    ran = [c for c in candidates if c.verdicts and len(c.off) == len(c.verdicts)]
    raced: dict[int, Times] = {}
    dense: list[list[float]] = []
    while paying:
        running = [way for c in paying for way in _run_in_all_ways(c, subject, tuning)]
        running.sort(key=lambda c: c.execution.compiled)  # last, so that within the noise nothing is compiled
        ran += running
        say(f"racing: dense, {', '.join(c.name for c in running)}")
        times = subject.race([*denses, *(c.setup for c in running)], tuning.repeats)
        dense = times[: len(denses)]
        raced |= {id(c): Times(dense, own) for c, own in zip(running, times[len(denses) :], strict=True)}
        wins = [c for c in running if raced[id(c)].ratio.low > 1]
        while wins:
            best = _best(wins, raced, aim, subject)
            say(f"once more: dense, {best.name}")  # the winner of many may have been lucky
            *dense, own = subject.race([*denses, best.setup], tuning.repeats)
            last = Times(dense, own)
            if last.ratio.low > 1:
                why = _because(best, wins, raced, last.ratio)
                return Outcome(best, best.setup, why, last, ran, raced | {id(best): last})
            wins = [c for c in wins if c is not best]
        why = "no policy was faster than the dense model by more than the noise"
        paying = [c for c in (_cautious(c, aim) for c in paying) if c is not None]
    dense = dense or subject.race(denses, tuning.repeats)
    place = 0
    if len(dense) > 1 and (ratio := Ratio.of(*dense)).low > 1:
        place, why = 1, f"{why}; compiled it is {ratio.median:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"
    return Outcome(None, denses[place], why, Times(dense, dense[place]), ran, raced)


def _cautious(candidate: Candidate, aim: Aim) -> Candidate | None:
    """The same with every block dense that is not clearly faster; None where that changes nothing, or is dense."""
    kind = candidate.kind
    off = candidate.off | {verdict.part.start for verdict in candidate.verdicts if unsure(verdict)}
    if off == candidate.off or len(off) >= len(candidate.verdicts):
        return None
    found = _again(kind, aim, off, candidate.found)
    return replace(candidate, found=found, off=off) if found.met else None


def _best(wins: list[Candidate], raced: dict[int, Times], aim: Aim, subject: Subject) -> Candidate:
    """The faster one, the first (dynamic) where it is within the noise; at a time that was asked for the one that
    computes more."""
    if isinstance(aim, Milliseconds):
        return max(wins, key=lambda c: subject.spent(c.config).gflops)
    best = wins[0]
    for other in wins[1:]:
        if Ratio.of(raced[id(best)].own, raced[id(other)].own).low > 1:
            best = other
    return best


def _because(best: Candidate, wins: list[Candidate], raced: dict[int, Times], ratio: Ratio) -> str:
    """Why it was chosen: its `ratio` to the dense model, and how it did in the race with the others."""
    times = raced[id(best)]
    said = f"{best.name} is {ratio.median:.2f} times as fast as dense ({ratio.low:.2f} to {ratio.high:.2f})"
    if len(times.dense) > 1:
        said += ", compiled or not"
    for other in wins:
        if other is not best:
            to = Ratio.of(raced[id(other)].own, times.own)
            said += f", and {to.median:.2f} times as fast as {other.name} ({to.low:.2f} to {to.high:.2f})"
    return said


def _report(subject: Subject, goal: Goal, outcome: Outcome, accuracy: _Accuracy | None) -> dict[str, Any]:
    chosen, config = outcome.chosen, outcome.setup.policy

    def row(config: PolicyConfig, taken: list[float] | None) -> dict[str, Any]:
        spent = subject.spent(config)
        figures: dict[str, Any] = {
            "gflops": round(spent.gflops, 6),
            "keep": [round(share, 4) for share in spent.shares.double().mean(1).tolist()],
        }
        if taken is not None:
            ordered = sorted(taken)
            figures["ms"] = round(median(ordered), 3)
            figures["ms_p95"] = round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 3)
        if accuracy is not None and config in accuracy.known:
            figures[accuracy.measure] = round(accuracy.known[config], 3)
        return figures

    if accuracy is not None:
        for judged in (DENSE, config):
            accuracy(judged)
    wanted = {name: value for name, value in vars(goal).items() if value is not None}
    tuned = row(config, outcome.times.own)
    met = True
    if goal.target_gflops is not None:
        met = tuned["gflops"] <= goal.target_gflops * (1 + Operations.tolerance)
    if goal.target_ms is not None:
        met = tuned["ms"] <= goal.target_ms * (1 + 2 * Milliseconds.tolerance)
    rows = []
    for candidate in outcome.candidates:
        times = outcome.raced.get(id(candidate))
        rows.append(
            {
                "mode": candidate.name,
                "execution": to_json(candidate.execution),
                **candidate.kind.settings(candidate.config),
                **row(candidate.config, None if times is None else times.own),
                "speedup": None if times is None else times.ratio.to_json(),
                "blocks": [v.to_json(dense=v.part.start in candidate.off) for v in candidate.verdicts],
                "tried": list(candidate.found.tried),
                "chosen": candidate is chosen,
            }
        )
    return {
        "tokens": round(subject.spent(DENSE).tokens),
        "target": {**wanted, "met": met} if wanted else None,
        "policy": kind_of(config),
        "mode": DENSES[outcome.setup.execution.compiled] if chosen is None else chosen.name,
        "execution": to_json(outcome.setup.execution),
        "why": outcome.why,
        **{name: row(DENSE, taken) for name, taken in zip(DENSES, outcome.times.dense, strict=False)},
        "tuned": tuned,
        "speedup": {**outcome.times.ratio.to_json(), "pairs": len(outcome.times.own)},
        "settings": to_json(config),
        "candidates": rows,
    }
