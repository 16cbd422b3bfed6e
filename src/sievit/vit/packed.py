"""Packing: the tokens that take part, of all images of a batch, as one sequence; and attention within each image.

A layout describes how the tokens of a transformer block are arranged. Three layouts compute the same numbers:

- `Packed`: (t, c), no padding anywhere. What inference uses.
- `Dense`: (b, n, c), every token takes part.
- `Masked`: (b, n, c), tokens that do not take part are computed but hidden from the others. What training with
  straight-through gates needs, and, on tokens padded to the longest image, the reference for `Packed`.

Letters: b images, n canvas tokens per image, t packed tokens, c channels, h heads, d channels per head.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sievit.vit.execution import AttentionName


@runtime_checkable
class Layout(Protocol):
    """How the tokens of a batch are arranged.

    Attributes:
        rope: (..., 2d), sines and cosines of the tokens' rotary positions, arranged as they are; None for none.
        bias: (...,) float, added to the logits of each token as a key; None for none.
    """

    rope: Tensor | None
    bias: Tensor | None

    def queries(self, x: Tensor) -> Tensor:
        """Of the tokens of this layout those that are computed; the others are only seen."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention within each image; q, k, v and the result are (..., h, d), `...` being this layout's, for q
        and the result that of `queries`."""
        ...

    def per_image(self, values: Tensor) -> Tensor:
        """(b,) values, one per image, shaped to multiply the tokens."""
        ...


@dataclass(frozen=True)
class Packing:
    """Where packed tokens come from.

    Attributes:
        index: (t,) int64, positions in the flattened canvas (b * n), ascending, so image by image.
        lengths: tokens of each image; on CUDA this is the one host synchronisation of a choice.
    """

    index: Int[Tensor, " t"]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, part: Bool[Tensor, "b n"]) -> "Packing":
        """The packing of a choice (b, n) bool. In a program that is exported its lengths are not known."""
        if torch.compiler.is_exporting():
            index = part.flatten().nonzero().squeeze(1)
            torch._check(index.shape[0] >= 2)  # programs are made for no shape of 0 or 1
            return cls(index=index, lengths=())
        lengths = tuple(part.sum(1).tolist())
        flat = part.flatten()
        index = positions(flat, sum(lengths)) if part.is_cuda else flat.nonzero().squeeze(1)
        return cls(index=index, lengths=lengths)

    @cached_property
    def cu_seqlens(self) -> Int[Tensor, " b1"]:
        """(b + 1,) int32: where each image starts and ends in the packed sequence."""
        ends = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.index.device, non_blocking=True)

    @cached_property
    def slots(self) -> Int[Tensor, " t"]:
        """(t,) int64: positions of the packed tokens in a flattened (b, max(lengths)) padding."""
        longest, device = max(self.lengths), self.index.device
        return torch.cat([torch.arange(n, device=device) + i * longest for i, n in enumerate(self.lengths)])


def positions(chosen: Bool[Tensor, " n"], count: int) -> Int[Tensor, " {count}"]:
    """(count,) int64: where `chosen` (n,) is True, `count` times; unlike `nonzero` it does not wait for the device."""
    rank = chosen.cumsum(0) - 1
    slots = torch.where(chosen, rank, count)  # one more slot takes all the others
    index = torch.empty(count + 1, dtype=torch.int64, device=chosen.device)
    return index.scatter_(0, slots, torch.arange(len(chosen), device=chosen.device))[:count]


def pack(x: Float[Tensor, "b n c"], packing: Packing) -> Float[Tensor, "t c"]:
    """(b, n, c) to (t, c)."""
    return x.flatten(0, 1).index_select(0, packing.index)


def pack_table(table: Float[Tensor, "#b n ..."] | None, packing: Packing) -> Float[Tensor, "t ..."] | None:
    """The packed tokens' rows (t, ...) of a table (b, n, ...), or (1, n, ...) where images share it."""
    if table is None:
        return None
    index = packing.index if len(table) > 1 else packing.index % table.shape[1]
    return table.flatten(0, 1).index_select(0, index)


def unpack(
    canvas: Float[Tensor, "b n c"], packed: Float[Tensor, "t c"], packing: Packing, *, inplace: bool = False
) -> Float[Tensor, "b n c"]:
    """(t, c) back to its places on the canvas (b, n, c); all other tokens keep the value they have."""
    packed = packed.to(canvas.dtype)
    if inplace and canvas.is_contiguous() and not torch.compiler.is_compiling():  # a compiler finds that by itself
        canvas.view(-1, canvas.shape[2]).index_copy_(0, packing.index, packed)
        return canvas
    return canvas.flatten(0, 1).index_copy(0, packing.index, packed).view_as(canvas)


def pad(packed: Float[Tensor, "t ..."], packing: Packing) -> Float[Tensor, "b longest ..."]:
    """(t, ...) to (b, max(lengths), ...), zeros behind each image's tokens."""
    b, longest = len(packing.lengths), max(packing.lengths)
    padded = packed.new_zeros((b * longest, *packed.shape[1:])).index_copy(0, packing.slots, packed)
    return padded.unflatten(0, (b, longest))


def padding_mask(packing: Packing) -> Bool[Tensor, "b longest"]:
    """(b, max(lengths)) bool: True where `pad` puts a token."""
    lengths = packing.cu_seqlens.diff()
    return torch.arange(max(packing.lengths), device=lengths.device) < lengths[:, None]


