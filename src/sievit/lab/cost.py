"""The same cost for every method: dials of policies, turned to a share of what the dense model costs."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from sievit.engine.recipe import Recipe, open_data
from sievit.lab.plan import Variant, with_weights
from sievit.measure.modes import DENSE
from sievit.models.base import Model
from sievit.models.build import build
from sievit.policies import PolicyConfig
from sievit.tune import targets
from sievit.tune.options import Tuning
from sievit.tune.workload import Workload

IMAGES = 16
"""Of the training set, as they are, by which dials are turned."""


def at_costs(variants: Sequence[Variant], shares: Sequence[float]) -> list[Variant]:
    """The variants, and behind them each trained one whose policy has a dial at these shares of the dense GFLOPs."""
    found = list(variants)
    for variant in (v for v in variants if v.weights is None and shares):
        with torch.device("meta"):
            dials = build(variant.recipe.model).policy.dials(lambda config: ())
        for share in shares if dials else ():
            name = f"{variant.name}_at_{share:g}"
            found.append(replace(with_weights(variant, name, curve=variant.curve or variant.name), cost=share))
    return found


@torch.inference_mode()
def turned(model: Model, recipe: Recipe, share: float) -> PolicyConfig:
    """The policy of a model with the least pruning that costs at most a share of the dense GFLOPs.

    Where it does not reach that low, the most pruning that there is.
    """
    data, _ = open_data(recipe)
    data.transform = None
    images = [data[i][0] for i in range(min(IMAGES, len(data)))]
    workload = Workload(model, [[image] for image in images])
    limit = targets.MaxGFLOPs(workload, share * workload.cost(DENSE).gflops)
    return limit.find(targets.Variant(workload, "dynamic", model.policy.config, Tuning())).config
