"""Tuning: what pays on this device, at this size and batch, and no more than the target allows."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sievit.bench.common import fitted
from sievit.bench.network import as_given
from sievit.config import ConfigError, kind_of, to_json
from sievit.data.coco import CocoDetection
from sievit.data.images import list_images, read_image, to_tensor
from sievit.data.labels import LabelDataset
from sievit.devices import device_name
from sievit.engine.evaluate import evaluate, headline
from sievit.files import write_atomically
from sievit.models.build import Model, model_file, read, save
from sievit.models.detector import Detector
from sievit.policies import PolicyConfig
from sievit.report import open_model
from sievit.report.detection import open_annotations
from sievit.report.semantic import LabelFiles, open_labels
from sievit.tune.goals import Aim, AsItIs, Drop, Milliseconds, Operations
from sievit.tune.kinds import kinds
from sievit.tune.options import Goal, Judged, Tuning
from sievit.tune.race import Outcome, candidates_of, denses_of, modes_of, run_race
from sievit.tune.subject import DENSE, Clock, Subject, wall_clock
from sievit.vit.execution import Execution

DENSES = ("dense", "dense_compiled")
"""What the dense model is called in reports, as it stands and compiled."""


@torch.inference_mode()
def tune(
    path: Path,
    images: Path,
    out: Path,
    *,
    goal: Goal = Goal(),  # noqa: B008
    judged: Judged = Judged(),  # noqa: B008
    tuning: Tuning = Tuning(),  # noqa: B008
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
        path: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
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
    if goal.max_drop is not None and judged.annotations is None and judged.labels is None:
        raise ConfigError("--max-drop needs annotated images: give --annotations (detector) or --labels (segmenter)")
    if out.resolve() == model_file(path).resolve():
        raise ConfigError(f"{out}: is the model that is tuned, which would be lost; give another --out")
    if tuning.compile and goal.target_ms is not None:
        raise ConfigError("--target-ms with --compile: each step of the dial would be compiled; give --target-gflops")
    own = open_model(path, policy=policy, device=device)
    execution = Execution(precision=tuning.precision)
    accuracy = _accuracy(own, images, judged, label_files, execution, console)
    pictures, failures = _pictures(images, tuning)
    if tuning.compile and len({picture.shape for picture in pictures}) > 1:
        raise ConfigError("--compile: the images are of several sizes, each compiled by itself; give --size")
    model = own if tuning.size is None else as_given(own)
    subject = Subject(model, _batches(pictures, tuning.batch_size), clock, console, execution)
    say = (lambda text: None) if console is None else lambda text: console.print(text, style="dim", highlight=False)
    say(f"{len(pictures)} images, counting")
    ways = kinds(subject, modes_of(subject, tuning), quantile=tuning.quantile, multiple=tuning.multiple)
    if tuning.compile:
        say("compiling the dense model")  # first, so that one that cannot be compiled is told of soon
        subject.warmed(denses_of(subject, tuning)[-1])
    aim = _aim(goal, subject, tuning, accuracy)
    candidates, why = candidates_of(subject, ways, aim, tuning, say)
    outcome = run_race(subject, candidates, aim, tuning, why, say)
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
    half = any(tensor.dtype == torch.float16 for tensor in read(model_file(path))[1].values())
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
