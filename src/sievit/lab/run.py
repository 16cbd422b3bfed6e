"""`sievit ablate`: the runs of a plan, each once, by as many processes as there are."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sievit import terminal
from sievit.config import ConfigError, Count, Natural, NonNegative, Positive, Seed, to_json
from sievit.devices import device_name, pick_device
from sievit.engine.batches import Batch, EpochBatches, Losses, training_loader
from sievit.engine.bootstrap import drawn
from sievit.engine.evaluate import evaluate, timed
from sievit.engine.initial import start_from
from sievit.engine.optim import freeze as freeze_blocks
from sievit.engine.recipe import Recipe, open_data
from sievit.engine.train import train
from sievit.files import HeldError, digest, held, write_atomically
from sievit.lab.corruptions import corrupting
from sievit.lab.plan import DENSE, START, Variant, checked, find_plan, known_plans
from sievit.lab.table import Results, printed, written
from sievit.measure.clock import clocked, in_turns, median_and_p95
from sievit.models.base import Model
from sievit.models.build import build, load, model_file, read
from sievit.policies import KeepAllConfig
from sievit.recipes import recipe as find_recipe
from sievit.tasks import task_of
from sievit.text import read_json


def ablate(
    plan: str | None = None,
    /,
    *,
    dense: Path | None = None,
    recipe: str = "facade_setr",
    out: Path | None = None,
    steps: Count | None = None,
    lr: Positive | None = None,
    distill: NonNegative = 2.0,
    freeze: Natural | None = None,
    seeds: tuple[Seed, ...] = (0,),
    only: tuple[str, ...] = (),
    index: Natural = 0,
    of: Count = 1,
    limit: Count | None = None,
    timed_images: Natural = 16,
    data_root: Path | None = None,
    threads: Count | None = None,
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """Train and compare the variants of a plan: table, JSON, CSV and plots; without a plan, list those that ship.

    Stopped, it goes on where it was. Several processes, on this and other machines, may work in one folder: each does
    the runs that no other does, or with --index I --of N every N-th one. Whoever finds all runs done times the models
    in turns and writes the table. The last line of the output is one JSON object.

    Args:
        plan: name of a plan, or my_package.module:function, one of your own.
        dense: the dense model whose weights every training starts from: checkpoint, folder of a run, or name.
        recipe: data and training of the variants: name or .json file of a dense recipe of the same kind of model.
        out: folder of everything; by default runs/ and the name of the plan.
        steps: of each training; by default the recipe's.
        lr: rate of each training; by default half of the recipe's.
        distill: weight of the loss that holds the features of a variant to the dense model's (`train.distill`).
        freeze: so many first blocks keep the weights of the dense model; by default three.
        seeds: of the trainings, each variant with each.
        only: variants to run, instead of all of the plan.
        index: this process does the runs index, index + of, index + 2 of, ...
        of: number of processes.
        limit: evaluate on the first so many images.
        timed_images: so many images are timed, by all models in turns.
        data_root: folder of the data sets; default the recipe's, else the environment's SIEVIT_DATA, else
            ../shared/data.
        threads: CPU threads of this process.
        dry_run: list the runs with their cost and the hours that they would take here, and do nothing.
    """
    if plan is None:
        for name, each in known_plans().items():
            print(f"  {name:<12} {(each.__doc__ or '').strip().partition(chr(10))[0]}")
        return None
    if dense is None:
        raise ConfigError("which dense model do the variants start from? Give --dense CHECKPOINT")
    if index >= of:
        raise ConfigError(f"--index {index} is one of 0 to {of - 1}, for --of {of}")
    if threads:
        torch.set_num_threads(threads)
    console = terminal.console()
    base = _base(find_recipe(recipe), model_file(dense))
    changes: dict[str, Any] = {"distill": distill, "freeze": 3 if freeze is None else freeze or "none"}
    changes |= {"lr": base.train.lr / 2 if lr is None else lr, "threads": threads}
    changes |= {} if steps is None else {"steps": steps}
    base = replace(base, train=replace(base.train, **changes))
    if data_root is not None:
        base = replace(base, data=replace(base.data, root=data_root))
    variants = _chosen(checked(find_plan(plan)(base)), only)
    jobs = [_Job(variant, seed) for seed in seeds for variant in variants if variant.weights is None]
    lab = _Lab(out or Path("runs") / plan.rpartition(":")[2], model_file(dense), variants, limit, console)
    if dry_run:
        return lab.estimate(jobs, seeds)
    for job in jobs[index::of]:
        lab.run(job)
    for seed in seeds:
        lab.evaluate_start(seed)
    return lab.finish(seeds, timed_images)


def _base(recipe: Recipe, dense: Path) -> Recipe:
    """The recipe with the model of the checkpoint, densely, whose training starts from it."""
    config, _ = read(dense)
    if type(config) is not type(recipe.model):
        raise ConfigError(f"{dense} is another kind of model than that of the recipe; give another --recipe")
    given = replace(config, policy=KeepAllConfig(), execution=type(config.execution)())
    train = replace(recipe.train, init_from=dense, vit_from=None, val_every=10**6, val_images=0)
    return replace(recipe, model=given, train=train)


def _chosen(variants: list[Variant], only: Sequence[str]) -> list[Variant]:
    """Those that are asked for, the control always."""
    names = [variant.name for variant in variants]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only {name}: the plan has {', '.join(names)}")
    wanted = {DENSE, *only} if only else set(names)
    wanted |= {variant.weights for variant in variants if variant.name in wanted and variant.weights}
    return [variant for variant in variants if variant.name in wanted]


@dataclass(frozen=True)
class _Job:
    """A training."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return _run_name(self.variant.name, self.seed)


