"""`sievit ablate`: the runs of a plan, each once, by as many processes as there are."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sievit import terminal
from sievit.config import Config, ConfigError, Count, Natural, NonNegative, Positive, Seed, Share, from_json, to_json
from sievit.data.dataset import ImageDataset
from sievit.devices import device_name, pick_device
from sievit.engine.batches import Batch, EpochBatches, Losses, training_loader
from sievit.engine.bootstrap import drawn
from sievit.engine.evaluate import evaluate, timed, timed_in_turns
from sievit.engine.initial import dense_teacher, start_from
from sievit.engine.optim import freeze, total_steps
from sievit.engine.recipe import Recipe, TrainConfig, open_data
from sievit.engine.train import train
from sievit.files import HeldError, digest, held, write_json
from sievit.lab.corruptions import corrupting
from sievit.lab.cost import at_costs, turned
from sievit.lab.plan import DENSE, START, Variant, checked
from sievit.lab.plans import PLANS, find_plan
from sievit.lab.table import Results, printed, written
from sievit.measure.clock import Quartiles, clocked, median_and_p95
from sievit.models.base import Model
from sievit.models.build import build, load, model_file, read
from sievit.policies import KeepAllConfig, PolicyConfig
from sievit.recipes import recipe as find_recipe
from sievit.tasks import task_of
from sievit.text import first_line, read_json
from sievit.vit import Execution


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Config):
    """How every variant is trained, the dense control too.

    Attributes:
        steps: of each training; by default the recipe's.
        lr: rate of each training; by default half of the recipe's.
        distill: weight of the loss that holds the features of a variant to the dense model's (`train.distill`).
        freeze: so many first blocks keep the weights of the dense model.
        threads: CPU threads of this process.
    """

    steps: Count | None = None
    lr: Positive | None = None
    distill: NonNegative = 2.0
    freeze: Natural = 3
    threads: Count | None = None

    def of(self, train: TrainConfig) -> TrainConfig:
        """The training of a recipe with these options."""
        return replace(
            train,
            steps=train.steps if self.steps is None else self.steps,
            lr=train.lr / 2 if self.lr is None else self.lr,
            distill=self.distill,
            freeze=self.freeze or "none",
            threads=self.threads,
        )


def ablate(
    plan: str | None = None,
    /,
    *,
    dense: Path | None = None,
    recipe: str = "facade_setr",
    training: TrainingOptions = TrainingOptions(),
    out: Path | None = None,
    seeds: tuple[Seed, ...] = (0,),
    only: tuple[str, ...] = (),
    at: tuple[Share, ...] = (),
    against: str | None = None,
    index: Natural = 0,
    of: Count = 1,
    limit: Count | None = None,
    timed_images: Natural = 16,
    data_root: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """Train and compare the variants of a plan: table, JSON, CSV and plots; without a plan, list those that ship.

    Stopped, it goes on where it was. Several processes, on this and other machines, may work in one folder: each does
    the runs that no other does, or with --index I --of N every N-th one. Whoever finds all runs done times the models
    in turns and writes the table. The last line of the output is one JSON object.

    Args:
        plan: name of a plan, or my_package.module:function, one of your own; several are joined by +, as in
            preserve+gate, and what they have in common is run once.
        dense: the dense model whose weights every training starts from: checkpoint, folder of a run, or name.
        recipe: data and training of the variants: name or .json file of a dense recipe of the same kind of model.
        training: options of all trainings.
        out: folder of everything; by default runs/ and the name of the plan.
        seeds: of the trainings, each variant with each.
        only: variants to run, instead of all of the plan.
        at: run each trained policy that has a dial at these shares of the dense model's GFLOPs too, for a comparison
            at equal cost; the dial is turned on 16 images of train.
        against: a variant that all others are compared with, besides the dense model.
        index: this process does the runs index, index + of, index + 2 of, ...
        of: number of processes.
        limit: evaluate on the first so many images.
        timed_images: so many images are timed, by all models in turns.
        data_root: folder of the data sets; default the recipe's, else the environment's SIEVIT_DATA, else
            ../shared/data.
        dry_run: list the runs with their cost and the hours that they would take here, and do nothing.
    """
    if plan is None:
        print("\n".join(f"  {name:<12} {first_line(each)}" for name, each in PLANS.items()))
        return None
    if dense is None:
        raise ConfigError("which dense model do the variants start from? Give --dense CHECKPOINT")
    if index >= of:
        raise ConfigError(f"--index {index} is one of 0 to {of - 1}, for --of {of}")
    if training.threads:
        torch.set_num_threads(training.threads)
    base = _base(find_recipe(recipe), model_file(dense), training, data_root)
    variants = at_costs(_chosen(checked(find_plan(plan)(base)), only), at)
    if against not in (None, *(variant.name for variant in variants)):
        raise ConfigError(f"--against {against}: the plan has {', '.join(variant.name for variant in variants)}")
    lab = _Lab(out or Path("runs") / plan.rpartition(":")[2], base, variants, limit)
    if dry_run:
        return lab.estimate(seeds)
    for job in lab.jobs(seeds)[index::of]:
        lab.run(job)
    for seed in seeds:
        lab.evaluate_start(seed)
    return lab.finish(seeds, timed_images, against)


def _base(recipe: Recipe, dense: Path, training: TrainingOptions, data_root: Path | None) -> Recipe:
    """The recipe with the model of the checkpoint, densely, whose training starts from it."""
    config, _ = read(dense)
    if type(config) is not type(recipe.model):
        raise ConfigError(f"{dense} is another kind of model than that of the recipe; give another --recipe")
    model = replace(config, policy=KeepAllConfig(), execution=Execution())
    train = replace(training.of(recipe.train), init_from=dense, vit_from=None, val_images=0)
    data = recipe.data if data_root is None else replace(recipe.data, root=data_root)
    return replace(recipe, model=model, data=data, train=train)


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

    def __init__(self, out: Path, base: Recipe, variants: list[Variant], limit: int | None) -> None:
        assert base.train.init_from is not None
        self.out, self.dense, self.variants, self.limit = out, base.train.init_from, variants, limit
        self.console, self.device = terminal.console(), pick_device("auto")
        self.start = digest(self.dense)

    def jobs(self, seeds: Sequence[int]) -> list[_Job]:
        """All trainings."""
        return [_Job(variant, seed) for seed in seeds for variant in self.variants if variant.weights is None]

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
        corruption = row.corruption and list(row.corruption)
        return {
            "recipe": recipe,
            "weights": row.weights,
            "corruption": corruption,
            "cost": row.cost,
            "start": self.start,
            "limit": self.limit,
        }

    def _evaluate(self, row: Variant, seed: int, weights: Path) -> None:
        model = self._model(row, weights)
        if row.cost is not None:
            model = model.with_config(policy=turned(model, row.recipe, row.cost))
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
        content |= {"settings": self._settings(row), "policy": to_json(model.config.policy)}
        path = self._path(row.name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content, indent=None)
        headline = task_of(model.config).headline(figures)
        text = f"{headline} {figures[headline]:.4f}, {figures['gflops']:.1f} GFLOPs"
        self.console.print(f"{_run_name(row.name, seed)}: {text}", soft_wrap=True)

    def _model(self, row: Variant, weights: Path) -> Model:
        model = load(weights, policy=row.recipe.model.policy, device=self.device)
        return model.with_config(input=row.recipe.model.input)

    def _evaluated(self, row: Variant, seed: int) -> Model:
        """The model of figures that are there, with its dial as it was turned for them."""
        model, path = self._model(row, self._weights(row, seed)), self._path(row.name, seed)
        if row.cost is None:
            return model
        return model.with_config(policy=from_json(PolicyConfig, read_json(path)["policy"], where=str(path)))

    def _weights(self, row: Variant, seed: int) -> Path:
        if row.weights == START:
            return self.dense
        return self.out / "trainings" / _run_name(row.weights or row.name, seed) / "best.safetensors"

    def finish(self, seeds: Sequence[int], timed_images: int, against: str | None) -> dict[str, Any]:
        """The table of what there is; of everything, the models are timed too."""
        there = [(row, seed) for row in self.variants for seed in seeds if self._has(row, seed)]
        results = Results(self.out, task_of(self.variants[0].recipe.model), against)
        for row, seed in there:
            results.add(row.name, row.curve, seed, read_json(self._path(row.name, seed)))
        missing = len(self.variants) * len(seeds) - len(there)
        if missing:
            self.console.print(f"{missing} of {len(self.variants) * len(seeds)} runs are not done yet", soft_wrap=True)
        else:
            with held(self.out / "claims" / "times"):
                results.times = self._times(seeds[0], timed_images)
        written(results, device=device_name(self.device))
        for table in printed(results):
            terminal.console(stderr=False).print(table)
        return results.content()

    def _times(self, seed: int, count: int) -> dict[str, dict[str, float]]:
        """Milliseconds of all variants on the same images, in turns; on corrupted images no model is timed again."""
        path, timed_rows = self.out / "times.json", [row for row in self.variants if row.corruption is None]
        names, digests = [row.name for row in timed_rows], [digest(self._weights(r, seed)) for r in timed_rows]
        made = {"names": names, "weights": digests, "images": count}
        if path.is_file() and (known := read_json(path))["made"] == made:
            return known["times"]
        if not count:
            return {}
        models = [self._evaluated(row, seed) for row in timed_rows]
        _, data = open_data(self.variants[0].recipe)
        images = [data[i][0] for i in range(min(count, len(data)))]
        taken = timed_in_turns(models, images, console=self.console)
        columns = [[elapsed for elapsed, _ in of_model] for of_model in taken]
        times = {}
        for name, fast in zip(names, columns, strict=True):
            speedup = Quartiles.of_ratios(columns[names.index(DENSE)], fast).to_json()
            times[name] = median_and_p95("ms", fast) | {
                "speedup": speedup["median"],
                "speedup_quartiles": speedup["quartiles"],
            }
        write_json(path, {"made": made, "times": times})
        return times

    def estimate(self, seeds: Sequence[int]) -> dict[str, Any]:
        """The runs, with the GFLOPs of the first image with the weights that they start from, and hours by the time of
        two dense steps and one dense image, in proportion."""
        control = self.variants[0].recipe
        train_set, data = open_data(control)
        image, number = data[0][0], len(data) if self.limit is None else min(self.limit, len(data))
        dense = self._start_model(self.variants[0])
        answer, pass_ms = timed(dense, [image])
        full = float(dense.gflops(answer)[0])
        step = self._seconds_per_step(control, train_set)
        costs = {control.model: full}
        rows: list[dict[str, Any]] = []
        for row in self.variants:
            if row.recipe.model not in costs:
                model = self._start_model(row)
                costs[row.recipe.model] = float(model.gflops(timed(model, [image])[0])[0])
            cost = full * row.cost if row.cost is not None else costs[row.recipe.model]
            seconds = number * pass_ms / 1e3 * cost / full
            if row.weights is None:
                steps = total_steps(row.recipe.train, len(train_set) // row.recipe.train.batch_size)
                seconds += steps * step * (0.5 + 0.5 * cost / full)
            todo = sum(not self._has(row, seed) for seed in seeds)
            hours = round(seconds * todo / 3600, 3)
            rows.append({"variant": row.name, "gflops": round(cost, 2), "runs": todo, "hours": hours})
            self.console.print(f"  {row.name:<22} {cost:7.1f} GFLOPs  {todo} runs  {hours:6.2f} h", soft_wrap=True)
        total, trainings = round(sum(row["hours"] for row in rows), 2), len(self.jobs(seeds))
        self.console.print(f"{trainings} trainings, {total:.1f} hours of one process here", soft_wrap=True)
        return {"runs": rows, "hours": total}

    def _start_model(self, row: Variant) -> Model:
        """The model of a variant with the weights that it starts from; those of its policy are random."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(row.recipe.model)
        start_from(model, self.dense)
        return model.eval().to(self.device)

    def _seconds_per_step(self, recipe: Recipe, train_set: ImageDataset) -> float:
        """The shorter of two steps, without the update of the weights."""
        model = self._start_model(self.variants[0]).train()
        freeze(model, recipe.train.freeze)
        losses = Losses(model, dense_teacher(model.policy, recipe.train, self.device), recipe.train.distill)
        batches = EpochBatches(len(train_set), recipe.train, rank=0, processes=1)
        batch = Batch(*next(iter(training_loader(train_set, batches))), self.device)

        def step() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16-mixed"):
                total = torch.stack(list(losses(batch)[0].values())).sum()
            total.backward()

        return min(clocked(step, self.device)[0] for _ in range(2)) / 1e3
