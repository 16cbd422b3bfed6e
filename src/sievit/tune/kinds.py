"""What can be turned on each kind of policy: a dial for its cost, and a switch at each place where tokens are left out.

A dial goes from 0, where every token takes part, to 1, where hardly any does.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from sievit.config import ConfigError, kind_of, to_json
from sievit.policies import (
    AttentionConfig,
    DToP,
    DToPConfig,
    Policy,
    PolicyConfig,
    RandomConfig,
    SViTConfig,
    TopNormConfig,
)
from sievit.policies.dtop import graded
from sievit.policies.selection import spread
from sievit.tokens import Tokens, Trace
from sievit.tune.subject import Part, Subject
from sievit.vit import Block, execute

Turn = Callable[[float], PolicyConfig]
"""A dial: position to policy."""
Run = Callable[[Tokens, Trace], object]
"""Some of the blocks, on the canvas and with the trace that were there before them."""
FEWEST = 0.02
"""Share of the tokens at which a dial ends."""


class Kind(ABC):
    """A policy of one kind, and in one mode, on its subject."""

    mode = "dynamic"
    whole = False
    """Whether what one place leaves out is left out to the end, so that places are judged one after the other."""
    ragged = False
    """Whether images keep different numbers of tokens, so that there are several ways to compute them together."""
    one_graph = False
    """Whether no shape depends on what is in the images."""
    names: tuple[str, ...] = ()
    """Fields of the configuration that are turned."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @abstractmethod
    def places(self, config: PolicyConfig) -> list[Part]:
        """The runs of blocks before which tokens are chosen, and could be left alone."""

    @abstractmethod
    def without(self, config: PolicyConfig, places: Collection[int]) -> PolicyConfig:
        """The policy that leaves no token out at these places, named by their first block."""

    @abstractmethod
    def own(self) -> PolicyConfig:
        """The policy as it came, or as it was calibrated."""

    @abstractmethod
    def dials(self) -> list[Turn]:
        """One dial or, where one does not reach far enough, more, the best first."""

    def settings(self, config: PolicyConfig) -> dict[str, Any]:
        """What was turned, for the report."""
        said = {name: to_json(getattr(config, name)) for name in self.names}
        return {name: value for name, value in said.items() if value is not None}

    def runs(self, config: PolicyConfig, place: Part, off: Collection[int]) -> tuple[Run, Run]:
        """The blocks of a place dense, and pruned: with gate, packing and unpacking. `off`: places left alone."""
        policy = self.subject.policy(self.without(config, off))
        vit = self.subject.model.vit
        if self.whole:
            dense = self.subject.policy(self.without(config, {*off, place.start}))

            def rest(policy: Policy) -> Run:
                return lambda tokens, trace: vit.run_blocks(tokens, policy, trace, start=place.start)

            return rest(dense), rest(policy)
        blocks = [block for block in vit.blocks[place.start : place.stop] if isinstance(block, Block)]

        def pruned(tokens: Tokens, trace: Trace) -> Tokens:
            return execute(blocks, policy.before_block(place.start, tokens, trace)[0], inplace=True)

        return lambda tokens, trace: execute(blocks, tokens.select(None), inplace=True), pruned


def kinds(subject: Subject, modes: Sequence[str], *, quantile: float | None, multiple: int) -> list[Kind]:
    """The policy of a model, in each of the modes that it has.

    Raises:
        ConfigError: a policy that has nothing to turn, or none of these modes.
    """
    config = subject.model.config.policy
    found: list[Kind] = []
    if isinstance(config, SViTConfig):
        gates = Gates(subject, config)
        can_be_static = config.reactivate and not config.sample
        found = [gates, *([StaticGates(gates, config, quantile, multiple)] if can_be_static else [])]
    elif isinstance(config, DToPConfig):
        exits = Exits(subject, config)
        found = [exits, *([] if config.preserve else [StaticExits(exits, config, quantile, multiple)])]
    elif isinstance(config, AttentionConfig | TopNormConfig | RandomConfig):
        found = [Shares(subject, config)]
    else:
        raise ConfigError(
            f"the policy {kind_of(config)!r} has nothing to tune: it computes every token; give a model that leaves "
            "some out, or another policy by --policy"
        )
    wanted = [kind for kind in found if kind.mode in modes or (kind.ragged and "bucketed" in modes)]
    if not wanted:
        had = ", ".join(f"{kind.mode}, bucketed" if kind.ragged else kind.mode for kind in found)
        raise ConfigError(f"--modes {' '.join(modes)}: the policy {kind_of(config)!r} has {had}")
    return wanted


