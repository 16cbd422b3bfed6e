"""A policy by name and fields, as the command line takes it."""

from dataclasses import dataclass

import pytest

from sievit.config import ConfigError
from sievit.policies import (
    AttentionConfig,
    DToPConfig,
    KeepAllConfig,
    PolicyConfig,
    PolicyOptions,
    SViTConfig,
    chosen_policy,
)

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
        (None, "thresholds=2", "thresholds are from 0 to 1"),
    ],
)
def test_mistakes_name_the_way_out(policy: str | None, given: str, message: str):
    with pytest.raises(ConfigError, match=message):
        chosen_policy(EXITS, PolicyOptions(policy=policy, set=(given,)))
