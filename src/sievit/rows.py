"""Rows of a batch of canvases by their positions: the chosen ones, copies, and sums by group.

Letters: b images, n positions on a canvas, k chosen ones, d numbers per row.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def similarities(a: Float[Tensor, "b m d"], b: Float[Tensor, "b k d"]) -> Float[Tensor, "b m k"]:
    """(b, m, k): the products of all rows, with all their digits under autocast too, since close calls need them."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def taken(rows: Float[Tensor, "b n c"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    """(b, k, c): of each image the rows at these positions."""
    return rows.flatten(0, 1).index_select(0, of_all(index, rows.shape[1])).unflatten(0, index.shape)


def of_all(index: Int[Tensor, "b k"], n: int) -> Int[Tensor, " bk"]:
    """Positions on canvases of n tokens as positions on all of them, one behind the other."""
    return (index + n * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()


def most_of(keep: Bool[Tensor, "b n"]) -> Any:
    """How many are chosen in the image with the most of them; in a program, made for no shape of 0 or 1, at least 2."""
    most: Any = keep.sum(1).max()
    if not torch.compiler.is_exporting():
        return int(most)
    most = most.clamp(min=2).item()
    torch._check(most >= 2)
    torch._check(most <= keep.shape[1])
    return most


def chosen_first(keep: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """(b, n) int64: the positions of the chosen tokens, in their order, and behind them those of all others."""
    kept = keep.to(torch.int64)
    total, rank = kept.sum(1, keepdim=True), kept.cumsum(1)
    place = torch.arange(keep.shape[1], device=keep.device).expand_as(kept)
    return torch.zeros_like(kept).scatter(1, torch.where(keep, rank - 1, total + place - rank), place)


def is_fixed(rows: Tensor) -> bool:
    """Whether this is in a program for canvases (b, n, ...) of one size, in which no shape depends on a value."""
    return torch.compiler.is_exporting() and isinstance(rows.shape[1], int)


def with_sums(
    values: Float[Tensor, "b n d"], owner: Int[Tensor, "b n"], others: Bool[Tensor, "b n"]
) -> Float[Tensor, "b n d"]:
    """(b, n, d): the values, and to each owner's those of `others`, the rows that it owns beside its own, added."""
    added = (values * others[..., None].to(values.dtype)).flatten(0, 1)
    sums = values.flatten(0, 1).index_add(0, of_all(owner, owner.shape[1]), added)
    return sums.unflatten(0, owner.shape)


def with_products(
    values: Float[Tensor, "b n d"],
    owner: Int[Tensor, "b n"],
    others: Bool[Tensor, "b n"],
    *,
    owners: Int[Tensor, "b k"],
    rest: Int[Tensor, "b m"],
) -> Float[Tensor, "b n d"]:
    """`with_sums` as a product of matrices, for programs of runtimes that cannot add at equal positions (TensorRT).

    Args:
        owners: positions, all that own others among them.
        rest: positions, all `others` among them.
    """
    owned = owner.gather(1, rest)[:, None] == owners[:, :, None]
    owned &= others.gather(1, rest)[:, None]
    sums = taken(values, owners) + owned.to(values.dtype) @ taken(values, rest)
    return values.scatter(1, owners[..., None].expand(-1, -1, values.shape[2]), sums)
