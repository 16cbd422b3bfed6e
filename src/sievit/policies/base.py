"""The protocol of pruning methods: everything that the rest of the project asks of one, and the registry of all.

A policy decides which tokens of the canvas take part in the next block, or half of a block. It may also change values
(merge tokens, add tokens without a place on the grid), learn, and answer for itself: what it costs, how it is turned
and made static, what a report shows of it. A policy that needs none of this writes `before_block` alone.

Letters: b images, n grid tokens, p prefix tokens, d channels per head.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from sievit.config import Config, ConfigError, kind_of, named_elsewhere, nearest, to_json, variants
from sievit.tokens import Prediction, Tokens, Trace

Notes = dict[str, Tensor]
"""What a policy remembers of a decision in the trace, by name."""

Head = Callable[[Tokens, Bool[Tensor, "b n"] | None, Prediction | None], Prediction]
"""Judges the tokens of a choice (b, n) (None: all valid ones); for all others the earlier prediction stands."""

Dial = Callable[[float], "PolicyConfig"]
"""A setting of a policy by its position, from 0, where every token takes part, to 1, where hardly any does."""

FEWEST = 0.02
"""Share of the tokens at which a dial ends."""


@runtime_checkable
class Projections(Protocol):
    """What a policy may ask of the attention of one block, over the tokens that take part in it."""

    def attention(self) -> Float[Tensor, "b n"]:
        """(b, n): the attention that the class token (without one: the mean query) gives to each grid token."""
        ...

    def keys(self) -> Float[Tensor, "b n d"]:
        """(b, n, d): the keys of the grid tokens, mean over heads."""
        ...

    def value_norms(self) -> Float[Tensor, "b n"]:
        """(b, n): the norm of the value of each grid token."""
        ...


Project = Callable[[int, Tokens], Projections]
"""Block index and canvas to the projections of that block, before it is computed."""


@dataclass(frozen=True)
class BlockRange:
    """Blocks `start` to `stop` (0-based, without `stop`)."""

    start: int
    stop: int


@dataclass(frozen=True)
class PolicyConfig(Config):
    """Base of every policy's configuration; each policy file has one, registered under the policy's name.

    Attributes:
        rejoin: all tokens take part in the last block again, with the values that they have by then, and tokens without
            a place on the grid are gone (last-layer fusion of Token Cropr, arXiv 2412.00965). Goes with any policy.
        propagate: a token that is left out gets the update of the most similar token that is computed, instead of none
            (`sievit.vit.propagation`; no paper's, akin to the slow update of Evo-ViT and the unmerging of ToMe). Goes
            with policies that keep the features of such tokens.
    """

    swept: ClassVar[tuple[str, tuple[Any, ...]] | None] = None
    """The field that a sweep varies where none is named, and its values."""

    rejoin: bool = field(default=False, kw_only=True)
    propagate: bool = field(default=False, kw_only=True)


class Policy(nn.Module):
    """Decides which tokens take part in which half of a block.

    A policy sees the canvas and the trace so far and returns values; it writes nothing on itself during `forward`. Its
    constructor takes its configuration, `embed_dim`, `depth`, and by name what it needs of the model.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """What its constructor takes of the model: `heads`, the heads behind some blocks, by block; `project`, which gives
    the projections of a block before it."""
    needs_teacher: bool = False
    """Whether `loss` compares with the trace of the dense model that the training started from."""
    gates_in_training: ClassVar[bool] = False
    """Whether its choices in training are gates (`Tokens.gate`), which can be computed masked or selected."""
    can_propagate: ClassVar[bool] = True
    """Whether tokens that are left out keep their own features on the canvas, to which updates can be added."""
    cascades: ClassVar[bool] = False
    """Whether a token that is left out at one place is left out to the end."""

    config: Any
    depth: int

    # Decide

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        """Choose for block `index` (0-based).

        Returns:
            The canvas with its `keep` (and in training `gate`) set, and what the trace should remember by name.
        """
        raise NotImplementedError

    def decides_at(self, index: int) -> bool:
        """Whether it decides before block `index`; where not, its last choice stands.

        `before_block` is called before the first block of every piece of the loop in any case.
        """
        return True

    def inside_block(self, index: int, tokens: Tokens, trace: Trace, projections: Projections) -> tuple[Tokens, Notes]:
        """Choose between the attention and the MLP of block `index`, for that MLP and the blocks behind it."""
        raise NotImplementedError

    def decides_inside(self, index: int) -> bool:
        """Whether it decides between the attention and the MLP of block `index`."""
        return False

    def rejoins_at(self, index: int) -> bool:
        """Whether all tokens come back before block `index`, whatever it decides there."""
        return getattr(getattr(self, "config", None), "rejoin", False) and index == self.depth - 1

    @property
    def propagates(self) -> bool:
        """Whether tokens that are left out get the update of the most similar one that is computed."""
        return getattr(getattr(self, "config", None), "propagate", False)

    def after_piece(self, tokens: Tokens, trace: Trace) -> Tokens:
        """The canvas with its grid tokens whole, after a piece of the loop, for whatever reads it: adapters, heads."""
        return tokens

    def piece_notes(self, tokens: Tokens) -> Notes:
        """What the trace should remember of the whole canvas behind a piece of the loop, with its last block."""
        return {}

    def after_blocks(self, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        """As `before_block`, when all blocks are done."""
        return tokens, {}

    # Learn

    def begin(self) -> None:
        """Prepare new, random weights for a training."""

    def loss(
        self, trace: Trace, *, teacher: Trace | None = None, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """Training losses by name, already weighted; empty for a policy that learns nothing.

        Args:
            trace: of the pass; its `tokens` are the canvas at the end.
            teacher: of the dense model on the same images, where `needs_teacher`.
            targets: of the images, where the model's own losses have some.
        """
        return {}

    def hint(self, kept: Sequence[float]) -> str | None:
        """What to say to somebody who has trained it, where something went wrong.

        Args:
            kept: per block the share of tokens that it computed in the last validation.
        """
        return None

    # Cost

    def macs(self, trace: Trace) -> Num[Tensor, " b"]:
        """(b,) multiply-adds per image of this policy's own products in the pass: by default the sum of the notes
        called `macs`."""
        none = torch.zeros(trace.valid.shape[0], dtype=torch.float64, device=trace.valid.device)
        return sum((aux["macs"] for aux in trace.aux if "macs" in aux), none)

    def cost(self, trace: Trace) -> Float[Tensor, " b"]:
        """(b,) multiply-adds per image of everything that is not a block: `macs`, and the search of `propagate`."""
        macs = self.macs(trace).double()
        return sum((aux["propagation"] for aux in trace.aux if "propagation" in aux), macs)

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        """What `macs` needs of block `index` in a trace (of `depth`: after the last block) if no token is left out.

        Args:
            tokens: a canvas of which only shapes count.
        """
        return {}

    # Tune

    @property
    def is_static(self) -> bool:
        """Whether no shape depends on what is in the images."""
        return False

    @property
    def is_ragged(self) -> bool:
        """Whether the images of a batch may keep different numbers of tokens."""
        return not self.is_static

    def ranges(self) -> list[BlockRange]:
        """The runs of blocks before which tokens are chosen, and could be left alone; empty where none can."""
        return []

    def without(self, starts: Collection[int]) -> PolicyConfig:
        """The configuration that leaves no token out in the ranges that start at these blocks."""
        return self.config

    def dynamic(self) -> PolicyConfig:
        """The configuration without static counts."""
        return self.config

    def dials(self, passes: Callable[[PolicyConfig], Iterable[Trace]]) -> list[Dial]:
        """Dials of the cost, the best first, further ones for what that one does not reach; empty where there is none.

        Args:
            passes: of a configuration, its traces on sample images; called when a dial is first turned.
        """
        return []

    def made_static(
        self, kept: Sequence[float], *, multiple: int = 1, position: float | None = None
    ) -> PolicyConfig | None:
        """The configuration with static counts; None for a policy that has none.

        Args:
            kept: per block the share of tokens to keep, as measured with `dynamic`.
            multiple: counts are rounded up to a multiple of it.
            position: of a dial; None: as many tokens as in `kept`.
        """
        return None

    # Report

    def settings(self) -> dict[str, Any]:
        """The fields of the configuration that differ from their defaults."""
        values = ((f, getattr(self.config, f.name)) for f in fields(self.config))
        return {f.name: to_json(value) for f, value in values if value != f.default}

    def report(self, trace: Trace) -> dict[str, Num[Tensor, "b k"]]:
        """Further figures of a pass by name: (b, k) numbers of tokens, for k stages or blocks."""
        return {}


P = TypeVar("P", bound=type[Policy])
_POLICIES: dict[type[PolicyConfig], type[Policy]] = {}


def register(config_class: type[PolicyConfig]) -> Callable[[P], P]:
    """Class decorator: `build_policy` makes this policy from a `config_class`."""

    def mark(cls: P) -> P:
        _POLICIES[config_class] = cls
        return cls

    return mark


def build_policy(config: PolicyConfig, *, embed_dim: int, depth: int, **parts: Any) -> Policy:
    """The policy that `config` describes, for a backbone of `depth` blocks of `embed_dim` channels.

    Args:
        parts: what the model has for policies that need it, see `Policy.needs`.

    Raises:
        ConfigError: a policy that needs a part which the model does not have.
    """
    policy = _POLICIES.get(type(config))
    if policy is None:
        raise ConfigError(f"no policy is registered for {type(config).__name__}{nearest('', policies())}")
    missing = [name for name in policy.needs if not parts.get(name)]
    if missing:
        hints = {"heads": "tokens leave with the prediction of a head; it goes with a segmenter"}
        hint = hints.get(missing[0], f"this model has no {missing[0]!r}")
        raise ConfigError(f"the policy {kind_of(config)!r} does not go with this model: {hint}")
    if config.propagate and not policy.can_propagate:
        raise ConfigError(
            f"the policy {kind_of(config)!r} does not go with propagate: it merges tokens, or changes them by itself"
        )
    builder: Callable[..., Policy] = policy
    return builder(config, embed_dim=embed_dim, depth=depth, **{name: parts[name] for name in policy.needs})


def policies() -> dict[str, type[PolicyConfig]]:
    """The configuration class of every registered policy, by name."""
    return variants(PolicyConfig)


def policy_config(name: str) -> PolicyConfig:
    """The default configuration of the policy called `name`.

    Args:
        name: of a registered policy, or `my_package.module:MyPolicy`, a class in a module of your own.

    Raises:
        ConfigError: an unknown name (with the nearest match), a module that cannot be imported, or no policy in it.
    """
    if ":" in name:
        return _outside(name)()
    if name not in policies():
        raise ConfigError(
            f"unknown policy {name!r}{nearest(name, policies())}; one of your own is package.module:ClassName"
        )
    return policies()[name]()


def _outside(name: str) -> type[PolicyConfig]:
    """The configuration of a policy class (or that class itself) in a user's module."""
    found = named_elsewhere(name, "policy")
    for config, policy in _POLICIES.items():
        if found in (config, policy):
            return config
    module, _, attribute = name.partition(":")
    raise ConfigError(
        f"policy {name!r}: {module} has no policy {attribute!r}; decorate the class with "
        "@register(ItsConfig) of sievit.policies"
    )
