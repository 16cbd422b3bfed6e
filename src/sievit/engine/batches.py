"""The batches of training in a seeded order, split over processes and accumulated parts."""

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from sievit.config import ConfigError
from sievit.data.dataset import collate
from sievit.engine.recipe import TrainConfig
from sievit.models.base import Model
from sievit.tokens import Trace
from sievit.vit import Execution

Samples = tuple[list[Tensor], list[dict[str, Any]]]
"""Images and targets, as `collate` makes them."""


class Batch:
    """Images and targets. No container that Fabric converts, for it would round boxes to the precision of training."""

    def __init__(self, images: list[Tensor], targets: list[dict[str, Any]], device: torch.device) -> None:
        self.images = [image.to(device) for image in images]
        self.targets = [
            {name: value.to(device) if hasattr(value, "to") else value for name, value in target.items()}
            for target in targets
        ]


class Losses(nn.Module):
    """The module that is trained: a batch to losses by name, and the kept share per block.

    Args:
        teacher: the dense model, for losses that compare with it; it is not trained.
        distill: weight of `features_loss`.
    """

    def __init__(self, model: Model, teacher: Model | None = None, distill: float = 0.0) -> None:
        super().__init__()
        self.model, self.distill = model, distill
        self._teacher = [] if teacher is None else [teacher]  # in a list, so that its weights are none of this module's

    def forward(self, batch: Batch, *, selected: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """`selected`: of a policy with gates, blocks compute the chosen tokens alone."""
        selected = selected and self.model.policy.gates_in_training
        dense = None
        for teacher in self._teacher:
            with torch.no_grad():
                dense = teacher(batch.images, batch.targets).trace
        execution = Execution(mode="selected" if selected else "auto")
        output = self.model(batch.images, batch.targets, execution=execution, teacher=dense)
        losses, trace = dict(output.losses), output.trace
        if dense is not None and self.distill:
            losses["features"] = self.distill * features_loss(trace, dense)
        if selected:
            # blocks without a token get gradients of zero, not none: those of another process may have some
            idle = [b for b, n in zip(self.model.vit.blocks, trace.counts().sum(1).tolist(), strict=True) if not n]
            name = next(iter(losses))
            for parameter in (p for block in idle for p in block.parameters()):
                losses[name] = losses[name] + 0 * parameter.sum()
        return losses, trace.shares().mean(1)


def features_loss(trace: Trace, dense: Trace) -> Tensor:
    """1 - cosine of the features after the last block and those of the dense model, mean over the tokens that stand on
    an image and have not left for good."""
    assert trace.tokens is not None and dense.tokens is not None, "of a pass of training"
    alike = F.cosine_similarity(trace.tokens.patches.float(), dense.tokens.patches.float(), dim=2)
    weight = (trace.valid & ~trace.exited[-1] if trace.exited else trace.valid).float()
    return ((1 - alike) * weight).sum() / weight.sum().clamp(min=1)


class EpochBatches(Sampler[list[int]]):
    """This process's part of each global batch: a seeded permutation per epoch, the incomplete last batch left out.

    The global batches are the same for any number of processes and parts, and `start` skips those that are done.
    """

    def __init__(self, length: int, config: TrainConfig, *, rank: int, processes: int) -> None:
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


def training_loader(dataset: Any, batches: EpochBatches) -> DataLoader:
    """Loads `batches`; its workers live as long as it does."""
    workers = batches.config.workers
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # another one, so that loading does not move the model's random state
    )


def leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal's group; out of it, workers end by the training process alone."""
    os.setpgid(0, 0)


def loading(loader: Iterable[Samples]) -> Iterator[Samples]:
    """The batches of `loader`; a ConfigError of a worker process is raised as it was raised there."""
    try:
        yield from loader
    except ConfigError as error:
        _, wrapped, message = str(error).rpartition(f"{ConfigError.__qualname__}: ")
        if wrapped and str(error).startswith("Caught "):
            raise ConfigError(message.strip()) from error
        raise


def grouped(items: Iterable[Samples], size: int) -> Iterator[tuple[Samples, ...]]:
    """Tuples of `size` items in a row."""
    iterator = iter(items)
    while group := tuple(itertools.islice(iterator, size)):
        yield group
