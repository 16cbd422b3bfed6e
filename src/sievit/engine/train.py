"""The training loop."""

import itertools
import json
import math
import os
import signal
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric, seed_everything
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from sievit.config import ConfigError
from sievit.data.coco import CocoDetection, collate
from sievit.distributed import world_size
from sievit.engine.checkpoint import CsvLog, RunFolder, write_json
from sievit.engine.evaluate import evaluate
from sievit.engine.optim import Average, build_optimizer, learning_rate, set_learning_rate
from sievit.engine.recipe import Recipe, TrainConfig, default_data_root, open_data
from sievit.model import POLICY_PREFIX, Detector, build, read, save


class Interrupted(KeyboardInterrupt):
    """A run was told to stop and has saved its state; the message says how to go on."""


class Batch:
    """Images and targets. Not a container that Fabric knows, for it would round boxes to the precision of training."""

    def __init__(self, images: list[Tensor], targets: list[dict[str, Any]], device: torch.device) -> None:
        self.images = [image.to(device) for image in images]
        self.targets = [
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in target.items()}
            for target in targets
        ]


class Losses(nn.Module):
    """What is trained: a batch to losses by name, and the kept share per block."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        output = self.model(batch.images, batch.targets)
        return output.losses, output.trace.shares().mean(1)


class EpochBatches(Sampler[list[int]]):
    """This process's part of each global batch: a seeded permutation per epoch, the incomplete last batch left out.

    The global batches are the same for any number of processes and parts, and `start` skips those that are done.
    """

    def __init__(self, length: int, config: TrainConfig, *, rank: int, processes: int) -> None:
        if config.batch_size % (processes * config.accumulate):
            raise ConfigError(
                f"train.batch_size {config.batch_size} does not split over {processes} processes and "
                f"{config.accumulate} accumulated parts"
            )
        if length < config.batch_size:
            raise ConfigError(f"train.batch_size {config.batch_size} is more than the {length} training images")
        self.length, self.config, self.rank, self.processes = length, config, rank, processes
        self.steps = length // config.batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return (self.steps - self.start) * self.config.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)[: self.steps * self.config.batch_size]
        parts = order.view(self.steps, self.config.accumulate, self.processes, -1)
        for step in range(self.start, self.steps):
            yield from parts[step, :, self.rank].tolist()


def train(recipe: Recipe | None, *, out: Path, resume: bool = False, console: Console | None = None) -> dict:
    """Train a detector.

    Args:
        recipe: what to do; None with `resume`, when the folder knows.
        out: folder of the run.
        resume: go on with the run in `out`, exactly where its last state was saved.

    Returns:
        The figures of the last validation, with `best`, the best ones' figure.

    Raises:
        ConfigError: the folder holds another run or none, or the data does not fit the model.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    console = console or Console(stderr=True)
    folder = RunFolder(out)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if resume:
        recipe = folder.recipe()
    assert recipe is not None
    if recipe.data.root is None:
        recipe = replace(recipe, data=replace(recipe.data, root=default_data_root().resolve()))
    config = recipe.train
    if config.threads:
        torch.set_num_threads(config.threads)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    fabric = Fabric(
        devices=local,
        num_nodes=processes // local,
        strategy="ddp" if processes > 1 else "auto",
        precision=config.precision,
    )
    fabric.launch()
    if not resume and fabric.is_global_zero:
        folder.start(recipe)
    fabric.barrier()
    with fabric.rank_zero_first():
        train_set, val_set = open_data(recipe)
    run = _Run(recipe, folder, fabric, train_set, val_set, console)
    if resume:
        run.restore()
    with _stopping() as stop:
        return run.loop(stop)


