"""Configurations survive JSON, and a mistake in one is named with the way out."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from sievit.config import from_json, nearest, to_json
from sievit.policies import (
    AttentionConfig,
    DToPConfig,
    KeepAllConfig,
    PolicyConfig,
    PolicyOptions,
    SViTConfig,
    chosen_policy,
    policies,
    policy_config,
)
from sievit.text import load_json
from tiny import refused


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
    refused(message, from_json, Outer, data)


def test_a_missing_field_and_an_unreadable_file_are_named(tmp_path: Path) -> None:
    refused("policy", from_json, Outer, {"name": "x"})
    file = tmp_path / "config.json"
    refused(r"config\.json", load_json, Outer, file)
    file.write_text("{", encoding="utf-8")
    refused("cannot be read as JSON", load_json, Outer, file)


def test_nearest_lists_what_there_is() -> None:
    assert nearest("alhpa", ["alpha", "beta"]) == "; did you mean 'alpha'? (known: alpha, beta)"
    assert nearest("zzz", ["alpha"]) == " (known: alpha)"


# A policy by name and fields, as the command line takes it.


EXITS = DToPConfig(thresholds=(0.7,), keep_per_class=2)


@dataclass(frozen=True)
class MineConfig(PolicyConfig):
    """Control."""

    name: str = "a"
    pair: tuple[int, int] | None = None
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("own", "policy", "given", "chosen"),
    [
        (EXITS, None, [], EXITS),
        (EXITS, "dtop", [], EXITS),
        (EXITS, "keep_all", [], KeepAllConfig()),
        (KeepAllConfig(), "dtop", ["thresholds=0.95"], DToPConfig(thresholds=(0.95,))),
        (EXITS, None, ["thresholds=0.9,1"], DToPConfig(thresholds=(0.9, 1.0), keep_per_class=2)),
        (EXITS, "dtop", ["thresholds=[0.9, 1]", "grade=margin"], DToPConfig((0.9, 1.0), 2, "margin")),
        (EXITS, None, ["keep_per_class=3", "rejoin=True"], DToPConfig((0.7,), 3, rejoin=True)),
        (EXITS, None, ["static_left=0.2,0.4"], DToPConfig((0.7,), 2, static_left=(0.2, 0.4))),
        (SViTConfig(budgets=(0.5, 1.5)), None, ["budget=0.7"], SViTConfig(budgets=(0.5, 1.5), budget=0.7)),
        (SViTConfig(static_shares=(0.5,)), None, ["static_shares=None"], SViTConfig()),
        (SViTConfig(), None, ["threshold=-0.5"], SViTConfig(threshold=-0.5)),
        (KeepAllConfig(), "attention", ["shares=0.7,0.5"], AttentionConfig(shares=(0.7, 0.5))),
        (MineConfig(), None, ["name=b=c", "pair=1,2", "names=d"], MineConfig("b=c", (1, 2), ("d",))),
    ],
)
def test_a_policy_is_chosen(own: PolicyConfig, policy: str | None, given: list[str], chosen: PolicyConfig):
    assert chosen_policy(own, PolicyOptions(policy=policy, set=tuple(given))) == chosen


@pytest.mark.parametrize(
    ("policy", "given", "message"),
    [
        ("dtopp", "thresholds=1", "unknown policy 'dtopp'; did you mean 'dtop'"),
        ("no_such_package:Mine", "a=1", "no_such_package"),
        (None, "treshold=1", "the policy 'dtop' has no field 'treshold'; did you mean 'thresholds'"),
        (None, "thresholds", "write FIELD=VALUE"),
        (None, "keep_per_class=many", "--set keep_per_class: 'many' is not of type int"),
        (None, "grade=best", "--set grade: 'best' is not one of 'max', 'margin', 'entropy'"),
        (None, "thresholds=2", r"thresholds is 2\.0"),
    ],
)
def test_mistakes_name_the_way_out(policy: str | None, given: str, message: str):
    refused(message, chosen_policy, EXITS, PolicyOptions(policy=policy, set=(given,)))
