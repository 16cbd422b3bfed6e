"""Sums over all processes, so that several processes compute the losses of one with the same global batch."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
