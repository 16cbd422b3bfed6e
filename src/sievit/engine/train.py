"""The training loop."""

import json
import math
import resource
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from rich.console import Console

from sievit import terminal
from sievit.config import ConfigError
from sievit.data.dataset import ImageDataset
from sievit.distributed import gathered, world_size
from sievit.engine.batches import Batch, EpochBatches, Losses, Samples, grouped, loading, training_loader
from sievit.engine.checkpoint import CsvLog, RunFolder, reading
from sievit.engine.evaluate import evaluate
from sievit.engine.initial import dense_teacher, new_model, start_from, start_vit_from, timm_name
from sievit.engine.launch import launched, slow_bfloat16
from sievit.engine.optim import Average, build_optimizer, freeze, learning_rate, set_learning_rate, total_steps
from sievit.engine.recipe import Recipe, default_data_root, open_data, with_own_classes
from sievit.engine.signals import Interrupted, Stop, stopping
from sievit.files import held, remove_parts, write_json
from sievit.hub.fetch import HUB, model_file
from sievit.models.build import read, save
from sievit.tasks import task_of


def train(
    recipe: Recipe | None,
    *,
    out: Path,
    resume: bool = False,
    name: str | None = None,
    console: Console | None = None,
) -> dict:
    """Train a model, and return the figures of the best one, as in metrics.json.

    Args:
        recipe: None with `resume`, for the folder holds it.
        out: folder of the run.
        resume: go on with the run in `out`, exactly where its last state was saved.
        name: of the recipe that the run is started with; with `resume`, the one that it has to have been.

    Raises:
        ConfigError: the folder holds another run or none, another process trains there, the data does not fit the
            model, or was changed since the run was started.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        OSError: a file cannot be written, on a full disk for example; the last saved state is whole.
    """
    console = console or terminal.console()
    folder = RunFolder(out)
    if resume:
        recipe = folder.recipe()
    else:
        assert recipe is not None
        recipe = _resolved(recipe)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    fabric, ours = launched(recipe.train), not dist.is_initialized()
    fabric.launch()
    with held(out) if fabric.is_global_zero else nullcontext(), stopping(f"--resume {out}") as stop:
        try:
            return _started(recipe, folder, fabric, console, resume=resume, name=name).loop(stop)
        except RuntimeError as error:  # a signal to all processes takes the workers that load images with it
            if stop.received:
                raise Interrupted(f"stopped; {stop.advice}") from error
            raise
        except OSError as error:
            text = f"{error.strerror or error}; when that is mended, go on with --resume {out}"
            raise OSError(error.errno, text, error.filename) from error
        finally:
            if ours and dist.is_initialized():
                dist.destroy_process_group()


def _started(
    recipe: Recipe, folder: RunFolder, fabric: Fabric, console: Console, *, resume: bool, name: str | None
) -> "_Run":
    """The run, of which nothing is written before everything is checked."""
    if fabric.is_global_zero:
        remove_parts(folder.path) if resume else folder.require_free()
    fabric.barrier()
    with fabric.rank_zero_first():
        train_set, val_set = open_data(recipe)
    data = {"training": train_set.fingerprint(), "validation": val_set.fingerprint()}
    if resume:
        folder.require_same(name, data)
    run = _Run(recipe, folder, fabric, train_set, val_set, console, state=folder.load_state() if resume else None)
    if fabric.is_global_zero:
        if not resume:
            folder.start(recipe, {"name": name, "data": data})
        run.open_logs()
    fabric.barrier()
    return run


def _resolved(recipe: Recipe) -> Recipe:
    """With the data's classes, and every path absolute, so that the run can be resumed from anywhere."""
    root, config = recipe.data.root or default_data_root(), recipe.train
    start = {}
    if config.init_from is not None and not str(config.init_from).startswith(HUB):
        start["init_from"] = model_file(config.init_from).resolve()
    if config.vit_from is not None and timm_name(config.vit_from) is None:
        start["vit_from"] = config.vit_from.resolve()
    recipe = replace(recipe, data=replace(recipe.data, root=root.resolve()), train=replace(config, **start))
    return with_own_classes(recipe)


PROGRESS = ("step", "validated", "logged", "sums", "best", "figures")
"""Attributes of a run that its state file holds."""


