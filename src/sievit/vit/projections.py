"""Queries, keys and values of one block, as policies see them: attention, keys and norms of values by position.

Letters: b images, n = h*w grid tokens, p prefix tokens, h heads, d channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sievit.tokens import Tokens
from sievit.vit.block import Block, Heads
from sievit.vit.packed import Packing, pack, unpack
from sievit.vit.rope import rotate

Rows = Callable[[Tensor], Tensor]
"""Rows of tokens, in the arrangement in which they were computed, to (b, p+n, ...), zero for all other tokens."""


@dataclass(frozen=True)
class Half:
    """The queries, keys and values of an attention that was computed, and where their rows stand on the canvas."""

    heads: Heads
    computed: Rows
    visible: Rows


@dataclass(frozen=True, kw_only=True)
class Projections:
    """What a policy may ask of one block's attention, over the tokens that take part in it (`policies.base`).

    Attributes:
        part: (b, p+n) bool, the tokens that take part.
        query: a range of positions to their queries, (b, ., h, d). key, value: (b, p+n, h, d); zero elsewhere.
        class_token: `attention` is that of the class token, not of the mean query.
    """

    block: Block
    tokens: Tokens
    part: Bool[Tensor, "b t"]
    query: Callable[[slice], Tensor]
    key: Callable[[], Tensor]
    value: Callable[[], Tensor]
    class_token: bool

    @classmethod
    def before(cls, block: Block, tokens: Tokens, *, class_token: bool) -> "Projections":
        """Of the next block; each projection is computed when it is used, for the tokens that take part."""
        attn, part = block.attn, tokens.taking_part()
        if tokens.keep is None or tokens.order is not None or part is None:  # no shape depends on the choice
            x = block.norm1(tokens.x)
            place: Rows = lambda rows: rows  # noqa: E731
        else:
            packing = Packing.of(part)
            x, place = block.norm1(pack(tokens.x, packing)), placed(packing, part)

        def query(which: slice) -> Tensor:
            if which.stop is not None and tokens.num_prefix:  # of the prefix alone
                return attn.q_norm(attn.project(block.norm1(tokens.x[:, which]), 0, 1)[0])
            return place(attn.q_norm(attn.project(x, 0, 1)[0]))[:, which]

        def key() -> Tensor:
            return place(attn.k_norm(attn.project(x, 1, 2)[0]))

        def value() -> Tensor:
            return place(attn.project(x, 2, 3)[0])

        part = _or_all(part, tokens)
        return cls(block=block, tokens=tokens, part=part, query=query, key=key, value=value, class_token=class_token)

    @classmethod
    def inside(cls, block: Block, tokens: Tokens, half: Half, *, class_token: bool) -> "Projections":
        """Of a block whose attention was computed."""
        return cls(
            block=block,
            tokens=tokens,
            part=_or_all(tokens.taking_part(), tokens),
            query=lambda which: half.computed(half.heads.q)[:, which],
            key=lambda: half.visible(half.heads.k),
            value=lambda: half.visible(half.heads.v),
            class_token=class_token,
        )

    def attention(self) -> Float[Tensor, "b n"]:
        """(b, n): the attention that the class token gives to each grid token, mean over heads; zero for tokens that
        take no part.

        In families without a class token it is that of the mean query of the grid tokens that take part.
        """
        tokens, attn, part = self.tokens, self.block.attn, self.part
        rows = slice(0, 1) if self.class_token else slice(tokens.num_prefix, None)
        q, k = self.query(rows), self.key()
        if tokens.rope is not None:
            q = rotate(q, tokens.rope[:, rows], interleaved=attn.interleaved)
            k = rotate(k, tokens.rope, interleaved=attn.interleaved)
        if not self.class_token:
            grid = part[:, tokens.num_prefix :]
            share = (grid / grid.sum(1, keepdim=True).clamp(min=1)).to(q.dtype)
            q = (q * share[..., None, None]).sum(1, keepdim=True)
        logits = torch.einsum("bhd,bnhd->bhn", q[:, 0], k).float() / k.shape[-1] ** 0.5
        return logits.masked_fill(~part[:, None], float("-inf")).softmax(-1).mean(1)[:, tokens.num_prefix :]

    def keys(self) -> Float[Tensor, "b n d"]:
        """(b, n, d): the keys of the grid tokens, mean over heads, without rotary positions."""
        return self.key()[:, self.tokens.num_prefix :].mean(2)

    def value_norms(self) -> Float[Tensor, "b n"]:
        """(b, n): the Euclidean norm of the value of each grid token, over all heads."""
        return self.value()[:, self.tokens.num_prefix :].float().flatten(2).norm(dim=2)


def _or_all(part: Bool[Tensor, "b t"] | None, tokens: Tokens) -> Bool[Tensor, "b t"]:
    """(b, p+n) bool, never None."""
    return tokens.with_prefix(tokens.valid_or_all(), value=True) if part is None else part


def placed(packing: Packing, part: Shaped[Tensor, "b t"]) -> Rows:
    """The rows of packed tokens (t, ...) on the canvas of `part` (b, p+n)."""

    def place(rows: Tensor) -> Tensor:
        canvas = rows.new_zeros(*part.shape, rows[0].numel())
        return unpack(canvas, rows.flatten(1), packing).unflatten(2, rows.shape[1:])

    return place
