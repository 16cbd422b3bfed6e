"""Tuning: leave tokens out where that pays on this device, at this size and batch, as far as the target asks for it."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sievit import terminal
from sievit.bench.common import fitted
from sievit.config import ConfigError, kind_of, to_json
from sievit.data.dataset import ImageDataset
from sievit.data.images import list_images, read_image, to_tensor
from sievit.data.truth import Truth
from sievit.devices import device_name, pick_device
from sievit.engine.evaluate import evaluate
from sievit.files import write_json
from sievit.hub.file import require_free
from sievit.measure.clock import median_and_p95
from sievit.measure.modes import DENSE, RunMode
from sievit.models.base import Model
from sievit.models.build import load, model_file, read, save
from sievit.policies import PolicyConfig, PolicyOptions
from sievit.tasks import task_of
from sievit.tune.candidates import Candidate, Outcome, Say, candidates_of, check_modes, dense_setups, run_race
from sievit.tune.options import Goal, Tuning
from sievit.tune.targets import MaxDrop, MaxGFLOPs, MaxMilliseconds, NoTarget, Target
from sievit.tune.workload import Clock, Workload, wall_clock
from sievit.vit.execution import Execution

DENSE_MODES = ("dense", "dense_compiled")


@torch.inference_mode()
def tune(
    model: Path,
    /,
    images: Path,
    out: Path,
    *,
    goal: Goal = Goal(),  # noqa: B008
    tuning: Tuning = Tuning(),  # noqa: B008
    truth: Truth = Truth(),  # noqa: B008
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    device: str = "auto",
    force: bool = False,
    clock: Clock = wall_clock,
    progress: Console | None = None,
) -> dict[str, Any]:
    """Make a trained model fast on this device: never slower than dense, at the size and batch given.

    Ranges of blocks that are slower with tokens left out compute all tokens, a dial of the policy is turned to the
    target, and all modes compete with the dense model in all of its modes, twice. Where none is faster, by the lower
    quartile of paired ratios, the written model computes every token. It stores how it was run; the last line of the
    output is its report (docs/speed.md). The exit status is 1 where the target was missed, or images could not be read.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: folder of images to measure on, like those that the model will be used on.
        out: the .safetensors file to write.
        truth: annotations of these images, for the accuracy.
        policy: another policy, e.g. dtop for a dense segmenter with auxiliary heads.
        device: cpu, cuda, cuda:1, or auto.
        force: write over files that are there.
        clock: takes times; to be replaced in tests.
        progress: where progress goes, and a sign that a table is printed; None for neither.

    Raises:
        ConfigError: options that contradict each other, nothing to tune, no readable image, or an unreachable target.
    """
    report = out.with_suffix(".json")
    _check(model, (out, report), goal, truth, tuning, force=force)
    own = load(model, policy=policy, device=pick_device(device))
    accuracy = _Accuracy(own, task_of(own.config).open(images, truth) if truth.given else None, tuning, progress)
    tensors, failures = _read(images, tuning)
    batches, execution = _batches(tensors, tuning.batch_size), Execution(precision=tuning.precision)
    workload = Workload(own if tuning.size is None else own.as_given(), batches, clock, progress, execution)
    say = (lambda text: None) if progress is None else lambda text: progress.print(text, style="dim")
    say(f"{len(tensors)} images, counting")
    outcome = _compare(workload, goal, tuning, accuracy, say)
    figures = {
        "out": str(out),
        "report": str(report),
        "model": str(model),
        **_conditions(tuning, own.device, len(tensors)),
        **figures_of(workload, goal, outcome, accuracy.known(outcome)),
        **({"failures": failures} if failures else {}),
    }
    _save_like(model, own.with_config(**vars(outcome.setup)), out)
    write_json(report, figures)
    if progress is not None:
        show(figures)
    return figures


def _save_like(original: Path, model: Model, out: Path) -> None:
    """Write a model with parameters of the type that they have in the original."""
    half = any(tensor.dtype == torch.float16 for tensor in read(model_file(original))[1].values())
    out.parent.mkdir(parents=True, exist_ok=True)
    save(model, out, half=half)


def _conditions(tuning: Tuning, device: torch.device, images: int) -> dict[str, Any]:
    """How it was measured."""
    return {
        "images": images,
        **{name: getattr(tuning, name) for name in ("batch_size", "repeats", "precision")},
        "size": None if tuning.size is None else list(tuning.size),
        "device": device_name(device),
        "torch": torch.__version__,
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def _check(model: Path, written: Sequence[Path], goal: Goal, truth: Truth, tuning: Tuning, *, force: bool) -> None:
    """Raise a ConfigError for options that contradict each other, or files that are there."""
    for file in written:
        if file.resolve() == model_file(model).resolve():
            raise ConfigError(f"{file}: is the model that is tuned, which would be lost; give another --out")
        require_free(file, force=force)
    if goal.max_drop is not None and not truth.given:
        raise ConfigError("--max-drop needs annotated images: give --annotations (detector) or --labels (segmenter)")
    if tuning.compile and goal.target_ms is not None:
        raise ConfigError("--target-ms with --compile: each step of the dial would be compiled; give --target-gflops")


def _compare(workload: Workload, goal: Goal, tuning: Tuning, accuracy: "_Accuracy", say: Say) -> Outcome:
    """The policy turned to its target, and raced against the dense model."""
    check_modes(workload, tuning)
    if tuning.compile:
        say("compiling the dense model")  # first, so that a compiler that fails is reported soon
        workload.warm_up(dense_setups(workload, tuning)[-1])
    target: Target = NoTarget()
    if goal.target_gflops is not None:
        target = MaxGFLOPs(workload, goal.target_gflops)
    elif goal.target_ms is not None:
        target = MaxMilliseconds(workload, goal.target_ms, max(3, tuning.repeats // 2))
    elif goal.max_drop is not None:
        target = MaxDrop(workload, goal.max_drop, accuracy)
    candidates, why = candidates_of(workload, target, tuning, say)
    return run_race(workload, candidates, target, tuning, why, say)


def _read(folder: Path, tuning: Tuning) -> tuple[list[Tensor], list[str]]:
    """Images (3, h, w), evenly spread over a folder, and the errors of those that cannot be read."""
    paths = list_images(folder)
    if tuning.num_images < len(paths):
        paths = [paths[i * len(paths) // tuning.num_images] for i in range(tuning.num_images)]
    images, failures = [], []
    for path in paths:
        try:
            image = to_tensor(read_image(path))
        except ConfigError as error:
            failures.append(str(error))
            continue
        images.append(image if tuning.size is None else fitted(image.float() / 255, tuning.size))
    if not images:
        raise ConfigError(f"{folder}: none of its {len(paths)} images can be read; the first: {failures[0]}")
    if tuning.compile and len({image.shape for image in images}) > 1:
        raise ConfigError("--compile: the images are of several sizes, each compiled by itself; give --size")
    return images, failures


def _batches(images: Sequence[Tensor], batch_size: int) -> list[list[Tensor]]:
    """Full batches; where there are fewer images than one holds, they are repeated."""
    count = max(1, len(images) // batch_size)
    return [[images[(i * batch_size + j) % len(images)] for j in range(batch_size)] for i in range(count)]


class _Accuracy:
    """Points (0..100) of policies on annotated images, if there are any, as `sievit eval` finds them."""

    def __init__(self, model: Model, data: ImageDataset | None, tuning: Tuning, progress: Console | None) -> None:
        self.model, self.execution = model, Execution(precision=tuning.precision)
        self.data, self.limit, self.progress = data, tuning.eval_limit, progress
        self.measure = ""
        self.points: dict[PolicyConfig, float] = {}

    def __call__(self, config: PolicyConfig) -> float:
        assert self.data is not None
        if config not in self.points:
            figures = evaluate(
                self.model.with_config(policy=config, execution=self.execution),
                self.data,
                limit=self.limit,
                skip_failures=True,
                console=self.progress,
                title="evaluating",
            )
            self.measure = task_of(self.model.config).headline(figures)
            self.points[config] = 100 * figures[self.measure]
        return self.points[config]

    def known(self, outcome: Outcome) -> Callable[[PolicyConfig], dict[str, float]]:
        """The accuracy of a policy by its name, after that of the dense model and of the chosen policy is measured."""
        if self.data is not None:
            for config in (DENSE, outcome.setup.policy):
                self(config)
        return lambda config: {self.measure: round(self.points[config], 3)} if config in self.points else {}


def figures_of(
    workload: Workload, goal: Goal, outcome: Outcome, accuracy: Callable[[PolicyConfig], dict[str, float]]
) -> dict[str, Any]:
    """What `tune` returns about the policies, see there."""
    chosen, setup = outcome.chosen, outcome.setup

    def row(config: PolicyConfig, times: Sequence[float]) -> dict[str, Any]:
        cost = workload.cost(config)
        return {
            "gflops": round(cost.gflops, 6),
            "keep": [round(share, 4) for share in cost.shares.double().mean(1).tolist()],
            **(median_and_p95("ms", times, digits=3) if times else {}),
            **accuracy(config),
        }

    def candidate_row(candidate: Candidate) -> dict[str, Any]:
        times = candidate.times
        return {
            "mode": candidate.name,
            "execution": to_json(candidate.execution),
            "settings": workload.policy(candidate.found.config).settings(),
            **row(candidate.found.config, times.other),
            "speedup": times.ratio.to_json() if times.other else None,
            "dials": len(candidate.variant.dials),
            "blocks": [t.to_json(dense=t.blocks.start in candidate.dense) for t in candidate.timings],
            "tried": list(candidate.found.tried),
            "chosen": candidate is chosen,
        }

    why = outcome.why
    if outcome.candidates and not any(c.variant.dials for c in outcome.candidates):
        why += f"; the policy {kind_of(workload.model.config.policy)!r} has no dial, and ran as it is configured"
    tuned = row(setup.policy, outcome.times.other)
    return {
        "tokens": round(workload.cost(DENSE).tokens),
        "target": _target(goal, tuned),
        "policy": kind_of(setup.policy),
        "mode": RunMode("dense", setup.execution).name if chosen is None else chosen.name,
        "execution": to_json(setup.execution),
        "why": why,
        **{name: row(DENSE, times) for name, times in zip(DENSE_MODES, outcome.times.dense, strict=False)},
        "tuned": tuned,
        "speedup": {**outcome.times.ratio.to_json(), "pairs": len(outcome.times.other)},
        "settings": to_json(setup.policy),
        "candidates": [candidate_row(candidate) for candidate in outcome.candidates],
    }


def _target(goal: Goal, tuned: dict[str, Any]) -> dict[str, Any] | None:
    """The target that was given, and whether it is met."""
    given = {name: value for name, value in vars(goal).items() if value is not None}
    met = True
    if goal.target_gflops is not None:
        met = tuned["gflops"] <= goal.target_gflops * (1 + MaxGFLOPs.tolerance)
    if goal.target_ms is not None:
        met = tuned["ms"] <= goal.target_ms * (1 + 2 * MaxMilliseconds.tolerance)
    return {**given, "met": met} if given else None


def show(figures: dict[str, Any]) -> None:
    """Print the table, and what was written and why."""
    console = terminal.console(stderr=False)
    console.print(table_of(figures))
    written = f"{figures['out']}: {figures['policy']}, {figures['mode']}; {figures['why']}"
    console.print(written, soft_wrap=True)
    if figures["execution"]["compiled"]:
        console.print(
            "it is compiled when it first sees a size; sievit.load(..., compile=False) leaves that out", soft_wrap=True
        )
    if figures["target"] is not None and not figures["target"]["met"]:
        console.print("the target was missed", soft_wrap=True)


def table_of(figures: dict[str, Any]) -> Table:
    """The dense model, every policy that was tried, and which of them was written."""
    size = "own sizes" if figures["size"] is None else "{}x{}".format(*figures["size"])
    title = (
        f"{figures['images']} images, {size}, {figures['tokens']} tokens, batch {figures['batch_size']}, "
        f"{figures['device']}, {figures['precision']}"
    )
    measure = next((name for name in figures["dense"] if name not in ("gflops", "keep", "ms", "ms_p95")), None)
    table = Table(title=title, title_justify="left", box=SIMPLE, collapse_padding=True)
    for heading in ("", "GFLOPs", "ms", "speed-up", "keep", "dense blocks", *([measure] if measure else [])):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    denses = [{"mode": name, **figures[name]} for name in DENSE_MODES if name in figures]
    for row in [*({**row, "chosen": row["mode"] == figures["mode"]} for row in denses), *figures["candidates"]]:
        table.add_row(*_cells(row, measure), style="bold" if row["chosen"] else None)
    return table


def _cells(row: dict[str, Any], measure: str | None) -> list[str]:
    speedup = row.get("speedup")
    low, high = speedup["quartiles"] if speedup else (0, 0)
    dense = ["-".join(map(str, dict.fromkeys(each["blocks"]))) for each in row.get("blocks", ()) if each["dense"]]
    cells = [
        f"{row['mode']} *" if row["chosen"] else row["mode"],
        f"{row['gflops']:.2f}",
        f"{row['ms']:.1f}" if "ms" in row else "-",
        f"{speedup['median']:.2f} ({low:.2f} to {high:.2f})" if speedup else "",
        f"{sum(row['keep']) / len(row['keep']):.0%}",
        " ".join(dense),
    ]
    return cells if measure is None else [*cells, f"{row[measure]:.2f}" if measure in row else "-"]