class _Run:
    """A run in progress: what the state file holds, and the loop that moves it forward."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        fabric: Fabric,
        train_set: ImageDataset,
        val_set: ImageDataset,
        console: Console,
        *,
        state: dict | None,
    ) -> None:
        config = recipe.train
        self.recipe, self.folder, self.fabric, self.console = recipe, folder, fabric, console
        self.train_set, self.val_set = train_set, val_set
        torch.manual_seed(config.seed)
        self.model = new_model(recipe.model)
        if state is None and config.vit_from is not None:
            start_vit_from(self.model.vit, config.vit_from)
        if state is None and config.init_from is not None:
            new = start_from(self.model, config.init_from)
            if new and fabric.is_global_zero:
                console.print(f"{config.init_from}: {len(new)} weights start new, such as {new[-1]}", soft_wrap=True)
        if config.freeze == "model" and config.init_from is None:
            raise ConfigError("train.freeze model would keep random weights; give train.init-from, a trained model")
        if config.freeze != "none" and config.vit_from is None and config.init_from is None:
            raise ConfigError("train.freeze would keep random weights; give train.vit-from or train.init-from")
        freeze(self.model, config.freeze)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(self.model, config)
        losses = Losses(self.model, dense_teacher(self.model.policy, config, fabric.device), config.distill)
        self.losses, self.optimizer = fabric.setup(losses, optimizer)
        self.average = Average(self.model, config.ema) if config.ema else None
        self.batches = EpochBatches(len(train_set), config, rank=fabric.global_rank, processes=fabric.world_size)
        self.loader = training_loader(train_set, self.batches)
        self.total = total_steps(config, self.batches.steps)
        if config.selected_after is not None and config.selected_after >= self.total:
            raise ConfigError(
                f"train.selected_after {config.selected_after}: the run has {self.total} steps; give fewer, or leave "
                "it out to mask to the end"
            )
        self.step = self.validated = self.logged = 0
        self.sums: dict[str, float] = {}
        self.best, self.figures = -math.inf, {}
        torch.manual_seed(config.seed + 1 + fabric.global_rank)
        if state is not None:
            with reading(folder.state_file):
                self._restore(state)
        self.log: CsvLog | None = None
        self.val_log: CsvLog | None = None

    def open_logs(self) -> None:
        """On the first process: go on with the rows up to the current step."""
        self.log = CsvLog(self.folder.log_file, step=self.step)
        self.val_log = CsvLog(self.folder.val_file, step=self.validated)
        counts = [sum(p.numel() for p in self.model.parameters() if p.requires_grad or every) for every in (0, 1)]
        self.console.print(f"{self.folder.path}: training {counts[0]:,} of {counts[1]:,} parameters", soft_wrap=True)
        if hint := slow_bfloat16(self.recipe.train, self.fabric.device):
            self.console.print(hint, soft_wrap=True)
        for remark in task_of(self.recipe.model).remarks(self.train_set):
            self.console.print(remark, soft_wrap=True)

    def loop(self, stop: Stop) -> dict:
        """Train to the last epoch, validating and saving on the way."""
        console = self.console if self.fabric.is_global_zero else None
        with terminal.Work("training", total=self.total, done=self.step, console=console) as work:
            while True:
                if self._validation_is_due():
                    with stop.at_once():  # the state was saved right before
                        self._validate()
                    self._save_state()
                if self.step == self.total:
                    break
                self._epoch(stop, lambda text: work.show(self.step, text))
                self._save_state()
            with stop.at_once():
                self._finish()
        if self.fabric.is_global_zero:
            self.console.print(f"{self.folder.path}: done, {json.dumps(self.figures)}", soft_wrap=True)
        return self.figures

    def _epoch(self, stop: Stop, show: Callable[[str], None]) -> None:
        """The rest of an epoch from the current step on."""
        config, steps = self.recipe.train, self.batches.steps
        epoch = self.step // steps
        self.batches.epoch, self.batches.start = epoch, self.step - epoch * steps
        self.train_set.set_epoch(epoch)
        self.losses.train()
        saved = clock = time.monotonic()
        timed_from = self.step
        for parts in grouped(loading(self.loader), config.accumulate):
            for name, value in self._step(parts).items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.step += 1
            if self.step % config.log_every == 0 or self.step % steps == 0 or self.step == self.total:
                seconds = (time.monotonic() - clock) / (self.step - timed_from)
                rate = config.batch_size / seconds
                row = {"step": self.step, "epoch": epoch, "images_per_s": rate, "s_per_step": seconds}
                row |= {name: value / (self.step - self.logged) for name, value in self.sums.items()}
                if self.log is not None:
                    self.log.write(row)
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                show(f"epoch {epoch}, loss {row['loss']:.3f}, {rate:.1f} images/s, {memory:.1f} GB")
                clock, timed_from, self.logged, self.sums = time.monotonic(), self.step, self.step, {}
            stopped, due = self._any(bool(stop.received), time.monotonic() - saved > 60 * config.save_every)
            if stopped or due:
                self._save_state()
                saved = time.monotonic()
            if stopped:
                raise Interrupted(f"stopped at step {self.step} of {self.total}; {stop.advice}")
            if self.step == self.total:
                return

    def _step(self, parts: tuple[Samples, ...]) -> dict[str, float]:
        """One update of the weights."""
        config = self.recipe.train
        rate = learning_rate(config, self.step, self.batches.steps)
        set_learning_rate(self.optimizer, rate)
        selected = config.selected_after is not None and self.step >= config.selected_after
        figures: dict[str, float] = {}
        for i, (images, targets) in enumerate(parts):
            with self.fabric.no_backward_sync(self.losses, enabled=i + 1 < len(parts)):
                losses, shares = self.losses(Batch(images, targets, self.fabric.device), selected=selected)
                loss = torch.stack(list(losses.values())).sum() / len(parts)
                self.fabric.backward(loss)
            values = {name: value.item() for name, value in losses.items()}
            values |= {f"keep_{block}": share for block, share in enumerate(shares.tolist())}
            for name, value in values.items():
                figures[name] = figures.get(name, 0.0) + value / len(parts)
        figures["loss"] = sum(value for name, value in figures.items() if not name.startswith("keep_"))
        self._require_finite("loss", figures["loss"])
        if config.clip_norm is not None:
            norm = self.fabric.clip_gradients(
                self.losses, self.optimizer, max_norm=config.clip_norm, error_if_nonfinite=False
            )
            figures["grad_norm"] = float(norm) if norm is not None else math.nan
            if config.precision != "16-mixed":  # where the loss scale is found by overflowing
                self._require_finite("norm of the gradients", figures["grad_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        return {**figures, "lr": rate}

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise ConfigError(
                f"the {name} is {value} at step {self.step}; lower train.lr, set train.clip-norm, or use "
                f"train.precision 32-true; the last good state is in {self.folder.path}"
            )

    def _validation_is_due(self) -> bool:
        config = self.recipe.train
        between = config.val_images != 0 and self.step % (self.batches.steps * config.val_every) == 0
        return self.validated != self.step and (self.step == self.total or between)

    def _validate(self) -> None:
        """Figures of the (averaged) weights, and the two model files."""
        started, epoch = time.monotonic(), (self.step - 1) // self.batches.steps
        with self._averaged():
            figures: dict[str, Any] = {"epoch": epoch, "step": self.step}
            task, score = task_of(self.recipe.model), float(self.step)
            if self.recipe.train.val_images != 0:
                figures |= self._figures(limit=self.recipe.train.val_images)
                score = figures[task.headline(figures)]
            better = score >= self.best
            if self.fabric.is_global_zero:
                save(self.model, self.folder.last_file)
                if better:
                    save(self.model, self.folder.best_file)
                    write_json(self.folder.metrics_file, figures)
        if self.val_log is not None and "images" in figures:
            self.val_log.write({name: value for name, value in figures.items() if not isinstance(value, list)})
            text = ", ".join(f"{name} {figures[name]:.4f}" for name in task.shown if name in figures)
            took = f"{time.monotonic() - started:.0f} s"
            self.console.print(f"epoch {epoch}: {text} on {figures['images']} images ({took})")
            if self.step == self.total and (hint := self.model.policy.hint(figures["keep"])):
                self.console.print(f"{hint}; --train.policy-lr is a factor on it", soft_wrap=True)
        if better:
            self.best, self.figures = score, figures
        self.validated = self.step

    def _finish(self) -> None:
        """The figures of the best model on all images, if it was chosen by some of them."""
        self.fabric.barrier()
        if "images" not in self.figures:
            return
        total, saved = len(self.val_set), self.folder.metrics()
        if saved["step"] == self.figures["step"] and saved["images"] == total:
            self.figures = saved
        if self.figures["images"] == total:
            return
        self.model.load_state_dict(read(self.folder.best_file)[1])
        chosen = {name: self.figures[name] for name in ("epoch", "step")}
        self.figures = {**chosen, **self._figures(limit=None)}
        if self.fabric.is_global_zero:
            write_json(self.folder.metrics_file, self.figures)

    def _figures(self, *, limit: int | None) -> dict:
        return evaluate(
            self.model,
            self.val_set,
            limit=limit,
            precision=self.recipe.train.precision if self.fabric.device.type == "cpu" else "32-true",
            console=self.console if self.fabric.is_global_zero and self.console.is_terminal else None,
            title="validating",
        )

    @contextmanager
    def _averaged(self) -> Generator[None]:
        """The model with its averaged weights."""
        if self.average is None:
            yield
            return
        latest = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.values)
        try:
            yield
        finally:
            self.model.load_state_dict(latest)

    def _any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether it is set in any process."""
        if world_size() == 1:
            return flags
        counts = torch.tensor(flags, dtype=torch.float32, device=self.fabric.device)
        dist.all_reduce(counts)
        return tuple(counts.bool().tolist())

    def _save_state(self) -> None:
        """Everything that the rest of the run depends on."""
        random = {"cpu": torch.get_rng_state()}
        if self.fabric.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.fabric.device)
        randoms = gathered(random)
        if self.fabric.is_global_zero:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "random": randoms,
            }
            self.folder.save_state(state | {name: getattr(self, name) for name in PROGRESS})
        self.fabric.barrier()

    def _restore(self, state: dict) -> None:
        """Go back to a saved state."""
        if len(state["random"]) != self.fabric.world_size:
            raise ConfigError(
                f"{self.folder.path}: was run by {len(state['random'])} processes; resume it with as many, "
                f"not {self.fabric.world_size}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.fabric.strategy.precision.load_state_dict(state.get("precision", {}))
        older = {"validated": state["step"], "logged": state["step"], "sums": {}}
        for name in PROGRESS:
            setattr(self, name, (older | state)[name])
        random = state["random"][self.fabric.global_rank]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.fabric.device)
