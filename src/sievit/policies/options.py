"""The policy that a user chooses for a trained model, by name and fields."""

import json
import types
import typing
from dataclasses import dataclass, fields, replace
from typing import Any, Union

from sievit.config import Config, ConfigError, from_json, kind_of, nearest
from sievit.policies.base import PolicyConfig, policy_config

WORDS = {"None": None, "True": True, "False": False}


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(Config):
    """Another policy, or other settings of it.

    Attributes:
        policy: takes the place of the model's own: a name of `sievit policies`, such as keep_all for dense, or
            my_package.module:MyPolicy, a class of your own.
        set: fields of the policy, such as `thresholds=0.9,0.95 keep_per_class=3`; without --policy of the model's own.
    """

    policy: str | None = None
    set: tuple[str, ...] = ()


def chosen_policy(own: PolicyConfig, options: PolicyOptions) -> PolicyConfig:
    """The policy that `options` choose for a model with the policy `own`; a policy of the same kind keeps its settings.

    Raises:
        ConfigError: an unknown policy or field (with the nearest match), or a value that does not fit the field.
    """
    config = own if options.policy is None else policy_config(options.policy)
    config = own if type(config) is type(own) else config
    changes = dict(_parsed(config, text) for text in options.set)
    return replace(config, **changes) if changes else config


def _parsed(config: PolicyConfig, text: str) -> tuple[str, Any]:
    """Name and value of FIELD=VALUE."""
    name, equals, value = text.partition("=")
    names = [field.name for field in fields(config)]
    if not equals or not value:
        raise ConfigError(f"--set {text}: write FIELD=VALUE, with one of the fields {', '.join(names)}")
    if name not in names:
        raise ConfigError(f"--set {text}: the policy {kind_of(config)!r} has no field {name!r}{nearest(name, names)}")
    hint = typing.get_type_hints(type(config))[name]
    parsed = _json(value)
    if isinstance(parsed, str) and "," in parsed:
        parsed = [_json(part) for part in parsed.split(",") if part]
    if _is_tuple(hint) and parsed is not None and not isinstance(parsed, list):
        parsed = [parsed]
    return name, from_json(hint, parsed, where=f"--set {name}")


def _json(text: str) -> Any:
    """The JSON value of a text; None, True, False, and what is no JSON as it stands."""
    if text in WORDS:
        return WORDS[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _is_tuple(hint: Any) -> bool:
    """Whether a field of this type takes several values."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(_is_tuple(part) for part in typing.get_args(hint))
    return typing.get_origin(hint) is tuple
