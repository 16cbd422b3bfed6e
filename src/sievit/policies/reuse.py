"""Reuse over frames: of a video only those tokens are computed where the picture changed. Control: no paper's method.

Letters: b images, n grid tokens, c channels.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sievit.config import Config, ConfigError, Count, NonNegative, Share
from sievit.policies.base import Notes, Policy
from sievit.tokens import Tokens, Trace

NOTES = VALUES, DIRTY, KNOWN, AGE, END, MEMORY, MOVED = ("values", "dirty", "known", "age", "end", "memory", "moved")
"""Names of what the trace remembers for the next frame."""
CHOICE = ("keep", "order", "real")
"""The fields of a canvas that are a choice; the inner policy's stands in the notes, as asked_keep and so on."""


@dataclass(frozen=True, kw_only=True)
class ReuseConfig(Config):
    """What of the frame before is taken over.

    Attributes:
        threshold: a token is computed again where its patch embedding is further than this from that of the frame in
            which the token was last computed. The unit is the typical distance of the frame's embeddings from their
            mean; at 0 every change counts.
        cut: where more than this share of the tokens changed or are too old, all are computed.
        refresh: a token is computed again after so many frames in any case; None for never.
    """

    threshold: NonNegative = 0.4
    cut: Share = 0.5
    refresh: Count | None = 32


@dataclass(frozen=True)
class Past:
    """What a frame leaves for the next one; a value.

    Where the camera moves, no more than its embeddings: remembering takes time, and nothing of it would be used.

    Attributes:
        valid: (b, n) bool. grid: (h, w) in tokens.
        values: per block the (b, n, c) that went into it. The first are the embeddings with which each token was last
            computed.
        memory: per block (b, p+n, 2c), the keys and values that it computed.
        known: per block (b, n) bool: the tokens whose values behind it, keys and values are those that it computed.
        ends: (b, n, c) of the canvas behind each piece of the loop, by the number of blocks up to there.
        age: (b, n) int, in how many frames each token was not computed.
        moved: of every image more than `cut` changed, or the size.
    """

    valid: Bool[Tensor, "b n"]
    grid: tuple[int, int]
    values: tuple[Float[Tensor, "b n c"], ...]
    memory: tuple[Float[Tensor, "b t kv"], ...]
    known: tuple[Bool[Tensor, "b n"], ...]
    ends: dict[int, Float[Tensor, "b n c"]]
    age: Int[Tensor, "b n"]
    moved: bool


