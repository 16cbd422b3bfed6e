"""The executor: blocks, computed for the tokens that take part and for no others.

Letters: b images, n = h*w grid tokens, p prefix tokens, t packed tokens, c channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sievit.rows import chosen_first, most_of
from sievit.tokens import Tokens
from sievit.vit.block import Block, Heads
from sievit.vit.execution import Execution
from sievit.vit.packed import (
    Dense,
    Layout,
    Masked,
    Packed,
    PackedAmong,
    PackedRecalling,
    Packing,
    pack,
    pack_table,
    pad,
    padding_mask,
    unpack,
)
from sievit.vit.projections import Half, placed
from sievit.vit.rope import rotate

BUCKETS = 8
"""Counts per canvas of the bucketed mode."""


@dataclass  # not frozen, for torch.compile cannot build such an object again where a graph ends
class Run:
    """Blocks that are computed one after the other for the same tokens.

    Attributes:
        from_mlp: begin with the MLP of the first block. to_attention: end with the attention of the last one.
    """

    blocks: Sequence[Block]
    from_mlp: bool = False
    to_attention: bool = False

    def __call__(
        self, x: Float[Tensor, "*rows c"], layout: Layout, num_images: int
    ) -> tuple[Float[Tensor, "*computed c"], Heads | None]:
        """Tokens in the arrangement of `layout`, and the queries, keys and values of a block that ends half-way."""
        heads, last = None, len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i == 0 and self.from_mlp:
                x = block.feed(x, layout, num_images)
            elif i == last and self.to_attention:
                x, heads = block.attend(x, layout, num_images)
            else:
                x = block(x, layout, num_images)
        return x, heads


def execute_run(run: Run, tokens: Tokens, execution: Execution, *, inplace: bool = False) -> tuple[Tokens, Half | None]:
    """Compute blocks, one after the other, for the tokens that take part; all others stay as they are.

    Tokens are packed once for all the blocks, and come back to the canvas behind the last.

    Args:
        inplace: write results into the canvas that came in; for a caller that owns it and needs no gradient.

    Returns:
        The canvas; of a run that ends with an attention also what the policy may ask of it.
    """
    part, b, mode = tokens.taking_part(), tokens.x.shape[0], execution.mode
    if mode == "auto":
        mode = "packed" if tokens.gate is None else "masked"
    sizes = tokens.sizes()
    bias = None if sizes is None else tokens.with_prefix(sizes.clamp(min=1).log(), value=0.0)
    if part is None and (tokens.gate is None or mode == "selected"):
        x, heads = run(tokens.x, Dense(rope=tokens.rope, bias=bias), b)
        return replace(tokens, x=x), heads and Half(heads, _as_it_is, _as_it_is)
    unplaced = tokens.order is None and mode == "packed" and torch.compiler.is_exporting()  # a program without counts
    if mode == "masked" or unplaced:
        return _execute_masked(run, tokens, bias)
    assert part is not None, "a gate without a choice"
    if mode == "bucketed" and tokens.context is None and tokens.order is None:
        tokens, mode = _bucketed(tokens, part[:, tokens.num_prefix :]), "packed"
    if tokens.order is not None and mode in ("packed", "bucketed"):
        return _execute_fixed(run, tokens, tokens.order, bias, inplace=inplace)
    packing = Packing.of(part)
    if not sum(packing.lengths):
        return tokens, None
    if tokens.memory is not None:
        return _execute_recalling(run, tokens, tokens.memory, part, packing, inplace=inplace), None
    if tokens.context is not None:
        return _execute_among(run, tokens, part, packing, bias, inplace=inplace)
    packed, rope, bias = pack(tokens.x, packing), pack_table(tokens.rope, packing), pack_table(bias, packing)
    before = packed
    if mode == "padded":
        rope, bias = (None if table is None else pad(table, packing) for table in (rope, bias))
        packed, heads = run(pad(packed, packing), Masked(padding_mask(packing), rope=rope, bias=bias), b)
        packed, *rows = (x.flatten(0, 1).index_select(0, packing.slots) for x in (packed, *(heads or ())))
        heads = Heads(*rows) if rows else None
    else:
        packed, heads = run(packed, Packed(packing, execution.attention, rope=rope, bias=bias), b)
        if mode == "selected" and tokens.gate is not None:
            gate = pack(tokens.with_prefix(tokens.gate, value=1.0)[..., None], packing).to(packed.dtype)
            packed = gate * packed + (1 - gate) * before
    place = placed(packing, part)
    return replace(tokens, x=unpack(tokens.x, packed, packing, inplace=inplace)), heads and Half(heads, place, place)


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def _bucketed(tokens: Tokens, keep: Bool[Tensor, "b n"]) -> Tokens:
    """The same choice by positions, as many as the next bucket holds. Reading the largest count synchronises once.

    A program that is exported has no buckets: it computes so many tokens as the image with the most of them.
    """
    n, size = keep.shape[1], most_of(keep)
    if not torch.compiler.is_exporting():
        step = -(-n // BUCKETS)
        size = min(n, -(-size // step) * step)
    return tokens.select_order(chosen_first(keep)[:, :size], keep)


def _execute_fixed(
    run: Run, tokens: Tokens, order: Int[Tensor, "b k"], bias: Float[Tensor, "b t"] | None, *, inplace: bool
) -> tuple[Tokens, Half | None]:
    """Equally many tokens of every image, as (b, p+k, c); others than the real ones are invisible and stay."""
    b, total = tokens.x.shape[:2]
    prefix = torch.arange(tokens.num_prefix, device=order.device).expand(b, -1)
    columns = torch.cat([prefix, order + tokens.num_prefix], dim=1)
    rows = (columns + total * torch.arange(b, device=order.device)[:, None]).flatten()
    before, bias = (
        None if table is None else table.flatten(0, 1).index_select(0, rows).unflatten(0, columns.shape)
        for table in (tokens.x, bias)
    )
    assert before is not None
    rope = tokens.rope
    if rope is not None:
        index = columns.flatten() if rope.shape[0] == 1 else rows
        rope = rope.flatten(0, 1).index_select(0, index).unflatten(0, columns.shape)
    if tokens.real is None:
        after, heads = run(before, Dense(rope=rope, bias=bias), b)
    else:
        real = tokens.with_prefix(tokens.real, value=True)
        after, heads = run(before, Masked(real, rope=rope, bias=bias), b)
        after = torch.where(real[..., None], after, before)
    packing = Packing(rows, ())
    place = placed(packing, tokens.x[..., 0])
    half = heads and Half(heads, *[lambda rows: place(rows.flatten(0, 1))] * 2)
    return replace(tokens, x=unpack(tokens.x, after.flatten(0, 1), packing, inplace=inplace)), half


def _execute_among(
    run: Run,
    tokens: Tokens,
    part: Bool[Tensor, "b t"],
    packing: Packing,
    bias: Float[Tensor, "b t"] | None,
    *,
    inplace: bool,
) -> tuple[Tokens, Half | None]:
    """Tokens that take part, computed from themselves and from the context beside them, which stays as it is."""
    assert tokens.context is not None and not run.from_mlp, "an MLP has no context"
    among = Packing.of(part | tokens.with_prefix(tokens.context, value=True))
    layout = PackedAmong(packing, among, rope=pack_table(tokens.rope, among), bias=pack_table(bias, among))
    visible, heads = pack(tokens.x, among), None
    for i, block in enumerate(run.blocks):
        step = Run([block], to_attention=run.to_attention and i + 1 == len(run.blocks))
        computed, heads = step(visible, layout, part.shape[0])
        visible = visible.index_copy(0, layout.rows, computed.to(visible.dtype))
    after = unpack(tokens.x, layout.queries(visible), packing, inplace=inplace)
    return replace(tokens, x=after), heads and Half(heads, placed(packing, part), placed(among, part))


def _execute_recalling(
    run: Run,
    tokens: Tokens,
    memory: Float[Tensor, "b t kv"],
    part: Bool[Tensor, "b t"],
    packing: Packing,
    *,
    inplace: bool,
) -> Tokens:
    """Tokens that take part, computed from themselves and from the remembered keys and values of the context."""
    (block,) = run.blocks  # the memory is that of one block
    assert not run.from_mlp and not run.to_attention
    seen = part if tokens.context is None else part | tokens.with_prefix(tokens.context, value=True)
    among = Packing.of(seen)
    keys, values = pack(memory, among).unflatten(1, (2, block.attn.num_heads, -1)).unbind(1)
    rope = pack_table(tokens.rope, among)
    if rope is not None:
        keys = rotate(keys, rope, interleaved=block.attn.interleaved)
    layout = PackedRecalling(packing, among, keys, values, rope=pack_table(tokens.rope, packing))
    x, heads = block.attend(pack(tokens.x, packing), layout, part.shape[0])
    x = block.feed(x, layout, part.shape[0])
    memory = unpack(memory, torch.cat([heads.k.flatten(1), heads.v.flatten(1)], dim=1), packing)
    return replace(tokens, x=unpack(tokens.x, x, packing, inplace=inplace), memory=memory)


def _execute_masked(run: Run, tokens: Tokens, bias: Float[Tensor, "b t"] | None) -> tuple[Tokens, Half | None]:
    """x = m * block(x) + (1 - m) * x, with the deselected tokens hidden as keys (SViT, section 3)."""
    part, heads = tokens.taking_part(), None
    if part is None:
        part = torch.ones(tokens.x.shape[:2], dtype=torch.bool, device=tokens.x.device)
    seen = part if tokens.context is None else part | tokens.with_prefix(tokens.context, value=True)
    layout, gate = Masked(seen, rope=tokens.rope, bias=bias), tokens.gate
    last = len(run.blocks) - 1
    for i, block in enumerate(run.blocks):
        step = Run([block], run.from_mlp and i == 0, run.to_attention and i == last)
        y, heads = step(tokens.x, layout, tokens.x.shape[0])
        if gate is None:
            tokens = replace(tokens, x=torch.where(part[..., None], y, tokens.x))
        else:
            m = tokens.with_prefix(gate, value=1.0)[..., None].to(y.dtype)
            tokens = replace(tokens, x=m * y + (1 - m) * tokens.x)
    return tokens, heads and Half(heads, _as_it_is, _as_it_is)