class Gates(Kind):
    """SViT: the threshold of the logits, or where the gates know budgets the budget."""

    ragged = True
    names = ("threshold", "budget", "dense_blocks")

    def __init__(self, subject: Subject, config: SViTConfig) -> None:
        super().__init__(subject)
        self.config = replace(config, static_shares=None, multiple=1, dense_blocks=())

    def places(self, config: PolicyConfig) -> list[Part]:
        if not self.config.reactivate:
            return []  # a block for everybody would bring back those that are gone
        return [Part(i, i + 1, True) for i in range(self.config.first_block, self.subject.depth)]

    def without(self, config: PolicyConfig, places: Collection[int]) -> PolicyConfig:
        assert isinstance(config, SViTConfig)
        return replace(config, dense_blocks=tuple(sorted({*config.dense_blocks, *places})))

    def own(self) -> PolicyConfig:
        return self.config

    def dials(self) -> list[Turn]:
        budgets = self.config.budgets
        if budgets is None:
            return [self._threshold(self.config)]
        least, most = budgets

        def budget(position: float) -> PolicyConfig:
            return replace(self.config, budget=round(most + position * (least - most), 4))

        above = self._threshold(replace(self.config, budget=most), part="below")
        return [budget, above, self._threshold(replace(self.config, budget=least), part="above")]

    def _threshold(self, config: SViTConfig, part: Literal["all", "below", "above"] = "all") -> Turn:
        """The threshold by the share of all margins that it is above; of a part, from or to where it stands."""

        @cache
        def scale() -> Tensor:
            everyone = self.subject.policy(replace(config, threshold=-math.inf, sample=False))
            found = []
            for batch in self.subject.batches:
                trace = self.subject.answer(everyone, batch).trace
                for aux in trace.aux:
                    if "logits" in aux:
                        logits = aux["logits"][trace.valid].float()
                        found.append((logits[:, 0] - logits[:, 1]).cpu())
            return _scale(torch.cat(found))

        def turn(position: float) -> PolicyConfig:
            values = scale()
            stands = (values < config.threshold).double().mean().item()
            low, high = (stands if part == "above" else 0.0), (stands if part == "below" else 1 - FEWEST)
            if position <= 0 and part != "above":
                return replace(config, threshold=values[0].item() - 1.0)
            if position == (0 if part == "above" else 1) and part != "all":
                return config
            return replace(config, threshold=_at(values, low + position * max(0.0, high - low)))

        return turn

    def settings(self, config: PolicyConfig) -> dict[str, Any]:
        said = super().settings(config)
        return said if self.config.budgets is not None else {k: v for k, v in said.items() if k != "budget"}


class StaticGates(Kind):
    """SViT with static counts: the shares that its gates keep on the images, times a factor."""

    mode, one_graph = "static", True
    names = ("static_shares", "multiple")

    def __init__(self, gates: Gates, config: SViTConfig, quantile: float | None, multiple: int) -> None:
        super().__init__(gates.subject)
        self.gates, self.quantile, self.multiple = gates, quantile, multiple
        self.config: PolicyConfig = gates.config
        self.first = config.first_block
        self.calibrate(gates.config)

    def calibrate(self, config: PolicyConfig) -> None:
        """Take the counts of this dynamic policy, as it is without its switches."""
        assert isinstance(config, SViTConfig)
        self.config = replace(config, dense_blocks=())
        shares = self.subject.spent(self.config).shares[self.first :].double()
        self.shares = _typical(shares, self.quantile)

    def _times(self, factor: float) -> PolicyConfig:
        assert isinstance(self.config, SViTConfig)
        shares = tuple(_tidy(min(1.0, max(FEWEST, share * factor))) for share in self.shares)
        return replace(self.config, static_shares=shares, multiple=self.multiple)

    def places(self, config: PolicyConfig) -> list[Part]:
        assert isinstance(config, SViTConfig) and config.static_shares is not None
        return [
            Part(self.first + i, self.first + i + 1, True) for i, share in enumerate(config.static_shares) if share < 1
        ]

    def without(self, config: PolicyConfig, places: Collection[int]) -> PolicyConfig:
        assert isinstance(config, SViTConfig) and config.static_shares is not None
        shares = enumerate(config.static_shares, start=self.first)
        return replace(config, static_shares=tuple(1.0 if i in places else share for i, share in shares))

    def own(self) -> PolicyConfig:
        return self._times(1.0)

    def dials(self) -> list[Turn]:
        return [lambda position: self._times((1 - position) / max(FEWEST, min(self.shares)))]


