"""A policy with dynamic or with static counts, and its dials."""

from collections.abc import Collection
from typing import Literal

from sievit.policies import PolicyConfig
from sievit.tune.options import Tuning
from sievit.tune.workload import Workload


class Variant:
    """A policy with dynamic or with static counts.

    Args:
        base: the policy with dynamic counts; with static ones it is measured how many tokens this keeps.

    Attributes:
        config: its setting where there is no target.
        dials: see `Policy.dials`.
        is_static, is_ragged: see `Policy`.
    """

    def __init__(
        self, workload: Workload, counts: Literal["dynamic", "static"], base: PolicyConfig, tuning: Tuning
    ) -> None:
        self.workload, self.counts, self.config = workload, counts, base
        policy = workload.policy(base)
        self.dials = policy.dials(workload.traces)
        if counts == "static":
            shares, quantile = workload.cost(base).shares.double(), tuning.quantile
            kept = (shares.mean(1) if quantile is None else shares.quantile(quantile, dim=1)).tolist()

            def turn(position: float | None) -> PolicyConfig:
                static = policy.made_static(kept, multiple=tuning.multiple, position=position)
                assert static is not None
                return static

            self.config, self.dials = turn(None), [turn]
        policy = workload.policy(self.config)
        self.is_static, self.is_ragged = policy.is_static, policy.is_ragged

    def without(self, config: PolicyConfig, dense: Collection[int]) -> PolicyConfig:
        """A setting of it that leaves no token out in the ranges of blocks that start at `dense`."""
        return self.workload.policy(config).without(dense) if dense else config