class Dense:
    """Every token of (b, n, c) takes part."""

    def __init__(self, *, rope: Tensor | None = None, bias: Tensor | None = None) -> None:
        self.rope, self.bias = rope, bias

    def queries(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, None, self.bias)

    def per_image(self, values: Tensor) -> Tensor:
        return values[:, None, None]


class Masked(Dense):
    """Tokens of (b, n, c) that do not take part are computed, but invisible to all others.

    Args:
        part: (b, n) bool. An image in which none takes part is computed as if all did: its result is not used, and
            gradients stay finite.
    """

    def __init__(self, part: Tensor, *, rope: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__(rope=rope, bias=bias)
        self.part = part | ~part.any(1, keepdim=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, self.part, self.bias)


class Packed(Dense):
    """The packed tokens (t, c) of a batch; attention stays within each image.

    Args:
        attention: see `Execution`.
    """

    def __init__(
        self,
        packing: Packing,
        attention: AttentionName = "auto",
        *,
        rope: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(rope=rope, bias=bias)
        self.packing, self.attention = packing, attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths, bias = self.packing.lengths, self.bias
        if not sum(lengths):
            return q
        how = self.attention
        if how == "auto":
            how = "varlen" if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) else "per_image"
        if how == "varlen":
            if bias is None:
                return _attend_varlen(q, k, v, self.packing)
            how = "batched"  # which takes a bias
        if how == "batched":
            padded = (pad(x, self.packing) for x in (q, k, v))
            bias = None if bias is None else pad(bias, self.packing)
            out = _attend(*padded, padding_mask(self.packing), bias)
            return out.flatten(0, 1).index_select(0, self.packing.slots)
        if len(set(lengths)) == 1:
            shape = (len(lengths), lengths[0])
            bias = None if bias is None else bias.unflatten(0, shape)
            return _attend(*(x.unflatten(0, shape) for x in (q, k, v)), None, bias).flatten(0, 1)
        biases = [None] * len(lengths) if bias is None else [row[None] for row in bias.split(lengths)]
        images = zip(q.split(lengths), k.split(lengths), v.split(lengths), biases, strict=True)
        return torch.cat([_attend(qi[None], ki[None], vi[None], None, bi)[0] for qi, ki, vi, bi in images if len(qi)])

    def per_image(self, values: Tensor) -> Tensor:
        lengths = torch.tensor(self.packing.lengths, device=values.device)
        return values.repeat_interleave(lengths)[:, None]


class PackedAmong(Packed):
    """Packed tokens (t, c) of which only some are computed; the others of their image are visible as keys and values.

    Args:
        packing: of the tokens that are computed.
        among: of all that are visible, those of `packing` included.
    """

    def __init__(
        self, packing: Packing, among: Packing, *, rope: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        super().__init__(packing, rope=rope, bias=bias)
        self.among = among
        self.rows = torch.searchsorted(among.index, packing.index)  # of the computed tokens among the visible ones

    def queries(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = self.packing, self.among
        if self.bias is None and len(set(queries.lengths)) == len(set(keys.lengths)) == 1:
            rows = ((x, part.lengths) for x, part in ((q, queries), (k, keys), (v, keys)))
            return _attend(*(x.unflatten(0, (len(lengths), lengths[0])) for x, lengths in rows)).flatten(0, 1)
        bias = None if self.bias is None else pad(self.bias, keys)
        out = _attend(pad(q, queries), pad(k, keys), pad(v, keys), padding_mask(keys), bias)
        return out.flatten(0, 1).index_select(0, queries.slots)


class PackedRecalling(PackedAmong):
    """Packed tokens (t, c), all of which are computed; keys and values of further ones of their image are known.

    Args:
        among: of all that are visible, those of `packing` included.
        keys, values: of all those, (s, h, d) each, the keys rotated; rows of `packing` are not looked at.
        rope: of the tokens of `packing`.
    """

    def __init__(
        self, packing: Packing, among: Packing, keys: Tensor, values: Tensor, *, rope: Tensor | None = None
    ) -> None:
        super().__init__(packing, among, rope=rope)
        self.keys, self.values = keys, values

    def queries(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = ((self.keys, k), (self.values, v))
        return super().attend(q, *(known.to(q.dtype).index_copy(0, self.rows, own) for known, own in pairs))


def any_length() -> AbstractContextManager[None]:
    """Attention over numbers of tokens that change from image to image, while it lasts: not cuDNN's.

    Newer versions of torch prefer that on large GPUs; it is planned anew for every shape, tens of milliseconds each.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """(b, n, h, d) each; of the keys, (b, n) each, which are visible, and what is added to their logits."""
    mask = None if visible is None else visible[:, None, None, :]
    if visible is not None and bias is None and torch.compiler.is_exporting():
        bias = q.new_zeros(visible.shape)  # ONNX looks for rows that see nothing in a mask of bools
    if bias is not None:
        bias = bias.to(q.dtype)[:, None, None, :]
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = packing.cu_seqlens, max(packing.lengths)
    with any_length():
        out = varlen_attn(q, k, v, ends, ends, longest, longest)
    assert isinstance(out, Tensor)
    return out