class Exits(Kind):
    """DToP: one grade for all auxiliary heads."""

    whole = True
    names = ("thresholds",)

    def __init__(self, subject: Subject, config: DToPConfig) -> None:
        super().__init__(subject)
        policy = subject.policy(config)
        assert isinstance(policy, DToP)
        self.stages = tuple(policy.heads)[:-1]
        thresholds = config.per_stage(len(policy.heads))
        self.config = replace(config, thresholds=thresholds, static_left=None, multiple=1)
        self.ragged = not config.preserve
        if not self.stages:
            raise ConfigError("the model has no auxiliary head behind which tokens could leave")

    def places(self, config: PolicyConfig) -> list[Part]:
        assert isinstance(config, DToPConfig)
        depth, given = self.subject.depth, zip(self.stages, config.thresholds, strict=False)
        return [Part(stage + 1, depth, True) for stage, threshold in given if threshold < 1]

    def without(self, config: PolicyConfig, places: Collection[int]) -> PolicyConfig:
        assert isinstance(config, DToPConfig)
        off = [stage + 1 in places for stage in self.stages]
        thresholds = tuple(1.0 if o else t for o, t in zip([*off, False], config.thresholds, strict=True))
        return replace(config, thresholds=thresholds)

    def own(self) -> PolicyConfig:
        return self.config

    def dials(self) -> list[Turn]:
        """The threshold by the share of all grades that are above it."""
        nobody = math.nextafter(1.0, 0.0)
        last = self.config.thresholds[-1]
        asked = self.subject.policy(replace(self.config, thresholds=(*[nobody] * len(self.stages), 1.0)))
        found = []
        for batch in self.subject.batches:
            trace = self.subject.answer(asked, batch).trace
            for prediction in trace.predictions[:-1]:
                found.append(graded(prediction.scores(), self.config.grade)[trace.valid].float().cpu())
        scale = _scale(torch.cat(found))

        def turn(position: float) -> PolicyConfig:
            value = 1.0 if position <= 0 else 0.0 if position >= 1 else min(1.0, max(0.0, _at(scale, 1 - position)))
            return replace(self.config, thresholds=(*[value] * len(self.stages), last))

        return [turn]