def _run_name(variant: str, seed: int) -> str:
    return f"{variant}-{seed}"


class _Lab:
    """The folder of a plan: a folder for each training, and a file for the figures of each variant and seed."""

    def __init__(self, out: Path, dense: Path, variants: list[Variant], limit: int | None, console: Console) -> None:
        self.out, self.dense, self.variants, self.limit, self.console = out, dense, variants, limit, console
        self.start = digest(dense)

    def run(self, job: _Job) -> None:
        """Train and evaluate, unless it is done already or another process is at it."""
        rows = [job.variant, *(v for v in self.variants if v.weights == job.variant.name)]
        missing = [row for row in rows if not self._has(row, job.seed)]
        if not missing:
            return
        try:
            with held(self.out / "claims" / job.name):
                self._train(job)
                for row in missing:
                    if not self._has(row, job.seed):
                        self._evaluate(row, job.seed, self._folder(job) / "best.safetensors")
        except HeldError:
            self.console.print(f"{job.name}: another process is at it", soft_wrap=True)

    def evaluate_start(self, seed: int) -> None:
        """The variants that take the weights as they are."""
        for row in (v for v in self.variants if v.weights == START and not self._has(v, seed)):
            with suppress(HeldError), held(self.out / "claims" / _run_name(row.name, seed)):
                self._evaluate(row, seed, self.dense)

    def _folder(self, job: _Job) -> Path:
        return self.out / "trainings" / job.name

    def _train(self, job: _Job) -> None:
        folder = self._folder(job)
        if (folder / "metrics.json").is_file():
            return
        resume = (folder / "state.pt").is_file()
        if not resume and (folder / "recipe.json").is_file():
            (folder / "recipe.json").unlink()  # killed before its first state was saved
        recipe = job.variant.recipe
        recipe = replace(recipe, train=replace(recipe.train, seed=job.seed))
        self.console.print(f"{job.name}: {recipe.train.steps or recipe.train.epochs} steps or epochs", soft_wrap=True)
        train(None if resume else recipe, out=folder, resume=resume, console=self.console)

    def _path(self, variant: str, seed: int) -> Path:
        return self.out / "figures" / f"{_run_name(variant, seed)}.json"

    def _has(self, row: Variant, seed: int) -> bool:
        """Whether the figures are there.

        Raises:
            ConfigError: they are of another variant of this name, or of other weights.
        """
        path = self._path(row.name, seed)
        if not path.is_file():
            return False
        known = read_json(path)
        now = self._settings(row)
        for name, value in now.items():
            if known["settings"].get(name) != value:
                raise ConfigError(f"{path}: was made with another {name}; give another --out, or delete the file")
        return True

    def _settings(self, row: Variant) -> dict[str, Any]:
        """What figures depend on."""
        recipe = to_json(row.recipe)
        for name in ("threads", "init_from", "seed"):
            recipe["train"].pop(name, None)
        recipe["data"].pop("root", None)
        settings = {"recipe": recipe, "weights": row.weights, "start": self.start, "limit": self.limit}
        return settings if row.corruption is None else {**settings, "corruption": list(row.corruption)}

    def _evaluate(self, row: Variant, seed: int, weights: Path) -> None:
        model = self._model(row, weights)
        _, data = open_data(row.recipe)
        if row.corruption is not None:
            data.transform = corrupting(*row.corruption)
        metric = task_of(model.config).metric(data)
        precision = row.recipe.train.precision if row.recipe.train.precision == "bf16-mixed" else "32-true"
        options: dict[str, Any] = {"limit": self.limit, "console": self.console, "title": row.name}
        figures = evaluate(model, data, precision=precision, metric=metric, **options)
        resampled = metric.resampled(drawn(figures["images"]))
        spread = {name: [round(float(x), 6) for x in values] for name, values in resampled.items()}
        content = {"variant": row.name, "seed": seed, "figures": figures, "resampled": spread}
        content["settings"] = self._settings(row)
        path = self._path(row.name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content) + "\n").encode())
        headline = task_of(model.config).headline(figures)
        text = f"{headline} {figures[headline]:.4f}, {figures['gflops']:.1f} GFLOPs"
        self.console.print(f"{_run_name(row.name, seed)}: {text}", soft_wrap=True)

    def _model(self, row: Variant, weights: Path) -> Model:
        model = load(weights, policy=row.recipe.model.policy, device=pick_device("auto"))
        return model.with_config(input=row.recipe.model.input)

    def _weights(self, row: Variant, seed: int) -> Path:
        if row.weights == START:
            return self.dense
        return self.out / "trainings" / _run_name(row.weights or row.name, seed) / "best.safetensors"

    def finish(self, seeds: Sequence[int], timed_images: int) -> dict[str, Any]:
        """The table of what there is; of everything, the models are timed too."""
        there = [(row, seed) for row in self.variants for seed in seeds if self._has(row, seed)]
        results = Results(self.out, task_of(self.variants[0].recipe.model))
        for row, seed in there:
            results.add(row.name, row.curve, seed, read_json(self._path(row.name, seed)))
        missing = len(self.variants) * len(seeds) - len(there)
        if missing:
            self.console.print(f"{missing} of {len(self.variants) * len(seeds)} runs are not done yet", soft_wrap=True)
        else:
            with held(self.out / "claims" / "times"):
                results.times = self._times(seeds[0], timed_images)
        written(results, device=device_name(pick_device("auto")))
        terminal.console(stderr=False).print(printed(results))
        return results.content()

    def _times(self, seed: int, count: int) -> dict[str, dict[str, float]]:
        """Milliseconds of all variants on the same images, in turns."""
        path = self.out / "times.json"
        names, digests = [row.name for row in self.variants], [digest(self._weights(r, seed)) for r in self.variants]
        made = {"names": names, "weights": digests, "images": count}
        if path.is_file() and (known := read_json(path))["made"] == made:
            return known["times"]
        if not count:
            return {}
        models = [self._model(row, self._weights(row, seed)) for row in self.variants]
        _, data = open_data(self.variants[0].recipe)
        images = [[data[i][0]] for i in range(min(count, len(data)))]
        calls = [partial(timed, model) for model in models]
        for call in calls:
            call(images[0])
        taken = in_turns(calls, terminal.track(images, "timing", console=self.console), lambda _, call: call()[::-1])
        columns = [[elapsed for elapsed, _ in of_call] for of_call in taken]
        slow = columns[names.index(DENSE)]
        times = {}
        for name, fast in zip(names, columns, strict=True):
            ratios = np.array(slow) / np.array(fast)
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            speedup = {"speedup": round(float(middle), 3), "speedup_low": round(float(low), 3)}
            times[name] = {**median_and_p95("ms", fast), **speedup, "speedup_high": round(float(high), 3)}
        write_atomically(path, (json.dumps({"made": made, "times": times}, indent=1) + "\n").encode())
        return times

    def estimate(self, jobs: list[_Job], seeds: Sequence[int]) -> dict[str, Any]:
        """The runs, with the GFLOPs of the first image with the weights that they start from, and hours by the time of
        two dense steps and one dense image, in proportion."""
        control = self.variants[0]
        dense = self._model(control, self.dense)
        _, data = open_data(control.recipe)
        image = data[0][0]
        pass_ms, answer = clocked(lambda: timed(dense, [image])[0], dense.device)
        full = float(dense.gflops(answer)[0])
        step = self._seconds_per_step(control.recipe)
        rows, total = [], 0.0
        for row in self.variants:
            model = self._start_model(row)
            cost = float(model.gflops(timed(model, [image])[0])[0])
            images = len(data) if self.limit is None else min(self.limit, len(data))
            seconds = images * pass_ms / 1e3 * cost / full
            if row.weights is None:
                steps = _steps(row.recipe, self)
                seconds += steps * step * (0.5 + 0.5 * cost / full) + seconds
            todo = [seed for seed in seeds if not self._has(row, seed)]
            hours = round(seconds * len(todo) / 3600, 3)
            total += hours
            rows.append({"variant": row.name, "gflops": round(cost, 2), "runs": len(todo), "hours": hours})
            self.console.print(f"  {row.name:<22} {cost:7.1f} GFLOPs  {len(todo)} runs  {hours:6.2f} h", soft_wrap=True)
        self.console.print(f"{len(jobs)} trainings, {total:.1f} hours of one process here", soft_wrap=True)
        return {"runs": rows, "hours": round(total, 2)}

    def _start_model(self, row: Variant) -> Model:
        """The model of a variant with the weights that it starts from; those of its policy are random."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(row.recipe.model)
        start_from(model, self.dense)
        return model.eval()

    def _seconds_per_step(self, recipe: Recipe) -> float:
        train_set, _ = open_data(recipe)
        losses = Losses(self._start_model(self.variants[0]).train())
        freeze_blocks(losses.model.vit, recipe.train.freeze)
        loader = training_loader(train_set, EpochBatches(len(train_set), recipe.train, rank=0, processes=1))
        images, targets = next(iter(loader))
        taken = []
        for _ in range(2):
            began = time.monotonic()
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16-mixed"):
                total = torch.stack(list(losses(Batch(images, targets, torch.device("cpu")))[0].values())).sum()
            total.backward()
            taken.append(time.monotonic() - began)
        return min(taken)


def _steps(recipe: Recipe, lab: _Lab) -> int:
    if recipe.train.steps:
        return recipe.train.steps
    train_set, _ = open_data(recipe)
    return recipe.train.epochs * (len(train_set) // recipe.train.batch_size)
