"""The executor: one block, computed for the tokens that take part and for no others.

Letters: b images, n = h*w grid tokens, p prefix tokens, t packed tokens, c channels.
"""

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F

from sievit.packed import (
    Backend,
    Dense,
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
from sievit.tokens import Tokens
from sievit.vit.block import Block

Mode = Literal["auto", "packed", "padded", "masked"]


def execute(
    block: Block, tokens: Tokens, *, mode: Mode = "auto", backend: Backend = "auto", inplace: bool = False
) -> Tokens:
    """Compute one block for the tokens that take part; all others stay as they are.

    Args:
        mode: `packed` computes exactly the chosen tokens; `padded` pads each image's chosen tokens to the longest
            image; `masked` computes everything and hides the others, which is what straight-through gates need.
            `auto` is `masked` where the canvas carries a gate and `packed` elsewhere.
        backend: attention of the packed mode, see `Packed`.
        inplace: write results into the canvas that came in; for a caller that owns it and needs no gradient.
    """
    part, b = tokens.taking_part(), tokens.x.shape[0]
    if mode == "auto":
        mode = "packed" if tokens.gate is None else "masked"
    if part is None and tokens.gate is None:
        return replace(tokens, x=block(tokens.x, Dense(rope=tokens.rope), b))
    if mode == "masked":
        return _execute_masked(block, tokens)
    assert part is not None, "a gate without a choice"
    packing = Packing.of(part)
    if not sum(packing.lengths):
        return tokens
    if tokens.context is not None:
        visible = part | F.pad(tokens.context, (tokens.num_prefix, 0), value=True)
        among = Packing.of(visible)
        packed = block(pack(tokens.x, among), PackedAmong(packing, among, rope=pack_table(tokens.rope, among)), b)
        return replace(tokens, x=unpack(tokens.x, packed, packing, inplace=inplace))
    packed, rope = pack(tokens.x, packing), pack_table(tokens.rope, packing)
    if mode == "padded":
        padded_rope = None if rope is None else pad(rope, packing)
        padded = block(pad(packed, packing), Masked(padding_mask(packing), rope=padded_rope), b)
        packed = padded.flatten(0, 1).index_select(0, packing.slots)
    else:
        packed = block(packed, Packed(packing, backend, rope=rope), b)
    return replace(tokens, x=unpack(tokens.x, packed, packing, inplace=inplace))


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