class _Run:
    """A run in progress: what the state file holds, and the loop that moves it forward."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        fabric: Fabric,
        train_set: CocoDetection,
        val_set: CocoDetection,
        console: Console,
    ) -> None:
        config = recipe.train
        self.recipe, self.folder, self.fabric, self.console = recipe, folder, fabric, console
        self.train_set, self.val_set = train_set, val_set
        seed_everything(config.seed, verbose=False)
        self.model = build(recipe.model)
        if config.init_from is not None:
            start_from(self.model, config.init_from)
        self.model.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(self.model, config)
        self.losses, self.optimizer = fabric.setup(Losses(self.model), optimizer)
        self.average = Average(self.model, config.ema) if config.ema else None
        self.batches = EpochBatches(len(train_set), config, rank=fabric.global_rank, processes=fabric.world_size)
        self.loader = DataLoader(
            train_set,
            batch_sampler=self.batches,
            collate_fn=collate,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            generator=torch.Generator(),  # its own, so that loading does not move the model's random state
        )
        self.step, self.best, self.figures = 0, -math.inf, {}
        seed_everything(config.seed + 1 + fabric.global_rank, verbose=False)

    def loop(self, stop: list[int]) -> dict:
        """Train to the last epoch, validating and saving on the way."""
        config, steps = self.recipe.train, self.batches.steps
        log = CsvLog(self.folder.log_file, step=self.step) if self.fabric.is_global_zero else None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = self.fabric.is_global_zero and self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not shown) as bar:
            task = bar.add_task("training", total=config.epochs * steps, completed=self.step)
            while self.step < config.epochs * steps:
                epoch = self.step // steps
                self._epoch(epoch, log, stop, lambda text: bar.update(task, completed=self.step, description=text))
                last = epoch + 1 == config.epochs
                if last or (epoch + 1) % config.val_every == 0:
                    self._validate(epoch, full=last)
                self._save_state()
        self.console.print(f"{self.folder.path}: done, {json.dumps(self.figures)}", soft_wrap=True)
        return {**self.figures, "best": self.best}

    def _epoch(self, epoch: int, log: CsvLog | None, stop: list[int], show: Any) -> None:
        """The rest of an epoch from the current step on."""
        config, steps = self.recipe.train, self.batches.steps
        self.batches.epoch, self.batches.start = epoch, self.step - epoch * steps
        self.train_set.set_epoch(epoch)
        self.losses.train()
        saved = clock = time.monotonic()
        logged_at = self.step
        totals: dict[str, float] = {}
        for parts in _grouped(self.loader, config.accumulate):
            figures = self._step(parts, steps)
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value
            self.step += 1
            done = self.step - logged_at
            if self.step % config.log_every == 0 or self.step % steps == 0:
                rate = done * config.batch_size / (time.monotonic() - clock)
                row = {"step": self.step, "epoch": epoch, "images_per_s": rate}
                row |= {name: value / done for name, value in totals.items()}
                if log is not None:
                    log.write(row)
                show(f"epoch {epoch} loss {row['loss']:.3f} {rate:.1f} images/s")
                clock, logged_at, totals = time.monotonic(), self.step, {}
            if self._any(bool(stop)):
                self._save_state()
                raise Interrupted(f"stopped at step {self.step}; go on with --resume {self.folder.path}")
            if self._any(time.monotonic() - saved > 60 * config.save_every):
                self._save_state()
                saved = time.monotonic()

    def _step(self, parts: tuple, steps: int) -> dict[str, float]:
        """One update of the weights."""
        config = self.recipe.train
        rate = learning_rate(config, self.step, steps)
        set_learning_rate(self.optimizer, rate)
        figures: dict[str, float] = {}
        for i, (images, targets) in enumerate(parts):
            with self.fabric.no_backward_sync(self.losses, enabled=i + 1 < len(parts)):
                losses, shares = self.losses(Batch(images, targets, self.fabric.device))
                loss = torch.stack(list(losses.values())).sum() / len(parts)
                self.fabric.backward(loss)
            for name, value in losses.items():
                figures[name] = figures.get(name, 0.0) + value.item() / len(parts)
            for block, share in enumerate(shares.tolist()):
                figures[f"keep_{block}"] = figures.get(f"keep_{block}", 0.0) + share / len(parts)
        figures["loss"] = sum(value for name, value in figures.items() if not name.startswith("keep_"))
        if not math.isfinite(figures["loss"]):
            raise ConfigError(
                f"the loss is {figures['loss']} at step {self.step}; lower train.lr, set train.clip-norm, or use "
                f"32-true; the last good state is in {self.folder.path}"
            )
        if config.clip_norm is not None:
            norm = self.fabric.clip_gradients(self.losses, self.optimizer, max_norm=config.clip_norm)
            figures["grad_norm"] = float(norm) if norm is not None else math.nan
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        return {**figures, "lr": rate}

    def _validate(self, epoch: int, *, full: bool) -> None:
        """Figures of the (averaged) weights, and the two model files."""
        config, started = self.recipe.train, time.monotonic()
        with self._averaged():
            figures = evaluate(
                self.model,
                self.val_set,
                limit=None if full else config.val_images,
                max_detections=self.recipe.data.max_detections,
                precision=config.precision if self.fabric.device.type == "cpu" else "32-true",
                console=self.console if self.fabric.is_global_zero and self.console.is_terminal else None,
                title="validating",
            )
            figures |= {"epoch": epoch, "step": self.step}
            score = figures.get("mask_ap", figures["box_ap"])
            better = score >= self.best
            if self.fabric.is_global_zero:
                save(self.model, self.folder.last_file)
                if better:
                    save(self.model, self.folder.best_file)
                write_json(self.folder.metrics_file, figures)
                took = time.monotonic() - started
                text = ", ".join(f"{k} {figures[k]:.4f}" for k in ("box_ap", "mask_ap") if k in figures)
                self.console.print(f"epoch {epoch}: {text} on {figures['images']} images ({took:.0f} s)")
        self.best, self.figures = max(self.best, score), figures

    @contextmanager
    def _averaged(self) -> Generator[None]:
        """The model with its averaged weights."""
        if self.average is None:
            yield
            return
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.values)
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def _any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if world_size() == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.fabric.device)
        dist.all_reduce(flags)
        return bool(flags)

    def _save_state(self) -> None:
        """Everything that the rest of the run depends on."""
        random = {"cpu": torch.get_rng_state()}
        if self.fabric.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.fabric.device)
        randoms = [random]
        if world_size() > 1:
            randoms = [{}] * world_size()
            dist.all_gather_object(randoms, random)
        if self.fabric.is_global_zero:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "step": self.step,
                "best": self.best,
                "figures": self.figures,
                "random": randoms,
            }
            self.folder.save_state(state)
        self.fabric.barrier()

    def restore(self) -> None:
        """Go back to the last saved state; to the start when there is none."""
        state = self.folder.load_state()
        if state is None:
            return
        if len(state["random"]) != self.fabric.world_size:
            raise ConfigError(
                f"{self.folder.path}: was run by {len(state['random'])} processes; resume it with as many, "
                f"not {self.fabric.world_size}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step, self.best, self.figures = state["step"], state["best"], state["figures"]
        random = state["random"][self.fabric.global_rank]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.fabric.device)


def _grouped(items: Iterable, size: int) -> Iterator[tuple]:
    """Tuples of `size` items in a row."""
    iterator = iter(items)
    while group := tuple(itertools.islice(iterator, size)):
        yield group


def start_from(model: Detector, path: Path) -> None:
    """Load the weights of a checkpoint or run; the policy's own stay new unless the checkpoint has them.

    Raises:
        ConfigError: no such file, or weights outside the policy that are missing or do not fit.
    """
    from sievit.model import _model_file

    file = _model_file(path)
    _, tensors = read(file)
    own = model.state_dict()
    tensors = {k: v for k, v in tensors.items() if k in own or not k.startswith(POLICY_PREFIX)}
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if (name not in tensors and not name.startswith(POLICY_PREFIX))
        or name not in own
        or (name in tensors and tensors[name].shape != own[name].shape)
    )
    if wrong:
        raise ConfigError(f"{file}: cannot start from it, it is of another model: {', '.join(wrong[:5])} do not fit")
    model.load_state_dict(own | tensors)


@contextmanager
def _stopping() -> Generator[list[int]]:
    """A list that SIGINT and SIGTERM add to; a second SIGINT stops at once."""
    received: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where no signal arrives
        yield received
        return
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)
