"""Renaming state dicts strictly: a key that no rule knows, or that is missing, is an error that lists it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sievit.config import ConfigError


@dataclass(frozen=True)
class Drop:
    """Stands in place of a new name: the key is left out on purpose."""

    why: str


Rules = Sequence[tuple[str, str | Drop | None]]
"""Pairs of a pattern that has to match a whole key and its new name (a `Drop`, or None: dropped on purpose)."""


def rename(state: dict[str, Tensor], rules: Rules, *, source: str) -> dict[str, Tensor]:
    """The state dict under our names.

    Raises:
        ConfigError: keys that no rule knows; `source` says what they were taken for.
    """
    compiled = [(re.compile(pattern), name) for pattern, name in rules]
    renamed, unknown = {}, []
    for key, value in state.items():
        for pattern, name in compiled:
            match = pattern.fullmatch(key)
            if match:
                if isinstance(name, str):
                    renamed[match.expand(name)] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ConfigError(f"not {source}: {_listed(unknown)} have no place in it")
    return renamed


def dropped(keys: Iterable[str], rules: Rules) -> dict[str, list[str]]:
    """The keys that the rules leave out on purpose, by the reason why."""
    found: dict[str, list[str]] = {}
    drops = [(re.compile(pattern), name.why) for pattern, name in rules if isinstance(name, Drop)]
    for key in keys:
        for pattern, why in drops:
            if pattern.fullmatch(key):
                found.setdefault(why, []).append(key)
                break
    return found


def load_strictly(module: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Load under our names.

    Raises:
        ConfigError: missing or surplus keys, or shapes that do not fit; all of them are listed.
    """
    own = module.state_dict()
    missing, surplus = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    problems = [
        f"{what}: {_listed(keys)}"
        for what, keys in (("missing", missing), ("surplus", surplus), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise ConfigError(f"not {source}; {'; '.join(problems)}")
    module.load_state_dict(state)


def need(state: dict[str, Tensor], key: str, *, source: str, ndim: int | None = None) -> Tensor:
    """One tensor that sizes are read from.

    Raises:
        ConfigError: it is not there, or has not so many dimensions, or one that is empty.
    """
    if key not in state:
        raise ConfigError(f"not {source}: it has no {key!r}")
    shape = state[key].shape
    if ndim is not None and (len(shape) != ndim or 0 in shape):
        raise ConfigError(f"not {source}: {key} is {tuple(shape)}, where {ndim} sizes are expected")
    return state[key]


def heads_of(width: int) -> int:
    """How many heads share `width` channels where each has 64, as in every released model.

    Raises:
        ConfigError: they do not divide.
    """
    if width % 64:
        raise ConfigError(f"{width} channels are no multiple of 64; give the number of heads, which no shape tells")
    return width // 64


def _listed(keys: Sequence[str] | set[str], limit: int = 12) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