class StaticExits(Kind):
    """DToP with static counts: the shares that have left on the images, times a factor."""

    mode, whole, one_graph = "static", True, True
    names = ("static_left", "multiple")

    def __init__(self, exits: Exits, config: DToPConfig, quantile: float | None, multiple: int) -> None:
        super().__init__(exits.subject)
        self.exits, self.quantile, self.multiple = exits, quantile, multiple
        self.config: PolicyConfig = exits.config
        self.left: tuple[float, ...] = ()
        self.calibrate(exits.config)

    def calibrate(self, config: PolicyConfig) -> None:
        """Take the counts of this dynamic policy."""
        assert isinstance(config, DToPConfig)
        self.config = config
        stages = [stage + 1 for stage in self.exits.stages]
        shares = self.subject.spent(config).shares[stages].double()
        if config.rejoin and stages[-1] == self.subject.depth - 1:
            shares[-1] = shares[-2] if len(shares) > 1 else 1.0  # everybody is back by then
        stay = _typical(shares, self.quantile)
        self.left = tuple(max(0.0, 1 - max(stay[i:])) for i in range(len(stay)))

    def _times(self, factor: float) -> PolicyConfig:
        assert isinstance(self.config, DToPConfig)
        left = tuple(_tidy(min(1 - FEWEST, share * factor), up=False) for share in self.left)
        return replace(self.config, static_left=left, multiple=self.multiple)

    def places(self, config: PolicyConfig) -> list[Part]:
        assert isinstance(config, DToPConfig) and config.static_left is not None
        before = (0.0, *config.static_left)
        steps = zip(self.exits.stages, config.static_left, before, strict=False)
        return [Part(stage + 1, self.subject.depth, True) for stage, left, earlier in steps if left > earlier]

    def without(self, config: PolicyConfig, places: Collection[int]) -> PolicyConfig:
        assert isinstance(config, DToPConfig) and config.static_left is not None
        left, gone = [], 0.0
        for stage, share in zip(self.exits.stages, config.static_left, strict=True):
            gone = gone if stage + 1 in places else share
            left.append(gone)
        return replace(config, static_left=tuple(left))

    def own(self) -> PolicyConfig:
        return self._times(1.0)

    def dials(self) -> list[Turn]:
        most = max(*self.left, FEWEST)
        return [lambda position: self._times(position / min(share for share in (*self.left, most) if share > 0))]


class Shares(Kind):
    """Policies of fixed shares: the shares times a factor. Their counts are static by nature."""

    one_graph = True
    names = ("shares",)

    def __init__(self, subject: Subject, config: AttentionConfig | TopNormConfig | RandomConfig) -> None:
        super().__init__(subject)
        self.first = config.first_block
        shares = spread(config.shares, first_block=config.first_block, depth=subject.depth)
        self.config = replace(config, shares=shares)

    def places(self, config: PolicyConfig) -> list[Part]:
        policy, depth = self.subject.policy(config), self.subject.depth
        decided = [i for i in range(self.first, depth) if i == self.first or policy.decides_at(i)]
        return [
            Part(start, stop, True)
            for start, stop in zip(decided, [*decided[1:], depth], strict=True)
            if _shares(config)[start - self.first] < 1
        ]

    def without(self, config: PolicyConfig, places: Collection[int]) -> PolicyConfig:
        runs = [part for part in self.places(config) if part.start in places]
        off = {i for part in runs for i in range(part.start, part.stop)}
        shares = enumerate(_shares(config), start=self.first)
        return replace(config, shares=tuple(1.0 if i in off else share for i, share in shares))

    def own(self) -> PolicyConfig:
        return self.config

    def dials(self) -> list[Turn]:
        shares = _shares(self.config)

        def turn(position: float) -> PolicyConfig:
            factor = (1 - position) / max(FEWEST, min(shares))
            return replace(self.config, shares=tuple(_tidy(min(1.0, max(FEWEST, s * factor))) for s in shares))

        return [turn]


def _shares(config: PolicyConfig) -> tuple[float, ...]:
    assert isinstance(config, AttentionConfig | TopNormConfig | RandomConfig)
    return config.shares


def _scale(values: Tensor) -> Tensor:
    """Values in their order, as many as a dial needs."""
    ordered = values.sort().values.double()
    places = torch.linspace(0, len(ordered) - 1, min(len(ordered), 4097), dtype=torch.float64)
    return ordered[places.round().long()]


def _at(scale: Tensor, share: float) -> float:
    """The value that this share of all is below."""
    place = share * (len(scale) - 1)
    low = int(place)
    high = min(low + 1, len(scale) - 1)
    return (scale[low] + (place - low) * (scale[high] - scale[low])).item()


def _typical(shares: Tensor, quantile: float | None) -> tuple[float, ...]:
    """Of shares (places, images) the mean over images, or a quantile."""
    return tuple((shares.mean(1) if quantile is None else shares.quantile(quantile, dim=1)).tolist())


def _tidy(share: float, *, up: bool = True) -> float:
    """To four digits, towards more tokens."""
    return (math.ceil(share * 1e4 - 1e-6) if up else math.floor(share * 1e4 + 1e-6)) / 1e4
