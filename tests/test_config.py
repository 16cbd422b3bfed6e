"""Configurations survive JSON, and a mistake in one is named with the way out."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from sievit.config import ConfigError, from_json, load_json, nearest, to_json
from sievit.policies import PolicyConfig, SViTConfig, policies, policy_config


@dataclass(frozen=True)
class Inner:
    kind: Literal["plain", "other"] = "plain"
    """A word of its own, with nothing registered under it."""
    size: tuple[int, int] = (1, 2)
    rates: tuple[float, ...] = (0.5,)


@dataclass(frozen=True)
class Outer:
    name: str
    policy: PolicyConfig
    inner: Inner = field(default_factory=Inner)
    folder: Path | None = None
    mode: Literal["a", "b"] = "a"
    scale: float = 1.0
    table: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize("kind", sorted(policies()))
def test_round_trip_through_json_text(kind: str) -> None:
    policy, inner = policy_config(kind), Inner(kind="other")
    config = Outer(name="x", policy=policy, inner=inner, folder=Path("a/b"), mode="b", table={"k": 3})
    assert from_json(Outer, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "y"}, r"config: unknown field 'nmae'; did you mean 'name'\?"),
        ({"policy": {"kind": "svti"}}, r"config\.policy: unknown kind 'svti'; did you mean 'svit'\?"),
        (
            {"policy": {"kind": "svit", "target": [0.5]}},
            r"config\.policy: unknown field 'target'; did you mean 'targets'",
        ),
        ({"inner": {"size": [1]}}, r"config\.inner\.size: 1 values where 2 are expected"),
        ({"inner": {"size": [1, "2"]}}, r"config\.inner\.size\[1\]: '2' is not of type int"),
        ({"inner": {"kind": "svit"}}, r"config\.inner\.kind: 'svit' is not one of 'plain', 'other'"),
        ({"inner": {"rates": 3}}, r"config\.inner\.rates: 3 is not a list"),
        ({"mode": "c"}, r"config\.mode: 'c' is not one of 'a', 'b'"),
        ({"scale": True}, r"config\.scale: True is not of type float"),
        ({"name": None}, r"config\.name"),
    ],
)
def test_a_mistake_is_named(change: dict[str, Any], message: str) -> None:
    data = {**to_json(Outer(name="x", policy=SViTConfig())), **change}
    with pytest.raises(ConfigError, match=message):
        from_json(Outer, data)


def test_a_missing_field_and_an_unreadable_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policy"):
        from_json(Outer, {"name": "x"})
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_json(Outer, file)
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_json(Outer, file)


def test_nearest_lists_what_there_is() -> None:
    assert nearest("alhpa", ["alpha", "beta"]) == "; did you mean 'alpha'? (known: alpha, beta)"
    assert nearest("zzz", ["alpha"]) == " (known: alpha)"
