"""The canvas: tokens that never leave their place, and the trace of which of them took part where.

Letters: b images, n = h*w grid tokens, p prefix tokens, t = p+n tokens, c channels. The grid is row-major.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sievit.rows import chosen_first, is_fixed, most_of, taken, with_products, with_sums


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch of token canvases. A value: operations return a new one.

    Attributes:
        x: (b, p+n, c); the p prefix tokens stand first and always take part: class token, registers, extra tokens.
        grid: (h, w) in tokens.
        num_prefix: p.
        num_extra: how many of the prefix tokens, the last ones, were added by a policy (`with_extra`).
        valid: (b, n) bool, the tokens that stand on pixels of their image; None when all do. Tokens on pixels that
            only pad a batch are never computed, whatever a policy chooses.
        keep: (b, n) bool, the tokens that take part in the next block; None when all valid ones do.
        gate: (b, n) float, the value of `keep` with the straight-through gradient of the decision; training only.
        context: (b, n) bool, tokens that do not take part but are visible, as keys and values, to those that do; None
            for none.
        order: (b, k) int64: positions on the grid, equally many in every image, the ones of `keep` among them.
            With it no shape depends on what is in the images.
        real: (b, k) bool, which of `order` take part; None for all of them.
        memory: (b, p+n, 2c), keys (not rotated) and values in the next block: those of `context` are taken from here,
            those of the tokens that take part come back in it; None: all are computed, and none kept.
        owner: (b, n) int64: the position of the token that stands for each token (`merge`); None: each for itself.
        source: (b, n) int64: the position of the token whose update each one gets that is left out
            (`vit.propagation`); None: they stay as they are.
        rope: (b or 1, t, r = 2d), sines and cosines of each token's rotary position, which goes where the token goes;
            None in families without.
    """

    x: Float[Tensor, "b t c"]
    grid: tuple[int, int]
    num_prefix: int = 0
    num_extra: int = 0
    valid: Bool[Tensor, "b n"] | None = None
    keep: Bool[Tensor, "b n"] | None = None
    gate: Float[Tensor, "b n"] | None = None
    context: Bool[Tensor, "b n"] | None = None
    order: Int[Tensor, "b k"] | None = None
    real: Bool[Tensor, "b k"] | None = None
    memory: Float[Tensor, "b t kv"] | None = None
    owner: Int[Tensor, "b n"] | None = None
    source: Int[Tensor, "b n"] | None = None
    rope: Float[Tensor, "#b t r"] | None = None

    def __post_init__(self) -> None:
        n = self.grid[0] * self.grid[1]
        assert self.x.ndim == 3 and self.x.shape[1] == self.num_prefix + n, (self.x.shape, self.grid, self.num_prefix)
        for mask in (self.valid, self.keep, self.gate, self.context, self.owner, self.source):
            assert mask is None or mask.shape == (self.x.shape[0], n), (mask.shape, self.grid)
        assert self.rope is None or (
            self.rope.shape[0] in (1, self.x.shape[0]) and self.rope.shape[1] == self.x.shape[1] and self.rope.ndim == 3
        ), self.rope.shape

    @property
    def patches(self) -> Float[Tensor, "b n c"]:
        """(b, n, c): the grid tokens without the prefix."""
        return self.x[:, self.num_prefix :]

    @property
    def extra(self) -> Float[Tensor, "b e c"]:
        """(b, e, c): the tokens without a place on the grid that a policy added."""
        return self.x[:, self.num_prefix - self.num_extra : self.num_prefix]

    def directions(self) -> Float[Tensor, "b n c"]:
        """(b, n, c): the grid tokens as unit vectors, in float32 or better."""
        return F.normalize(self.patches.to(torch.promote_types(self.x.dtype, torch.float32)), dim=-1)

    def map(self) -> Float[Tensor, "b c h w"]:
        """(b, c, h, w): the grid tokens as a feature map, channels last."""
        return self.patches.unflatten(1, self.grid).permute(0, 3, 1, 2)

    def replace_patches(self, patches: Float[Tensor, "b n c"]) -> "Tokens":
        """The same canvas with other values (b, n, c) of its grid tokens."""
        if self.num_prefix == 0:
            return replace(self, x=patches)
        return replace(self, x=torch.cat([self.x[:, : self.num_prefix], patches], dim=1))

    def with_extra(self, extra: Float[Tensor, "b e c"] | None) -> "Tokens":
        """The canvas with extra tokens (b, e, c), instead of those that it has; None for none.

        They have no place on the grid, always take part, and rotary positions leave them as they are.
        """
        first = self.num_prefix - self.num_extra
        added = self.x[:, :0] if extra is None else extra.to(self.x.dtype)
        rope = self.rope
        if rope is not None:
            still = rope.new_zeros(rope.shape[0], added.shape[1], rope.shape[2])
            still[..., rope.shape[2] // 2 :] = 1
            rope = torch.cat([rope[:, :first], still, rope[:, self.num_prefix :]], dim=1)
        x = torch.cat([self.x[:, :first], added, self.patches], dim=1)
        return replace(self, x=x, num_prefix=first + added.shape[1], num_extra=added.shape[1], rope=rope)

    def select(
        self,
        keep: Bool[Tensor, "b n"] | None,
        gate: Float[Tensor, "b n"] | None = None,
        context: Bool[Tensor, "b n"] | None = None,
    ) -> "Tokens":
        """The canvas with another choice for the next block: (b, n) bool, None for all; padding never takes part."""
        if keep is not None and self.valid is not None:
            keep = keep & self.valid
        return replace(self, keep=keep, gate=gate, context=context, order=None, real=None, source=None)

    def select_order(self, order: Int[Tensor, "b k"], keep: Bool[Tensor, "b n"] | None = None) -> "Tokens":
        """The canvas with another choice: equally many positions in every image, (b, k).

        Args:
            keep: (b, n) bool, those of `order` that take part; None for all, where no image has padding.
        """
        if keep is None:
            assert self.valid is None, "on padding nothing takes part"
            return replace(self.select(torch.zeros_like(self.valid_or_all()).scatter(1, order, True)), order=order)
        chosen = self.select(keep)
        assert chosen.keep is not None
        return replace(chosen, order=order, real=chosen.keep.gather(1, order))

    def merge(self, owner: Int[Tensor, "b n"]) -> "Tokens":
        """Groups of grid tokens become one token each, which alone takes part; its value is the mean of its group.

        Args:
            owner: (b, n) int64, the position of the token that stands for each token; such a token owns itself. Where
                tokens are merged already, whole groups go on to their new owner's.
        """
        if self.owner is not None:
            owner = owner.gather(1, self.owner)
        stands = owner == torch.arange(owner.shape[1], device=owner.device)
        keep = stands if self.keep is None else stands & self.keep
        return replace(self.replace_patches(self._means(owner)).select(keep), owner=owner)

    def averaged(self) -> "Tokens":
        """The canvas with each token at the mean of itself and those that follow it, where some do (`source`)."""
        owner = self.leaders()
        return self if owner is None or self.source is None else self.replace_patches(self._means(owner))

    def _means(self, owner: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """(b, n, c): of each token that stands for others the mean of its group; of the rest what they are."""
        whole = self.unmerge().patches
        return self._sums(whole, owner) / self._sizes(owner).clamp(min=1)[..., None].to(whole.dtype)

    def _sums(self, values: Float[Tensor, "b n d"], owner: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """(b, n, d): of each token that stands for others the sum of its group; of the rest what they are."""
        others = (owner != torch.arange(owner.shape[1], device=owner.device)) & self.valid_or_all()
        if self.order is None or not is_fixed(owner):
            return with_sums(values, owner, others)
        owners, rest = self.parted()
        return with_products(values, owner, others, owners=owners, rest=rest)

    def parted(self) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b m"]]:
        """Positions with the chosen ones of every image among them, and positions with all others among them.

        Those of one image are no more than they have to be; where images differ in number, the rest is filled up.
        """
        assert self.keep is not None
        n = self.keep.shape[1]
        if self.order is None:
            chosen, rest = (chosen_first(part)[:, : most_of(part)] for part in (self.keep, ~self.keep))
            return chosen, rest
        if self.real is None:
            return self.order, chosen_first(~self.keep)[:, : n - self.order.shape[1]]
        return self.order, torch.arange(n, device=self.order.device).expand_as(self.keep)

    def leaders(self) -> Int[Tensor, "b n"] | None:
        """(b, n): the position of the token that each one is merged with or follows; None: each is for itself."""
        if self.owner is not None or self.source is None or self.keep is None:
            return self.owner
        first = torch.arange(self.source.shape[1], device=self.source.device)
        return torch.where(self.keep, first, self.source)

    def unmerge(self) -> "Tokens":
        """The canvas with each merged token at the value of its owner, and each for itself again."""
        if self.owner is None:
            return self
        return replace(self.replace_patches(taken(self.patches, self.owner)), owner=None)

    def sizes(self) -> Float[Tensor, "b n"] | None:
        """(b, n) float: how many tokens each one stands for, itself and those that are merged with it or follow it.

        None where each is for itself.
        """
        owner = self.leaders()
        return None if owner is None else self._sizes(owner)

    def _sizes(self, owner: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        weight = self._sums(self.valid_or_all()[..., None].to(torch.float32), owner)[..., 0]
        return weight * (owner == torch.arange(owner.shape[1], device=owner.device))

    def taking_part(self) -> Bool[Tensor, "b t"] | None:
        """(b, p+n) bool: what the next block computes, prefix included; None when it is everything."""
        keep = self.valid if self.keep is None else self.keep
        return None if keep is None else self.with_prefix(keep, value=True)

    def with_prefix(self, values: Shaped[Tensor, "b n"], *, value: float) -> Shaped[Tensor, "b t"]:
        """(b, p+n) of values (b, n) of the grid tokens, and `value` for the prefix."""
        return F.pad(values, (self.num_prefix, 0), value=value) if self.num_prefix else values

    def valid_or_all(self) -> Bool[Tensor, "b n"]:
        """(b, n) bool, never None."""
        if self.valid is not None:
            return self.valid
        return self.x.new_ones(self.x.shape[0], self.grid[0] * self.grid[1], dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction of a semantic head for every grid token of a canvas.

    Attributes:
        maps: (b, k, n) logits per class and token.
        classes: (b, k, 2) logits of "the class is in the image" (index 0) and "it is not", of heads that ask this
            (ATM); None of heads that classify each token by itself.
        fine: (b, k, y, x) logits of heads with several predictions per token; `maps` is then their mean per token.
    """

    maps: Float[Tensor, "b k n"]
    classes: Float[Tensor, "b k 2"] | None = None
    fine: Float[Tensor, "b k y x"] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        values = {"maps": self.maps, "classes": self.classes, "fine": self.fine}
        return {name: value for name, value in values.items() if value is not None}

    def scores(self) -> Float[Tensor, "b k n"]:
        """(b, k, n) in 0..1: softmax over the classes, or SegViT's product of presence and sigmoid of the map."""
        if self.classes is None:
            return self.maps.softmax(1)
        return self.classes.softmax(-1)[..., :1] * self.maps.sigmoid()


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened in a pass over the blocks; a value that the block loop returns.

    Attributes:
        grid: (h, w) in tokens.
        valid: (b, n) bool.
        keep: per block (b, n) bool: the tokens that took part in its attention.
        mlp: per block (b, n) bool: the tokens that its MLP computed; others than `keep` only where a policy decides
            between the two.
        prefix: per block the number of prefix tokens, which always take part, in its attention and in its MLP.
        aux: per block what the policy remembers, by name, e.g. `logits` (b, n, 2), `gate` (b, n); and at the end of the
            pass once more, what it remembers after the last block.
        tokens: in training the canvas at the end of the pass, for losses.
    """

    grid: tuple[int, int]
    valid: Bool[Tensor, "b n"]
    keep: tuple[Bool[Tensor, "b n"], ...] = ()
    mlp: tuple[Bool[Tensor, "b n"], ...] = ()
    prefix: tuple[tuple[int, int], ...] = ()
    aux: tuple[dict[str, Tensor], ...] = field(default=())
    tokens: Tokens | None = None

    @classmethod
    def start(cls, tokens: Tokens) -> "Trace":
        """The trace before the first block."""
        return cls(grid=tokens.grid, valid=tokens.valid_or_all())

    def record(self, tokens: Tokens, aux: dict[str, Tensor], parts: Sequence[bool]) -> "Trace":
        """The trace with what was computed of one choice.

        Args:
            aux: what the policy remembers of the choice.
            parts: the halves of blocks that were computed, in their order: False an attention, True an MLP.
        """
        chosen = self.valid if tokens.keep is None else tokens.keep
        keep, mlp, prefix, notes = list(self.keep), list(self.mlp), list(self.prefix), list(self.aux)
        if parts[0]:  # the choice was made inside a block
            notes[-1], aux = {**notes[-1], **aux}, {}
        for is_mlp in parts:
            if is_mlp:
                mlp.append(chosen)
                prefix[-1] = (prefix[-1][0], tokens.num_prefix)
                continue
            keep.append(chosen)
            prefix.append((tokens.num_prefix, tokens.num_prefix))
            seen = {"context" if tokens.memory is None else "recalled": tokens.context, "memory": tokens.memory}
            notes.append({**aux, **{name: value for name, value in seen.items() if value is not None}})
            aux = {}
        return replace(self, keep=tuple(keep), mlp=tuple(mlp), prefix=tuple(prefix), aux=tuple(notes))

    def noted(self, aux: dict[str, Tensor]) -> "Trace":
        """The trace with more to remember of its last block."""
        return replace(self, aux=(*self.aux[:-1], {**self.aux[-1], **aux})) if aux else self

    def finish(self, tokens: Tokens | None, aux: dict[str, Tensor]) -> "Trace":
        """The trace of a pass that is over."""
        return replace(self, aux=(*self.aux, aux), tokens=tokens)

    def last(self, name: str) -> Tensor | None:
        """What was remembered last under this name; None for nothing."""
        return next((aux[name] for aux in reversed(self.aux) if name in aux), None)

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The predictions of the heads, in the order of the stages that were computed."""
        return tuple(Prediction(aux["maps"], aux.get("classes"), aux.get("fine")) for aux in self.aux if "maps" in aux)

    @property
    def head_blocks(self) -> tuple[int, ...]:
        """The blocks behind which the heads of `predictions` stand."""
        return tuple(i - 1 for i, aux in enumerate(self.aux) if "maps" in aux)

    @property
    def exited(self) -> tuple[Bool[Tensor, "b n"], ...]:
        """Per stage (b, n) bool: the tokens that have left for good, at it or before."""
        return tuple(aux["exited"] for aux in self.aux if "exited" in aux)

    @staticmethod
    def join(traces: Sequence["Trace"]) -> "Trace":
        """One trace of several batches with canvases of the same grid.

        What is remembered of one batch and not of another (there was nothing to remember) is zero in the other.
        """
        first = traces[0]
        if len(traces) == 1:
            return first
        return replace(
            first,
            valid=torch.cat([trace.valid for trace in traces]),
            keep=tuple(torch.cat(parts) for parts in zip(*(trace.keep for trace in traces), strict=True)),
            mlp=tuple(torch.cat(parts) for parts in zip(*(trace.mlp for trace in traces), strict=True)),
            aux=tuple(
                {name: _joined(name, parts, traces) for name in dict.fromkeys(key for part in parts for key in part)}
                for parts in zip(*(trace.aux for trace in traces), strict=True)
            ),
            tokens=None,
        )

    def counts(self) -> Int[Tensor, "depth b"]:
        """(depth, b) int: tokens that the attention of each block computed per image, prefix included."""
        return _counted(self.keep, [before for before, _ in self.prefix])

    def mlp_counts(self) -> Int[Tensor, "depth b"]:
        """(depth, b) int: tokens that the MLP of each block computed per image, prefix included."""
        return _counted(self.mlp, [after for _, after in self.prefix])

    def seen(self) -> Int[Tensor, "depth b"]:
        """(depth, b) int: tokens that the attention was computed from: its own, and others that were visible."""
        return self._with("context", "recalled")

    def projected(self) -> Int[Tensor, "depth b"]:
        """(depth, b) int: tokens whose keys and values were computed: of those that were `seen` all but the ones that
        were taken from `Tokens.memory`."""
        return self._with("context")

    def _with(self, *names: str) -> Int[Tensor, "depth b"]:
        """(depth, b) int: tokens of each block's attention and those of these notes, prefix included."""
        pairs = zip(self.keep, self.aux[: len(self.keep)], strict=True)
        masks = [torch.stack([keep, *(aux[name] for name in names if name in aux)]).any(0) for keep, aux in pairs]
        return _counted(masks, [before for before, _ in self.prefix])

    def shares(self) -> Float[Tensor, "depth b"]:
        """(depth, b) float: the share of an image's valid grid tokens that took part in each block."""
        kept = torch.stack([keep.sum(1) for keep in self.keep])
        return kept / self.valid.sum(1).clamp(min=1)


def _counted(masks: Sequence[Bool[Tensor, "b n"]], prefix: Sequence[int]) -> Int[Tensor, "depth b"]:
    """(depth, b) int: of masks (b, n) the tokens, and so many more."""
    return torch.stack([mask.sum(1) + more for mask, more in zip(masks, prefix, strict=True)])


def _joined(name: str, parts: Sequence[dict[str, Tensor]], traces: Sequence[Trace]) -> Tensor:
    """One thing that batches remember of one block, for all their images."""
    known = next(part[name] for part in parts if name in part)
    pairs = zip(parts, traces, strict=True)
    return torch.cat([part.get(name, known.new_zeros(len(trace.valid), *known.shape[1:])) for part, trace in pairs])
