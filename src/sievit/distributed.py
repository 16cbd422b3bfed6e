"""Several processes: sums over all of them, so that they compute the losses of one, and values that they exchange."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sievit.config import ConfigError

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0; 0 outside a process group."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def joined() -> Generator[None]:
    """The processes that torchrun has started are a group meanwhile, which exchanges values; one alone is none.

    None is given up for being slow: a share of a large job may take days longer than another.
    """
    ours = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", timeout=timedelta(days=365))
    try:
        yield
    finally:
        if ours:
            dist.destroy_process_group()


def by_first(call: Callable[[], T]) -> T:
    """What `call` returns in the first process, in all of them; so is what a user or the machine has to change."""
    if world_size() == 1:
        return call()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = call()
        except (ConfigError, OSError) as error:
            told[1] = error
    value, error = gathered(told)[0]
    if error is not None:
        raise error
    return value


def global_sum(x: Tensor) -> Tensor:
    """The sum of `x` over all processes.

    Its gradient is summed over all processes too, for what each of them does with the sum depends on every `x`. DDP
    averages the gradients of the processes; where each computes the mean of its part of a global batch, or the same
    loss of global sums, that average is the gradient of the one process.
    """
    return x if world_size() == 1 else _GlobalSum.apply(x)


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order; with several processes all of them have to call it."""
    if world_size() == 1:
        return [value]
    parts = [value] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def from_first(x: Tensor) -> Tensor:
    """`x` of the first process, on all of them; without a gradient."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.broadcast(x, src=0)
    return x


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
