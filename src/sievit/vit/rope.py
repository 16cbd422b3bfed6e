"""Rotary positions: a table of sines and cosines per token, and the rotation of queries and keys by it.

Letters: n = h*w grid tokens, p prefix tokens, d channels per head.
"""

import math

import torch
from torch import Tensor

from sievit.vit.config import RopeConfig


def rope_table(config: RopeConfig, grid: tuple[int, int], head_dim: int, device: torch.device) -> Tensor:
    """(n, 2d) float32: sines, then cosines, of the tokens of a grid, row by row."""
    count = head_dim // 4
    steps = torch.arange(count, device=device, dtype=torch.float32)
    if config.kind == "index":
        rates = 1.0 / config.temperature ** (steps / count)
    else:
        rates = 2 * math.pi / config.temperature ** (2 * steps / (2 * count))
    axes = []
    for axis, size in enumerate(grid):
        places = torch.arange(size, device=device, dtype=torch.float32) + config.offset
        if config.kind == "centred":
            places = 2 * ((places + 0.5) / size) - 1
        elif config.reference is not None:
            places = places / size * config.reference[axis]
        axes.append(places)
    planes = torch.meshgrid(*axes, indexing="ij")
    places = torch.stack(planes[::-1] if config.xy else planes, dim=-1).flatten(0, 1)  # (n, 2)
    angles = (places[:, :, None] * rates).flatten(1)  # (n, d/2)
    spread = angles.repeat_interleave(2, 1) if config.interleaved else angles.repeat(1, 2)
    return torch.cat([spread.sin(), spread.cos()], dim=1)


def unmoved(count: int, head_dim: int, like: Tensor) -> Tensor:
    """(count, 2d): the rows of tokens that are not rotated."""
    rows = like.new_zeros(count, 2 * head_dim)
    rows[:, head_dim:] = 1
    return rows


def rotate(x: Tensor, table: Tensor, *, interleaved: bool) -> Tensor:
    """Queries or keys (..., heads, d), each token rotated by its row of the table (..., 2d)."""
    sin, cos = table[..., None, :].chunk(2, dim=-1)
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
