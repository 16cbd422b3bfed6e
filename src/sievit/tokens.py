"""The canvas: tokens that never leave their place, and the trace of which of them took part where.

Letters: b images, n = h*w grid tokens, p prefix tokens, c channels. The grid is row-major.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch of token canvases. A value: operations return a new one.

    Attributes:
        x: (b, p+n, c); the p prefix tokens (class, registers) stand first and always take part.
        grid: (h, w) in tokens.
        num_prefix: p.
        valid: (b, n) bool, the tokens that stand on pixels of their image; None when all do. Tokens on pixels that
            only pad a batch are never computed, whatever a policy says.
        keep: (b, n) bool, the tokens that take part in the next block; None when all valid ones do.
        gate: (b, n) float, the value of `keep` with the straight-through gradient of whatever decided; training only.
        context: (b, n) bool, tokens that do not take part but are seen by those that do; None for none.
        order: (b, k) int64, rising: places of tokens, equally many in every image, the ones of `keep` among them. Where
            a policy gives it, no shape depends on what is in the images.
        real: (b, k) bool, which of `order` take part; None for all of them.
        rope: (b or 1, p+n, 2d), sines and cosines of each token's rotary position, which goes wherever the token goes;
            None in families without.
    """

    x: Tensor
    grid: tuple[int, int]
    num_prefix: int = 0
    valid: Tensor | None = None
    keep: Tensor | None = None
    gate: Tensor | None = None
    context: Tensor | None = None
    order: Tensor | None = None
    real: Tensor | None = None
    rope: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.grid[0] * self.grid[1]
        assert self.x.ndim == 3 and self.x.shape[1] == self.num_prefix + n, (self.x.shape, self.grid, self.num_prefix)
        for mask in (self.valid, self.keep, self.gate, self.context):
            assert mask is None or mask.shape == (self.x.shape[0], n), (mask.shape, self.grid)
        assert self.rope is None or (
            len(self.rope) in (1, len(self.x)) and self.rope.shape[1] == self.x.shape[1] and self.rope.ndim == 3
        ), self.rope.shape

    @property
    def patches(self) -> Tensor:
        """(b, n, c): the grid tokens without the prefix."""
        return self.x[:, self.num_prefix :]

    def map(self) -> Tensor:
        """(b, c, h, w): the grid tokens as a feature map, channels last."""
        return self.patches.unflatten(1, self.grid).permute(0, 3, 1, 2)

    def replace_patches(self, patches: Tensor) -> "Tokens":
        """The same canvas with other values (b, n, c) of its grid tokens."""
        if self.num_prefix == 0:
            return replace(self, x=patches)
        return replace(self, x=torch.cat([self.x[:, : self.num_prefix], patches], dim=1))

    def select(self, keep: Tensor | None, gate: Tensor | None = None, context: Tensor | None = None) -> "Tokens":
        """The canvas with another choice for the next block: (b, n) bool, None for all; padding never takes part."""
        if keep is not None and self.valid is not None:
            keep = keep & self.valid
        return replace(self, keep=keep, gate=gate, context=context, order=None, real=None)

    def select_order(self, order: Tensor, keep: Tensor | None = None) -> "Tokens":
        """The canvas with another choice: equally many places in every image, (b, k), rising.

        Args:
            keep: (b, n) bool, those of `order` that take part; None for all, where no image has padding.
        """
        if keep is None:
            assert self.valid is None, "on padding nothing takes part"
            return replace(self.select(torch.zeros_like(self.valid_or_all()).scatter(1, order, True)), order=order)
        chosen = self.select(keep)
        assert chosen.keep is not None
        return replace(chosen, order=order, real=chosen.keep.gather(1, order))

    def taking_part(self) -> Tensor | None:
        """(b, p+n) bool: what the next block computes, prefix included; None when it is everything."""
        keep = self.valid if self.keep is None else self.keep
        if keep is None:
            return None
        prefix = keep.new_ones(keep.shape[0], self.num_prefix)
        return torch.cat([prefix, keep], dim=1) if self.num_prefix else keep

    def valid_or_all(self) -> Tensor:
        """(b, n) bool, never None."""
        if self.valid is not None:
            return self.valid
        return self.x.new_ones(self.x.shape[0], self.grid[0] * self.grid[1], dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a semantic head says of every grid token of a canvas.

    Attributes:
        maps: (b, k, n) logits per class and token.
        classes: (b, k, 2) logits of "the class is in the image" (index 0) and "it is not", of heads that ask this
            (ATM); None of heads that classify each token by itself.
        fine: (b, k, h', w') logits of heads that say more than one thing per token; `maps` is then its mean per token.
    """

    maps: Tensor
    classes: Tensor | None = None
    fine: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        values = {"maps": self.maps, "classes": self.classes, "fine": self.fine}
        return {name: value for name, value in values.items() if value is not None}

    def scores(self) -> Tensor:
        """(b, k, n) in 0..1: softmax over the classes, or SegViT's product of presence and sigmoid of the map."""
        if self.classes is None:
            return self.maps.softmax(1)
        return self.classes.softmax(-1)[..., :1] * self.maps.sigmoid()


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened in a pass over the blocks; a value that the block loop returns.

    Attributes:
        grid: (h, w) in tokens.
        num_prefix: prefix tokens per image, which took part everywhere.
        valid: (b, n) bool.
        keep: per block a (b, n) bool tensor: who took part.
        aux: per block what the policy wants remembered, by name, e.g. `logits` (b, n, 2), `gate` (b, n); and at the end
            of the pass once more, what it remembered after the last block.
    """

    grid: tuple[int, int]
    num_prefix: int
    valid: Tensor
    keep: tuple[Tensor, ...] = ()
    aux: tuple[dict[str, Tensor], ...] = field(default=())

    @classmethod
    def start(cls, tokens: Tokens) -> "Trace":
        """The trace before the first block."""
        return cls(grid=tokens.grid, num_prefix=tokens.num_prefix, valid=tokens.valid_or_all())

    def record(self, tokens: Tokens, aux: dict[str, Tensor]) -> "Trace":
        """The trace with one more block."""
        keep = self.valid if tokens.keep is None else tokens.keep
        if tokens.context is not None:
            aux = {**aux, "context": tokens.context}
        return replace(self, keep=(*self.keep, keep), aux=(*self.aux, aux))

    def finish(self, aux: dict[str, Tensor]) -> "Trace":
        """The trace of a pass that is over."""
        return replace(self, aux=(*self.aux, aux))

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """What the heads said, in the order of the stages that were computed."""
        return tuple(Prediction(aux["maps"], aux.get("classes"), aux.get("fine")) for aux in self.aux if "maps" in aux)

    @property
    def asked(self) -> tuple[int, ...]:
        """The blocks behind which these heads stand."""
        return tuple(i - 1 for i, aux in enumerate(self.aux) if "maps" in aux)

    @property
    def exited(self) -> tuple[Tensor, ...]:
        """Per stage (b, n) bool: the tokens that have left for good, at it or before."""
        return tuple(aux["exited"] for aux in self.aux if "exited" in aux)

    @staticmethod
    def join(traces: Sequence["Trace"]) -> "Trace":
        """One trace of several batches with canvases of the same grid.

        What one batch remembers and another does not (there was nothing to remember) is zero in the other.
        """
        first = traces[0]
        if len(traces) == 1:
            return first
        return replace(
            first,
            valid=torch.cat([trace.valid for trace in traces]),
            keep=tuple(torch.cat(parts) for parts in zip(*(trace.keep for trace in traces), strict=True)),
            aux=tuple(
                {name: _joined(name, parts, traces) for name in dict.fromkeys(key for part in parts for key in part)}
                for parts in zip(*(trace.aux for trace in traces), strict=True)
            ),
        )

    def counts(self) -> Tensor:
        """(depth, b) int: tokens that each block computed per image, prefix included."""
        return torch.stack([keep.sum(1) for keep in self.keep]) + self.num_prefix

    def seen(self) -> Tensor:
        """(depth, b) int: tokens that those were computed from: themselves, and what else was visible as context."""
        pairs = zip(self.keep, self.aux[: len(self.keep)], strict=True)
        return torch.stack([(k | a["context"] if "context" in a else k).sum(1) for k, a in pairs]) + self.num_prefix

    def shares(self) -> Tensor:
        """(depth, b) float: the share of an image's valid grid tokens that took part in each block."""
        kept = torch.stack([keep.sum(1) for keep in self.keep])
        return kept / self.valid.sum(1).clamp(min=1)


def _joined(name: str, parts: Sequence[dict[str, Tensor]], traces: Sequence[Trace]) -> Tensor:
    """One thing that batches remember of one block, for all their images."""
    known = next(part[name] for part in parts if name in part)
    return torch.cat(
        [
            part[name] if name in part else known.new_zeros(len(trace.valid), *known.shape[1:])
            for part, trace in zip(parts, traces, strict=True)
        ]
    )
