"""DToP: tokens whose prediction is certain leave early (ICCV 2023, arXiv 2308.01045)."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from sievit.config import ConfigError, Count, Natural, Rate, Share, variant
from sievit.policies.base import FEWEST, BlockRange, Dial, Head, Notes, Policy, PolicyConfig, register
from sievit.policies.selection import quantile, select_top, tidy
from sievit.tokens import Prediction, Tokens, Trace


@variant("dtop")
@dataclass(frozen=True)
class DToPConfig(PolicyConfig):
    """Early exits at the auxiliary heads of a segmenter; the defaults are the paper's for a ViT-B.

    Attributes:
        thresholds: a token leaves when its grade is above; at 1 no token leaves. One for all auxiliary heads, or one
            each, or one each and one for the last head (which changes the trace, not the result).
        keep_per_class: of the tokens above the threshold the best so many of each class stay, as context.
        grade: what is compared: `max`, the score of the best class; `margin`, its distance to the second; `entropy`,
            one minus the entropy of the scores over its largest value.
        preserve: tokens that left stay visible to the others, as keys and values, with the features they left with.
        rejoin: as of every policy; the last head then judges all tokens.
        static_left: static counts: after each auxiliary head this share of an image's tokens is gone, those with the
            highest grades, the `keep_per_class` best of each class last; the thresholds are not used in
            inference, and no shape depends on what is in the image. A head at which no further token leaves is skipped.
        multiple: the counts of those that are left are rounded up to a multiple of it.
    """

    swept: ClassVar = ("thresholds", (0.8, 0.85, 0.9, 0.95, 0.98))

    thresholds: tuple[Share, ...] = (0.9,)
    keep_per_class: Natural = 5
    grade: Literal["max", "margin", "entropy"] = "max"
    preserve: bool = False
    static_left: tuple[Rate, ...] | None = None
    multiple: Count = 1

    def __post_init__(self) -> None:
        left = self.static_left
        if left is not None and (list(left) != sorted(left)):
            raise ConfigError(f"dtop: static_left are rising shares, not {left}")
        if left is not None and self.preserve:
            raise ConfigError("dtop: static_left does not go with preserve")
        if not self.thresholds:
            raise ConfigError("dtop: thresholds has no value; give at least one")

    def per_stage(self, stages: int) -> tuple[float, ...]:
        """One threshold for each of `stages` heads, the last one's included.

        Raises:
            ConfigError: there are more or fewer than there are heads.
        """
        given = self.thresholds * (stages - 1) if len(self.thresholds) == 1 < stages else self.thresholds
        if stages - 1 <= len(given) <= stages:
            return (*given, 1.0)[:stages]
        raise ConfigError(
            f"dtop: {len(given)} thresholds for {stages - 1} auxiliary heads; give 1, {stages - 1} or {stages}"
        )


@register(DToPConfig)
class DToP(Policy):
    """Auxiliary heads grade the tokens that are left; confident ones keep the prediction and leave (DToP, section 3).

    A token that left is neither computed nor seen by later blocks and heads; its maps stay on the canvas of
    predictions. The trace holds, per stage, `exited` (b, n) and, where the head was computed, `maps` (b, k, n) and
    `classes`.
    """

    needs = ("heads",)
    cascades = True

    def __init__(self, config: DToPConfig, *, embed_dim: int, depth: int, heads: Mapping[int, Head]) -> None:
        super().__init__()
        if max(heads) != depth - 1 or min(heads) < 0:
            raise ConfigError(f"dtop: heads stand behind the blocks {sorted(heads)}; the last is behind {depth - 1}")
        self.config: DToPConfig = config
        self.heads = dict(sorted(heads.items()))
        self.thresholds = dict(zip(self.heads, config.per_stage(len(heads)), strict=True))
        if config.static_left is not None and len(config.static_left) != len(heads) - 1:
            raise ConfigError(
                f"dtop: static_left has {len(config.static_left)} shares for {len(heads) - 1} auxiliary heads; one each"
            )
        self.depth = depth

    def decides_at(self, index: int) -> bool:
        return index == 0 or index - 1 in self.heads

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        if index == 0:
            return tokens.select(None), {}
        if index - 1 not in self.heads:
            return tokens, {}  # the choice stands
        if self.config.static_left is not None and not self.training:
            return self._static_stage(index - 1, tokens, trace)
        aux = self._stage(index - 1, tokens, trace)
        exited = aux["exited"]
        if not torch.compiler.is_exporting() and not exited.any():
            return tokens.select(None), aux
        return tokens.select(~exited, context=exited & tokens.valid_or_all() if self.config.preserve else None), aux

    def after_blocks(self, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        if self.config.static_left is not None and not self.training:
            return tokens, {"exited": _exited(trace), **self._predict(self.depth - 1, tokens, trace).tensors}
        return tokens, self._stage(self.depth - 1, tokens, trace)

    def _static_stage(self, block: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        """The choice of `static_left` behind `block`."""
        assert self.config.static_left is not None
        shares, stage = (0.0, *self.config.static_left), list(self.heads).index(block) + 1
        valid, exited = tokens.valid_or_all(), _exited(trace)
        if shares[stage] == shares[stage - 1]:
            return tokens, {"exited": exited}
        prediction, left = self._predict(block, tokens, trace), valid & ~exited
        scores = prediction.scores().detach()
        cls, grades = scores.argmax(1), graded(scores, self.config.grade)
        represents = _rank_in_class(grades, cls, left, num_classes=scores.shape[1]) < self.config.keep_per_class
        stays = (torch.where(represents, 2.0, 0.0) - grades).masked_fill(exited, -math.inf)
        share, multiple = 1 - shares[stage], self.config.multiple
        tokens = select_top(tokens, stays, share, multiple=multiple, static=True)
        assert tokens.keep is not None
        return tokens, {"exited": valid & ~tokens.keep, **prediction.tensors}

    def _predict(self, block: int, tokens: Tokens, trace: Trace) -> Prediction:
        """The prediction of the head behind `block` for the tokens that take part; elsewhere the last one stands."""
        if tokens.order is None:
            return self.heads[block](tokens, tokens.valid, None)
        order, earlier = tokens.order[:, None], trace.predictions[-1]
        rows = tokens.order[..., None].expand(-1, -1, tokens.x.shape[2])
        some = Tokens(x=tokens.patches.gather(1, rows), grid=(1, order.shape[2]))
        prediction = self.heads[block](some, tokens.real, None)
        order = order.expand(-1, prediction.maps.shape[1], -1)
        maps = prediction.maps
        if tokens.real is not None:
            maps = torch.where(tokens.real[:, None], maps, earlier.maps.gather(2, order))
        return replace(prediction, maps=earlier.maps.scatter(2, order, maps.to(earlier.maps.dtype)))

    def _stage(self, block: int, tokens: Tokens, trace: Trace) -> Notes:
        """Ask the head behind `block`, and let tokens go."""
        threshold, last, exited = self.thresholds[block], block == self.depth - 1, _exited(trace)
        if threshold >= 1 and not last and not self.training:
            return {"exited": exited}  # the prediction of the head would change nothing
        left = tokens.valid_or_all() & ~exited
        all_tokens = last and self.config.rejoin
        earlier = trace.predictions[-1] if trace.predictions and not all_tokens else None
        whole = not torch.compiler.is_exporting() and bool(left.all())
        part = tokens.valid if all_tokens else None if whole else left
        prediction = self.heads[block](tokens, part, earlier)
        leaving = leave(prediction, left, threshold, keep_per_class=self.config.keep_per_class, grade=self.config.grade)
        return {"exited": exited | leaving, **prediction.tensors}

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        if index - 1 not in self.heads:
            return {}
        stage, last = list(self.heads).index(index - 1), index == self.depth
        left = (0.0, *(self.config.static_left or ()), 0.0)
        computed = self.thresholds[index - 1] < 1 if self.config.static_left is None else left[stage + 1] > left[stage]
        none = torch.zeros_like(tokens.valid_or_all())
        return {"exited": none, "maps": none[:, None]} if computed or last else {"exited": none}

    @property
    def is_static(self) -> bool:
        return self.config.static_left is not None

    @property
    def is_ragged(self) -> bool:
        return not self.is_static and not self.config.preserve

    @property
    def _stages(self) -> tuple[int, ...]:
        """The blocks of the auxiliary heads."""
        return tuple(self.heads)[:-1]

    def ranges(self) -> list[BlockRange]:
        left = self.config.static_left
        if left is None:
            leaving = [self.thresholds[block] < 1 for block in self._stages]
        else:
            leaving = [share > before for share, before in zip(left, (0.0, *left), strict=False)]
        return [BlockRange(block + 1, self.depth) for block, yes in zip(self._stages, leaving, strict=True) if yes]

    def without(self, starts: Collection[int]) -> PolicyConfig:
        off = [block + 1 in starts for block in self._stages]
        if self.config.static_left is None:
            pairs = zip([*off, False], self.thresholds.values(), strict=True)
            return replace(self.config, thresholds=tuple(1.0 if o else t for o, t in pairs))
        left, gone = [], 0.0
        for o, share in zip(off, self.config.static_left, strict=True):
            gone = gone if o else share
            left.append(gone)
        return replace(self.config, static_left=tuple(left))

    def dynamic(self) -> PolicyConfig:
        if not self._stages:
            raise ConfigError("the model has no auxiliary head behind which tokens could leave")
        return replace(self.config, thresholds=tuple(self.thresholds.values()), static_left=None, multiple=1)

    def dials(self, passes: Callable[[PolicyConfig], Iterable[Trace]]) -> list[Dial]:
        """One threshold for all auxiliary heads, by the share of all grades that are above it."""
        stages, last = len(self._stages), self.thresholds[self.depth - 1]

        @cache
        def grades() -> Tensor:
            none_leave = replace(self.config, thresholds=(*[math.nextafter(1.0, 0.0)] * stages, 1.0))
            of_passes = [
                graded(prediction.scores(), self.config.grade)[trace.valid].float().cpu()
                for trace in passes(none_leave)
                for prediction in trace.predictions[:-1]
            ]
            return torch.cat(of_passes)

        def turn(position: float) -> PolicyConfig:
            value = 1.0 if position <= 0 else 0.0
            if 0 < position < 1:
                value = min(1.0, max(0.0, quantile(grades(), 1 - position)))
            return replace(self.config, thresholds=(*[value] * stages, last))

        return [turn]

    def made_static(
        self, kept: Sequence[float], *, multiple: int = 1, position: float | None = None
    ) -> PolicyConfig | None:
        if self.config.preserve:
            return None
        stay = [kept[block + 1] for block in self._stages]
        if self.config.rejoin and self._stages[-1] + 1 == self.depth - 1:
            stay[-1] = stay[-2] if len(stay) > 1 else 1.0  # all tokens are back by then
        left = [max(0.0, 1 - max(stay[i:])) for i in range(len(stay))]
        factor = 1.0
        if position is not None:
            factor = position / min(share for share in (*left, max(*left, FEWEST)) if share > 0)
        shares = tuple(tidy(min(1 - FEWEST, share * factor), up=False) for share in left)
        return replace(self.config, static_left=shares, multiple=multiple)

    def report(self, trace: Trace) -> dict[str, Num[Tensor, "b k"]]:
        """`left_at`: tokens that leave at each stage."""
        gone = torch.stack([exited.sum(1) for exited in trace.exited], dim=1)
        return {"left_at": gone.diff(dim=1, prepend=torch.zeros_like(gone[:, :1]))}


def _exited(trace: Trace) -> Bool[Tensor, "b n"]:
    """(b, n) bool: the tokens that have left."""
    return trace.exited[-1] if trace.exited else torch.zeros_like(trace.valid)


@torch.no_grad()
def leave(
    prediction: Prediction, left: Bool[Tensor, "b n"], threshold: float, *, keep_per_class: int, grade: str
) -> Bool[Tensor, "b n"]:
    """(b, n) bool: which of the tokens that are `left` (b, n) leave now.

    Candidates are graded strictly above the threshold; of each class's candidates in an image the `keep_per_class` best
    stay.
    """
    if threshold >= 1:
        return torch.zeros_like(left)
    scores = prediction.scores().detach()
    cls, grades = scores.argmax(1), graded(scores, grade)
    candidates = left & (grades > threshold)
    if keep_per_class == 0:
        return candidates
    return candidates & (_rank_in_class(grades, cls, candidates, num_classes=scores.shape[1]) >= keep_per_class)


def graded(scores: Float[Tensor, "b k n"], grade: str) -> Float[Tensor, "b n"]:
    """(b, n): the grade of each token, of the scores (b, k, n) of its classes; of a single class its score."""
    if grade == "max" or scores.shape[1] == 1:
        return scores.amax(1)
    if grade == "margin":
        first, second = scores.topk(2, dim=1).values.unbind(1)
        return first - second
    total = scores.sum(1, keepdim=True)
    shares = scores / total.clamp(min=torch.finfo(scores.dtype).tiny)
    certainty = 1 + torch.special.xlogy(shares, shares).sum(1) / math.log(scores.shape[1])
    return torch.where(total[:, 0] > 0, certainty, 0)  # where no class has any score nothing is certain


def _rank_in_class(
    grades: Float[Tensor, "b n"], cls: Int[Tensor, "b n"], candidates: Bool[Tensor, "b n"], *, num_classes: int
) -> Int[Tensor, "b n"]:
    """(b, n): how many candidates of the same image and class are graded higher, or as high and standing before."""
    group = torch.where(candidates, cls, num_classes)
    by_grade = grades.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(group.shape[1], device=group.device).expand_as(group)
    by_class = (group.gather(1, by_grade) * group.shape[1] + place).argsort(dim=1)  # without equals, any sort is stable
    order = by_grade.gather(1, by_class)  # by class, then by grade
    grouped = group.gather(1, order)
    count = (group[..., None] == torch.arange(num_classes + 1, device=group.device)).sum(1)
    first = (count.cumsum(1) - count).gather(1, grouped)  # where each class begins
    return torch.empty_like(place).scatter_(1, order, place - first)