class Reuse(Policy):
    """Any policy that selects tokens, over the frames of a video. Control: a token is computed where its patch changed,
    and in a block that the policy lets compute it and in which the frame before did not; all others have in each block
    the value, key and value that they had there, and are seen by those that are computed.

    Not in checkpoints: `sievit.models.stream` makes one for each frame.
    """

    def __init__(self, config: ReuseConfig, inner: Policy, past: Past | None) -> None:
        """
        Args:
            past: of the frame before; None: there is none, and all tokens are computed that `inner` chooses.

        Raises:
            ConfigError: `inner` does more than select tokens before blocks.
        """
        super().__init__()
        self.config, self.depth, self.past = config, inner.depth, past
        self.needs = inner.needs  # ty: ignore[invalid-attribute-access]
        self._inner = (inner,)  # its weights are the model's
        restores = type(inner).after_piece is not Policy.after_piece
        if restores or inner.propagates or any(inner.decides_inside(index) for index in range(inner.depth)):
            _refuse(inner)

    @property
    def inner(self) -> Policy:
        """The policy that is asked first."""
        return self._inner[0]

    def rejoins_at(self, index: int) -> bool:
        return False  # it is seen to in `before_block`

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        past, notes = self._fitting(tokens), Notes()
        if index == 0:
            dirty, notes[AGE], notes[MOVED] = self._changed(tokens)
            if self.past is not None and self.past.moved and notes[MOVED]:  # no more than embeddings is remembered
                dirty, notes[VALUES] = None, tokens.patches.clone()
        else:
            dirty = trace.aux[-1].get(DIRTY)
        if dirty is None:
            asked, own = self._asked(index, tokens, trace)
            return asked, notes | own
        if past is not None:
            tokens = _taken_over(tokens, past.values[index], dirty)
        notes[VALUES] = tokens.patches.clone()  # blocks may write into the canvas
        asked, own = self._asked(index, tokens, trace)
        keep = asked.valid_or_all() if asked.keep is None else asked.keep
        known = torch.zeros_like(keep) if past is None else past.known[index] & ~dirty
        dirty = dirty | (keep & ~known)
        notes |= {DIRTY: dirty, KNOWN: known | keep, **own}
        b, total, channels = tokens.x.shape
        memory = tokens.x.new_zeros(b, total, 2 * channels) if past is None else past.memory[index]
        return replace(asked.select(keep & dirty, context=keep & ~dirty), memory=memory), notes

    def after_piece(self, tokens: Tokens, trace: Trace) -> Tokens:
        past = self._fitting(tokens)
        end = None if past is None else past.ends.get(len(trace.keep))
        if end is not None and DIRTY in trace.aux[-1]:
            tokens = _taken_over(tokens, end, trace.aux[-1][DIRTY])
        return tokens

    def piece_notes(self, tokens: Tokens) -> Notes:
        return {END: tokens.patches.clone()}

    def after_blocks(self, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        return self.inner.after_blocks(_chosen(tokens, trace), _as_asked(trace))

    def left(self, trace: Trace) -> Past:
        """What a pass leaves for the next frame."""
        blocks = trace.aux[: len(trace.keep)]
        whole = blocks if DIRTY in blocks[0] else ()
        return Past(
            valid=trace.valid,
            grid=trace.grid,
            values=tuple(aux[VALUES] for aux in whole or blocks[:1]),
            memory=tuple(aux[MEMORY] for aux in whole),
            known=tuple(aux[KNOWN] for aux in whole),
            ends={i: aux[END] for i, aux in enumerate(whole, start=1) if END in aux},
            age=blocks[0][AGE],
            moved=bool(blocks[0][MOVED]),
        )

    def _fitting(self, tokens: Tokens) -> Past | None:
        """The frame before; None where not all of it is known, or it was of another size, or one of other images."""
        return self.past if self.past is not None and self.past.memory and _alike(self.past, tokens) else None

    def _changed(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """(b, n) bool, the tokens that have to be computed; the (b, n) ages of all; and whether all images moved."""
        past, x, valid = self.past, tokens.patches.float(), tokens.valid_or_all()
        if past is None or not _alike(past, tokens):
            everything = torch.ones_like(valid)
            return everything, torch.zeros_like(valid, dtype=torch.int64), everything.new_tensor(past is not None)
        there = valid[..., None] / valid.sum(1).clamp(min=1)[:, None, None]
        mean = (x * there).sum(1, keepdim=True)
        typical = ((x - mean).square() * there).sum((1, 2)).sqrt()
        dirty = (x - past.values[0].float()).norm(dim=2) > self.config.threshold * typical[:, None]
        moved = self._most(dirty, valid) | (valid != past.valid).any(1)
        if self.config.refresh is not None:
            dirty |= past.age + 1 >= self.config.refresh
        dirty |= (moved | self._most(dirty, valid))[:, None]
        if not past.memory:
            dirty = torch.ones_like(dirty)
        return dirty, (past.age + 1).masked_fill(dirty, 0), moved.all()

    def _most(self, part: Bool[Tensor, "b n"], valid: Bool[Tensor, "b n"]) -> Bool[Tensor, " b"]:
        """(b,) bool: of which images this is more than `cut` of the tokens."""
        return (part & valid).sum(1) / valid.sum(1).clamp(min=1) > self.config.cut

    def _asked(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        """The canvas with the choice of the inner policy, and its notes."""
        before, seen = _chosen(tokens, trace), _as_asked(trace)
        asked, notes = self.inner.before_block(index, before, seen)
        if self.inner.rejoins_at(index):
            asked = asked.select(None)
        if asked.context is not None:
            _refuse(self.inner)
        choice = {name: value for name in CHOICE if (value := getattr(asked, name)) is not None}
        return asked, notes | {f"asked_{name}": value for name, value in choice.items()}


def _alike(past: Past, tokens: Tokens) -> bool:
    """Whether the frames have one size, and there are as many."""
    return past.grid == tokens.grid and past.values[0].shape == tokens.patches.shape


def without_values(trace: Trace) -> Trace:
    """The trace without the notes that only the next frame needs."""
    aux = tuple({name: value for name, value in notes.items() if name not in NOTES} for notes in trace.aux)
    return replace(trace, aux=aux)


def _taken_over(tokens: Tokens, values: Tensor, dirty: Tensor) -> Tokens:
    """The canvas with these values (b, n, c) of all tokens but the dirty ones (b, n)."""
    return tokens.replace_patches(torch.where(dirty[..., None], tokens.patches, values.to(tokens.x.dtype)))


def _chosen(tokens: Tokens, trace: Trace) -> Tokens:
    """The canvas with the inner policy's last choice."""
    notes = trace.aux[-1] if trace.aux else {}
    return replace(tokens, context=None, memory=None, **{name: notes.get(f"asked_{name}") for name in CHOICE})


def _as_asked(trace: Trace) -> Trace:
    """The trace as if all had been computed that the inner policy asked for."""
    keep = tuple(aux.get("asked_keep", trace.valid) for aux in trace.aux[: len(trace.keep)])
    return replace(trace, keep=keep, mlp=keep)


def _refuse(policy: Policy) -> None:
    raise ConfigError(
        f"{type(policy).__name__}: reuse over frames goes with policies that only select tokens before blocks; this "
        "one merges, adds or updates tokens, shows some that it does not compute, or decides inside of blocks"
    )
