"""The plans that ship."""

from dataclasses import replace
from typing import Any

from sievit.config import ConfigError, named_elsewhere, nearest
from sievit.engine.recipe import Recipe
from sievit.lab.corruptions import CORRUPTIONS, SEVERITIES
from sievit.lab.plan import DENSE, START, Plan, Variant, joined, trained, with_weights
from sievit.policies import (
    ALGMConfig,
    ATSConfig,
    AttentionConfig,
    CroprConfig,
    DToPConfig,
    DynamicViTConfig,
    EViTConfig,
    EvoViTConfig,
    ExpeditConfig,
    PolicyConfig,
    RandomConfig,
    SpreadConfig,
    SViTConfig,
    ToMeConfig,
    TopNormConfig,
)
from sievit.policies.selection import StagesConfig

SVIT = SViTConfig(dither="grid", loss_weight=20.0)
"""Gates that draw, in training by chance and in the test by a fixed pattern: to a gate similar tokens are alike."""
GATES_LR = 4e-3
"""Of gates, which start from random weights and learn within some dozens of steps, at any rate of the others."""


def _dense(recipe: Recipe) -> Variant:
    return trained(recipe, DENSE)


def _drawing(recipe: Recipe) -> dict[str, Any]:
    """Of trainings of gates that draw: they begin with their shares, and learn from left-out tokens, so that blocks
    compute all."""
    return {"policy_lr": GATES_LR / recipe.train.lr}


