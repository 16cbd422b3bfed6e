"""Configurations are frozen dataclasses; this file turns them into JSON and back, and finds what a typo meant.

A field that may hold one of several configurations (a policy, a neck) is annotated with their base class; each of them
is registered under a name with `variant`, and that name is stored in the JSON under "kind". A configuration whose
fields were renamed has a class method `upgraded`, which turns the JSON object of an older version into today's.
"""

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")

_VARIANTS: dict[str, type] = {}


class ConfigError(ValueError):
    """A configuration, option or name that the user has to change; the message contains the way out."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest known name if there is one, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


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
            raise ConfigError(f"{where}: {data!r} is not one of {', '.join(map(repr, typing.get_args(cls)))}")
        return data
    if origin in (tuple, list):
        return _from_json_sequence(cls, data, where)
    if origin is dict:
        item = typing.get_args(cls)[1]
        return {key: from_json(item, value, where=f"{where}.{key}") for key, value in data.items()}
    if dataclasses.is_dataclass(cls):
        return _from_json_dataclass(cls, data, where)
    if cls is Path and isinstance(data, str):
        return Path(data)
    if cls is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if cls is Any or (isinstance(data, cls) and not (cls is int and isinstance(data, bool))):
        return data
    raise ConfigError(f"{where}: {data!r} is not of type {getattr(cls, '__name__', cls)}")


def load_json(cls: type[T], path: Path) -> T:
    """Read a configuration of type `cls` from a JSON file.

    Raises:
        ConfigError: the file is missing, not JSON, or does not describe a `cls`; the message names the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    return from_json(cls, data, where=str(path))


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
    raise ConfigError("; ".join(errors) or f"{where}: {data!r} does not fit {cls}")


def _from_json_sequence(cls: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if not isinstance(data, list | tuple):
        raise ConfigError(f"{where}: {data!r} is not a list")
    if origin is tuple and args[-1] is not Ellipsis:
        if len(data) != len(args):
            raise ConfigError(f"{where}: {len(data)} values where {len(args)} are expected")
        return tuple(from_json(a, v, where=f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, data, strict=True)))
    return origin(from_json(args[0], value, where=f"{where}[{i}]") for i, value in enumerate(data))


def _from_json_dataclass(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: {data!r} is not an object")
    data = dict(data)
    if "kind" in data and "kind" not in (f.name for f in dataclasses.fields(cls)):
        cls = class_of(str(data.pop("kind")), cls, where=where)
    if hasattr(cls, "upgraded"):
        data = cls.upgraded(data)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for name in data:
        if name not in names:
            raise ConfigError(f"{where}: unknown field {name!r}{nearest(name, names)}")
    values = {name: from_json(hints[name], value, where=f"{where}.{name}") for name, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:  # a field without a default is missing
        raise ConfigError(f"{where}: {error}") from error
