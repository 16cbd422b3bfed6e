"""The executor: blocks, computed for the tokens that take part and for no others.

Letters: b images, n = h*w grid tokens, p prefix tokens, t packed tokens, c channels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sievit.tokens import Tokens
from sievit.vit.block import Block
from sievit.vit.packed import (
    Backend,
    Dense,
    Layout,
    Masked,
    Packed,
    PackedAmong,
    Packing,
    pack,
    pack_table,
    pad,
    padding_mask,
    unpack,
)

Mode = Literal["auto", "packed", "padded", "bucketed", "masked", "selected"]

BUCKETS = 8
"""Counts per canvas that the bucketed mode knows."""


def execute(
    blocks: Sequence[Block], tokens: Tokens, *, mode: Mode = "auto", backend: Backend = "auto", inplace: bool = False
) -> Tokens:
    """Compute blocks, one after the other, for the tokens that take part; all others stay as they are.

    Tokens are packed once for all the blocks, and come back to the canvas behind the last.

    Args:
        mode: how. `auto` is `masked` where the canvas carries a gate and `packed` elsewhere.
            `packed` computes exactly the chosen tokens, or where the policy gives places for equally many in every
            image (`Tokens.order`) those, so that no shape depends on the choice;
            `padded` pads each image's chosen tokens to the longest image;
            `bucketed` pads further, to one of eight counts per canvas: few shapes, few graphs;
            `masked` computes everything and hides the others, which is what straight-through gates need;
            `selected` computes the chosen tokens alone and gives gates their gradient from those.
        backend: attention of the packed mode, see `Packed`.
        inplace: write results into the canvas that came in; for a caller that owns it and needs no gradient.
    """
    part, b = tokens.taking_part(), tokens.x.shape[0]
    if mode == "auto":
        mode = "packed" if tokens.gate is None else "masked"
    if part is None and (tokens.gate is None or mode == "selected"):
        return replace(tokens, x=_through(blocks, tokens.x, Dense(rope=tokens.rope), b))
    if mode == "masked":
        for block in blocks:
            tokens = _execute_masked(block, tokens)
        return tokens
    assert part is not None, "a gate without a choice"
    if mode == "bucketed" and tokens.context is None and tokens.order is None:
        tokens, mode = _bucketed(tokens, part[:, tokens.num_prefix :]), "packed"
    if tokens.order is not None and mode in ("packed", "bucketed"):
        return _execute_fixed(blocks, tokens, tokens.order, inplace=inplace)
    packing = Packing.of(part)
    if not sum(packing.lengths):
        return tokens
    if tokens.context is not None:
        return _execute_among(blocks, tokens, part, packing, inplace=inplace)
    packed, rope = pack(tokens.x, packing), pack_table(tokens.rope, packing)
    if mode == "padded":
        layout = Masked(padding_mask(packing), rope=None if rope is None else pad(rope, packing))
        packed = _through(blocks, pad(packed, packing), layout, b).flatten(0, 1).index_select(0, packing.slots)
    else:
        before, packed = packed, _through(blocks, packed, Packed(packing, backend, rope=rope), b)
        if mode == "selected" and tokens.gate is not None:
            gate = pack(F.pad(tokens.gate, (tokens.num_prefix, 0), value=1.0)[..., None], packing).to(packed.dtype)
            packed = gate * packed + (1 - gate) * before
    return replace(tokens, x=unpack(tokens.x, packed, packing, inplace=inplace))


def _through(blocks: Sequence[Block], x: Tensor, layout: Layout, num_images: int) -> Tensor:
    for block in blocks:
        x = block(x, layout, num_images)
    return x


def _bucketed(tokens: Tokens, keep: Tensor) -> Tokens:
    """The same choice by places, as many as the next bucket holds. Asking for the largest count synchronises once."""
    n = keep.shape[1]
    step = -(-n // BUCKETS)
    size = min(n, -(-int(keep.sum(1).max()) // step) * step)
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]  # the chosen ones first
    return tokens.select_order(order.sort(dim=1).values, keep)


def _execute_fixed(blocks: Sequence[Block], tokens: Tokens, order: Tensor, *, inplace: bool) -> Tokens:
    """Equally many tokens of every image, as (b, p+k, c); of those that are not real nobody sees or keeps anything."""
    b, total = tokens.x.shape[:2]
    prefix = torch.arange(tokens.num_prefix, device=order.device).expand(b, -1)
    places = torch.cat([prefix, order + tokens.num_prefix], dim=1)
    rows = (places + total * torch.arange(b, device=order.device)[:, None]).flatten()
    before = tokens.x.flatten(0, 1).index_select(0, rows).unflatten(0, places.shape)
    rope = tokens.rope
    if rope is not None:
        rope = rope[0].index_select(0, places.flatten()) if len(rope) == 1 else rope.flatten(0, 1).index_select(0, rows)
        rope = rope.unflatten(0, places.shape)
    if tokens.real is None:
        after = _through(blocks, before, Dense(rope=rope), b)
    else:
        real = F.pad(tokens.real, (tokens.num_prefix, 0), value=True)
        after = torch.where(real[..., None], _through(blocks, before, Masked(real, rope=rope), b), before)
    return replace(tokens, x=unpack(tokens.x, after.flatten(0, 1), Packing(rows, ()), inplace=inplace))


def _execute_among(blocks: Sequence[Block], tokens: Tokens, part: Tensor, packing: Packing, *, inplace: bool) -> Tokens:
    """Tokens that take part, computed from themselves and from the context beside them, which stays as it is."""
    assert tokens.context is not None
    among = Packing.of(part | F.pad(tokens.context, (tokens.num_prefix, 0), value=True))
    layout = PackedAmong(packing, among, rope=pack_table(tokens.rope, among))
    visible = pack(tokens.x, among)
    for block in blocks:
        computed = block(visible, layout, len(part))
        visible = visible.index_copy(0, layout.places, computed.to(visible.dtype))
    return replace(tokens, x=unpack(tokens.x, layout.queries(visible), packing, inplace=inplace))


def _execute_masked(block: Block, tokens: Tokens) -> Tokens:
    """x = m * block(x) + (1 - m) * x, with the deselected tokens hidden as keys (SViT, section 3)."""
    part = tokens.taking_part()
    if part is None:
        part = torch.ones(tokens.x.shape[:2], dtype=torch.bool, device=tokens.x.device)
    seen = part
    if tokens.context is not None:
        seen = part | F.pad(tokens.context, (tokens.num_prefix, 0), value=True)
    y = block(tokens.x, Masked(seen, rope=tokens.rope), tokens.x.shape[0])
    if tokens.gate is None:
        return replace(tokens, x=torch.where(part[..., None], y, tokens.x))
    gate = F.pad(tokens.gate, (tokens.num_prefix, 0), value=1.0)[..., None].to(y.dtype)
    return replace(tokens, x=gate * y + (1 - gate) * tokens.x)