def _gates(recipe: Recipe) -> dict[str, Any]:
    """Of trainings of other gates: they have to find their shares, and then the chosen tokens alone are computed."""
    steps = recipe.train.steps
    return {"policy_lr": 2 * GATES_LR / recipe.train.lr, "selected_after": (steps and steps // 3) or None}


def _smaller(dense: Variant, *, stride: int, shares: tuple[float, ...] = (0.875, 0.75, 0.625)) -> list[Variant]:
    """A model on smaller images, whose edges are multiples of the stride of the tokens."""
    given, name = dense.recipe.model.input, "" if dense.name == DENSE else f"{dense.name}_"
    assert given.min_size is not None, "the recipe's model resizes its images"
    found = []
    for share in shares:
        edge = round(given.min_size * share / stride) * stride
        size = replace(given, min_size=edge, max_size=round(given.max_size * edge / given.min_size))
        curve = f"{name.replace('_', ', ')}smaller images"
        found.append(with_weights(dense, f"{name}size_{edge}", curve=curve, input=size))
    return found


def _fewer_blocks(recipe: Recipe, *, blocks: int) -> Variant:
    """The dense model without its last blocks, trained like the others."""
    model = recipe.model.with_depth(recipe.model.vit.depth - blocks)
    return trained(replace(recipe, model=model), f"blocks_{model.vit.depth}", curve="fewer blocks")


def methods(recipe: Recipe) -> list[Variant]:
    """Every method at about the same cost, beside smaller images and fewer blocks."""
    dense = _dense(recipe)
    found = [
        dense,
        *_smaller(dense, stride=recipe.model.vit.stride),
        _fewer_blocks(recipe, blocks=3),
        trained(recipe, "svit", SVIT, **_drawing(recipe)),
        trained(recipe, "svit_propagate", replace(SVIT, propagate=True), **_drawing(recipe)),
        trained(recipe, "dynamicvit", DynamicViTConfig(ratio_weight=10.0), **_gates(recipe)),
        trained(recipe, "dynamicvit_preserve", DynamicViTConfig(ratio_weight=10.0, preserve=True), **_gates(recipe)),
        trained(recipe, "evit", EViTConfig()),
        trained(recipe, "evit_preserve", EViTConfig(preserve=True)),
        trained(recipe, "evo_vit", EvoViTConfig()),
        trained(recipe, "ats", ATSConfig(shares=(0.9,), preserve=True)),
        trained(recipe, "tome", ToMeConfig(share=0.055)),
        trained(recipe, "algm", ALGMConfig(threshold=0.92)),
        trained(recipe, "expedit", ExpeditConfig(side=0.65)),
        trained(recipe, "cropr", CroprConfig(), **_gates(recipe)),
        trained(recipe, "attention", AttentionConfig()),
        trained(recipe, "top_norm", TopNormConfig()),
        trained(recipe, "random", RandomConfig()),
        trained(recipe, "random_propagate", RandomConfig(propagate=True)),
        trained(recipe, "spread", SpreadConfig()),
    ]
    if recipe.model.has_exits:
        exits = trained(recipe, "dtop", DToPConfig(thresholds=(0.9,)))
        smaller = _smaller(replace(exits, weights="dtop"), stride=recipe.model.vit.stride, shares=(0.875, 0.75))
        found += [exits, *_exits(exits, 0.85, 0.95), *smaller]
    return found


def _exits(variant: Variant, *thresholds: float) -> list[Variant]:
    """The weights of a model with early exits, at other thresholds."""
    policy: Any = variant.recipe.model.policy
    return [
        with_weights(variant, f"{variant.name}_{t:g}", curve=variant.name, policy=replace(policy, thresholds=(t,)))
        for t in thresholds
    ]


def preserve(recipe: Recipe) -> list[Variant]:
    """Insight 1: tokens that are left out keep their features on the canvas, or leave it."""
    pairs: list[tuple[str, StagesConfig, dict[str, Any]]] = [
        ("dynamicvit", DynamicViTConfig(ratio_weight=10.0), _gates(recipe)),
        ("evit_unfused", EViTConfig(fuse=False), {}),
        ("ats", ATSConfig(), {}),
    ]
    found = [_dense(recipe)]
    for name, policy, train in pairs:
        found.append(trained(recipe, f"{name}_drop", policy, **train))
        found.append(trained(recipe, f"{name}_preserve", replace(policy, preserve=True), **train))
        found.append(trained(recipe, f"{name}_rejoin", replace(policy, preserve=True, rejoin=True), **train))
    found.append(trained(recipe, "svit_drop", replace(SVIT, reactivate=False, preserve=False), **_drawing(recipe)))
    return [*found, trained(recipe, "svit_cascade", replace(SVIT, reactivate=False), **_drawing(recipe))]


def propagate(recipe: Recipe) -> list[Variant]:
    """Tokens that are left out stay as they are, or get the update of the most similar token; at two budgets, untrained
    too where nothing has to be learnt."""
    dense = _dense(recipe)
    found, start = [dense, *_smaller(dense, stride=recipe.model.vit.stride)], replace(dense, weights=START)
    for shares in ((0.7, 0.49, 0.343), (0.5, 0.25, 0.125)):
        each = {
            "random": RandomConfig(shares=shares),
            "spread": SpreadConfig(shares=shares),
            "top_norm": TopNormConfig(shares=shares),
            "attention": AttentionConfig(shares=shares),
        }
        gates = replace(SVIT, targets=tuple(s for s in shares for _ in range(3)))
        for moved in (False, True):
            name, stay = f"{'propagate' if moved else 'stay'}_{shares[-1]:g}", "" if moved else ", stay"
            for kind, policy in each.items():
                config, curve = replace(policy, propagate=moved), f"{kind}{stay}, untrained"
                found.append(with_weights(start, f"{kind}_{name}_untrained", curve=curve, policy=config))
                found.append(trained(recipe, f"{kind}_{name}", config, curve=f"{kind}{stay}"))
            config = replace(gates, propagate=moved)
            found.append(trained(recipe, f"svit_{name}", config, curve=f"svit{stay}", **_drawing(recipe)))
    return found


def reactivate(recipe: Recipe) -> list[Variant]:
    """Insight 2: tokens that were left out may come back in a later block, or may not."""
    policies = {"svit": SVIT, "svit_cascade": replace(SVIT, reactivate=False)}
    return [_dense(recipe), *(trained(recipe, name, policy, **_drawing(recipe)) for name, policy in policies.items())]


def rate(recipe: Recipe) -> list[Variant]:
    """Insight 3: the share of tokens is held over the batch, so that it follows the image, or in every image."""
    policies = {"svit": SVIT, "svit_by_image": replace(SVIT, per_sample=True)}
    return [_dense(recipe), *(trained(recipe, name, policy, **_drawing(recipe)) for name, policy in policies.items())]


def gate(recipe: Recipe) -> list[Variant]:
    """Insight 4: gates of one, two and three layers, narrow and wide, with a convolution, and attention instead."""
    policies: dict[str, PolicyConfig] = {
        "svit": SVIT,
        "svit_layers_1": replace(SVIT, gate_layers=1),
        "svit_wide": replace(SVIT, hidden_ratio=1.0),
        "svit_layers_3": replace(SVIT, gate_layers=3),
        "svit_convolution": replace(SVIT, gate_kernel=3),
    }
    found = [trained(recipe, name, policy, **_drawing(recipe)) for name, policy in policies.items()]
    return [_dense(recipe), *found, trained(recipe, "attention", AttentionConfig())]


def budget(recipe: Recipe) -> list[Variant]:
    """Shares of tokens and the first block that leaves some out, for gates and for the norm, beside smaller images."""
    dense = _dense(recipe)
    found = [dense, *_smaller(dense, stride=recipe.model.vit.stride)]
    for share in (0.85, 0.7, 0.55):
        shares = (share, share**2, share**3)
        gates = replace(SVIT, targets=tuple(s for s in shares for _ in range(3)))
        found.append(trained(recipe, f"svit_{share:g}", gates, curve="svit", **_drawing(recipe)))
        found.append(trained(recipe, f"top_norm_{share:g}", TopNormConfig(shares=shares), curve="top_norm"))
    for first in (2, 6):
        found.append(trained(recipe, f"svit_from_{first}", replace(SVIT, first_block=first), **_drawing(recipe)))
    return found


def exits(recipe: Recipe) -> list[Variant]:
    """Early exits: thresholds, tokens kept per class, what leavers leave behind; without training, and fine-tuned."""
    dense = _dense(recipe)
    direct = replace(dense, weights=START)
    found = [dense]
    for threshold in (0.98, 0.95, 0.9, 0.8):
        policy = DToPConfig(thresholds=(threshold,))
        found.append(with_weights(direct, f"direct_{threshold:g}", curve="direct", policy=policy))
    tuned = trained(recipe, "dtop", DToPConfig(thresholds=(0.9,)))
    found += [tuned, *_exits(tuned, 0.98, 0.95, 0.8)]
    for kept in (0, 20):
        found.append(trained(recipe, f"dtop_kept_{kept}", DToPConfig(thresholds=(0.9,), keep_per_class=kept)))
    found.append(trained(recipe, "dtop_preserve", DToPConfig(thresholds=(0.9,), preserve=True)))
    return [*found, trained(recipe, "dtop_rejoin", DToPConfig(thresholds=(0.9,), rejoin=True))]


def robustness(recipe: Recipe) -> list[Variant]:
    """Fifteen corruptions of the images at two severities, on which a pruned model may lose more, or spend more."""
    models = [_dense(recipe), trained(recipe, "svit", SVIT, **_drawing(recipe))]
    if recipe.model.has_exits:
        models.append(trained(recipe, "dtop", DToPConfig(thresholds=(0.9,))))
    return models + [
        with_weights(model, f"{model.name}_{name}_{severity}", curve=model.name, corruption=(name, severity))
        for model in models
        for severity in SEVERITIES
        for name in CORRUPTIONS
    ]


PLANS: dict[str, Plan] = {
    each.__name__: each for each in (methods, preserve, propagate, reactivate, rate, gate, budget, exits, robustness)
}


def find_plan(name: str) -> Plan:
    """The plan called `name`, `my_package.module:function`, one of your own, or several, joined by +.

    A variant that several plans have is one row of theirs, and trained once.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    if "+" in name:
        plans = [find_plan(part) for part in name.split("+")]
        return lambda recipe: joined([plan(recipe) for plan in plans])
    if ":" not in name:
        if name not in PLANS:
            raise ConfigError(f"unknown plan {name!r}{nearest(name, PLANS)}; one of your own is package.module:name")
        return PLANS[name]
    found = named_elsewhere(name, "plan")
    if not callable(found):
        module, _, attribute = name.partition(":")
        raise ConfigError(f"plan {name!r}: {module} has no function {attribute!r}")
    return found
