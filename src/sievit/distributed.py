"""Sums over all processes, so that several processes compute the losses of one with the same global batch."""

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_sum(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, with a gradient for the local share of it.

    The gradient is scaled by the number of processes: DDP averages gradients, and the average of the scaled ones is the
    gradient of the global value.
    """
    processes = world_size()
    if processes == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + (x - x.detach()) * processes
