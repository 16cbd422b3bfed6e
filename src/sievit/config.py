"""Configurations are frozen dataclasses; this file turns them into JSON and back, and finds what a typo meant.

A field that may hold one of several configurations (a policy, a neck) is annotated with their base class; each of them
is registered under a name with `variant`, and that name is stored in the JSON under "kind". A configuration whose
fields were renamed has a class method `upgraded`, which turns the JSON object of an older version into today's.

Every number of a configuration has a range, which its annotation states (`Count`, `Share`, `Annotated[float, Gt(0)]`):
`Config` checks them whenever one is made, so that options, recipe files, checkpoints and calls are all covered.
"""

import dataclasses
import difflib
import functools
import math
import operator
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterable
from importlib import import_module
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from annotated_types import Ge, Gt, Interval

T = TypeVar("T")

Count = Annotated[int, Interval(ge=1, le=2**31 - 1)]
Natural = Annotated[int, Interval(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
Byte = Annotated[int, Interval(ge=0, le=255)]
Label = Annotated[int, Interval(ge=-(2**63), le=2**63 - 1)]
"""An id or value that may be anything that a tensor holds."""
Share = Annotated[float, Interval(ge=0, le=1)]
Rate = Annotated[float, Interval(ge=0, lt=1)]
"""A share below 1, such as dropout."""
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Finite = Annotated[float, Interval()]
"""Neither NaN nor infinite, as every number is that does not say otherwise."""
Extended = Annotated[float, Interval(ge=-math.inf, le=math.inf)]
"""May be infinite."""

_VARIANTS: dict[str, type] = {}


class ConfigError(ValueError):
    """A configuration, option or name that the user has to change; the message contains the way out."""


def named_elsewhere(name: str, what: str) -> Any:
    """What `package.module:attribute` names, in a module of the user's; None where the module has no such attribute.

    Args:
        what: it is to be, for the message.

    Raises:
        ConfigError: the module cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        import_module(module)
    except ImportError as error:
        raise ConfigError(f"{what} {name!r}: {error}; is the folder of {module!r} on PYTHONPATH?") from error
    return getattr(sys.modules[module], attribute, None)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """Any value, for a message: shortened."""
    return _SHORT.repr(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest known name if there is one, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


class Config:
    """Base of configurations, which are frozen dataclasses: their numbers are checked before their own `__post_init__`.

    Raises:
        ConfigError: a number is not one, not finite, or outside of the range that its annotation states.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__dict__.get("__post_init__")
        if own is not None:

            @functools.wraps(own)
            def checked(self: Any) -> None:
                Config.__post_init__(self)
                own(self)

            cls.__post_init__ = checked  # ty: ignore

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            if hasattr(self, name):
                check_range(hint, getattr(self, name), name)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # ty: ignore


_LIMITS = (
    ("gt", operator.gt, "above"),
    ("ge", operator.ge, "at least"),
    ("lt", operator.lt, "below"),
    ("le", operator.le, "at most"),
)


def check_range(hint: Any, value: Any, name: str) -> None:
    """Check every number in `value` against the annotation `hint`: the types int and float, and the limits on them.

    Raises:
        ConfigError: it begins with `name` and states what is possible.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for option in args:
            suits = _number_of(option) if isinstance(value, Real) else typing.get_origin(option) is tuple
            if suits and isinstance(value, Real | tuple | list):
                return check_range(option, value, name)
        return None
    if origin is Literal and value not in args:
        raise ConfigError(f"{name} is {value!r}; it has to be one of {', '.join(map(str, args))}")
    number = _number_of(hint)
    if number is None:
        if origin is tuple and isinstance(value, tuple | list):
            hints = args[:1] * len(value) if args[-1:] == (Ellipsis,) else args
            if len(hints) != len(value):
                raise ConfigError(f"{name} has {len(value)} values, {len(hints)} are needed: {value!r}")
            for item, each in zip(hints, value, strict=True):
                check_range(item, each, name)
        return None
    kind, limits = number
    if not isinstance(value, Integral if kind is int else Real) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, and not a {'whole number' if kind is int else 'number'}")
    wanted = [(holds, words, getattr(each, key, None)) for each in limits for key, holds, words in _LIMITS]
    finite = -sys.float_info.max <= value <= sys.float_info.max  # NaN is not
    if value != value or not (finite or any(bound == math.inf for _, _, bound in wanted)):
        raise ConfigError(f"{name} is {value!r}; it has to be a finite number")
    for holds, words, bound in wanted:
        if bound is not None and not holds(value, bound):
            raise ConfigError(f"{name} is {value!r}; it has to be {words} {bound}")
    return None


def _number_of(hint: Any) -> tuple[type, tuple[Any, ...]] | None:
    """int or float, and the limits on it; None for anything else."""
    kind, *limits = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    return (kind, tuple(limits)) if kind in (int, float) else None


def variant(kind: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: the frozen dataclass is stored under `kind` in JSON, wherever its base class is expected."""

    def mark(cls: type[T]) -> type[T]:
        assert kind not in _VARIANTS, f"two configurations are called {kind!r}"
        _VARIANTS[kind] = cls
        return cls

    return mark


def variants(base: type[T]) -> dict[str, type[T]]:
    """All registered configurations that may stand where `base` is expected, by kind."""
    return {kind: cls for kind, cls in _VARIANTS.items() if issubclass(cls, base)}


def kind_of(config: object) -> str | None:
    """The name that this configuration is registered under, None for a plain one.

    Of a class in a user's own package that extends one of ours it is `package.module:ClassName`.
    """
    own = type(config)
    for kind, cls in _VARIANTS.items():
        if cls is own:
            return kind
    extends = any(dataclasses.is_dataclass(base) for base in own.__mro__[1:])
    return f"{own.__module__}:{own.__qualname__}" if extends and not own.__module__.startswith("sievit.") else None


def class_of(kind: str, base: type[T], *, where: str = "config") -> type[T]:
    """The configuration that is registered as `kind`, or is called so in a module of a user's that is imported already.

    Raises:
        ConfigError: there is none.
    """
    known = variants(base)
    if kind in known:
        return known[kind]
    module, colon, name = kind.partition(":")
    if not colon:
        raise ConfigError(f"{where}: unknown kind {kind!r}{nearest(kind, known)}")
    found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type) and issubclass(found, base):
        return found
    raise ConfigError(
        f"{where}: {kind!r} is a class of a package that is not imported; import {module} first, or name the policy's "
        f"class, --policy {module}:ClassName"
    )


def to_json(config: Any) -> Any:
    """A dataclass, as values that `json.dumps` takes."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kind = kind_of(config)
        values = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return values if kind is None else {"kind": kind, **values}
    if isinstance(config, tuple | list):
        return [to_json(item) for item in config]
    if isinstance(config, dict):
        return {key: to_json(item) for key, item in config.items()}
    if isinstance(config, Path):
        return str(config)
    return config


def from_json(cls: Any, data: Any, *, where: str = "config") -> Any:
    """The inverse of `to_json`: an instance of the type `cls`.

    Raises:
        ConfigError: an unknown or missing field, or a value of the wrong type; `where` and the path to it are named.
    """
    origin = typing.get_origin(cls)
    if origin in (Union, types.UnionType):
        return _from_json_union(cls, data, where)
    if origin is Literal:
        if data not in typing.get_args(cls):
            raise ConfigError(f"{where}: {shown(data)} is not one of {', '.join(map(repr, typing.get_args(cls)))}")
        return data
    if origin in (tuple, list):
        return _from_json_sequence(cls, data, where)
    if origin is dict:
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: {shown(data)} is not an object")
        item = typing.get_args(cls)[1]
        return {key: from_json(item, value, where=f"{where}.{key}") for key, value in data.items()}
    if dataclasses.is_dataclass(cls):
        return _from_json_dataclass(cls, data, where)
    if cls is Path and isinstance(data, str):
        return Path(data)
    if cls is float and isinstance(data, int) and not isinstance(data, bool) and abs(data) < 2**1000:
        return float(data)
    if cls is Any or (isinstance(data, cls) and not (cls is int and isinstance(data, bool))):
        return data
    raise ConfigError(f"{where}: {shown(data)} is not of type {getattr(cls, '__name__', cls)}")


def _from_json_union(cls: Any, data: Any, where: str) -> Any:
    if data is None and type(None) in typing.get_args(cls):
        return None
    errors = []
    for option in typing.get_args(cls):
        if option is type(None):
            continue
        try:
            return from_json(option, data, where=where)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError("; ".join(errors) or f"{where}: {shown(data)} does not fit {cls}")


def _from_json_sequence(cls: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if not isinstance(data, list | tuple):
        raise ConfigError(f"{where}: {shown(data)} is not a list")
    if origin is tuple and args[-1] is not Ellipsis:
        if len(data) != len(args):
            raise ConfigError(f"{where}: {len(data)} values where {len(args)} are expected")
        return tuple(from_json(a, v, where=f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, data, strict=True)))
    return origin(from_json(args[0], value, where=f"{where}[{i}]") for i, value in enumerate(data))


def _from_json_dataclass(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: {shown(data)} is not an object")
    data = dict(data)
    if "kind" in data and "kind" not in (f.name for f in dataclasses.fields(cls)):
        cls = class_of(str(data.pop("kind")), cls, where=where)
    if hasattr(cls, "upgraded"):
        try:
            data = cls.upgraded(data)
        except (TypeError, AttributeError, LookupError) as error:  # values of other types than it expects
            raise ConfigError(f"{where}: neither of this version nor of an earlier one ({error})") from error
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for name in data:
        if name not in names:
            raise ConfigError(f"{where}: unknown field {name!r}{nearest(name, names)}")
    values = {name: from_json(hints[name], value, where=f"{where}.{name}") for name, value in data.items()}
    try:
        return cls(**values)
    except (TypeError, ConfigError) as error:  # a field without a default is missing, or values that do not go together
        raise ConfigError(f"{where}: {error}") from error
