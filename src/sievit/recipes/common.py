"""What recipes share: a listed recipe, and the sparse one that goes on from a dense one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sievit.config import kind_of
from sievit.engine.recipe import Recipe
from sievit.policies import PolicyConfig


@dataclass(frozen=True)
class Listed:
    """A recipe, and the line that `sievit recipes` prints of it."""

    summary: str
    recipe: Recipe


def with_policy(recipe: Recipe, policy: PolicyConfig, **training: Any) -> Recipe:
    """The recipe with another policy and other fields of `train`."""
    return replace(recipe, model=replace(recipe.model, policy=policy), train=replace(recipe.train, **training))


def pair(
    name: str,
    what: str,
    dense: Recipe,
    policy: PolicyConfig,
    *,
    paper: tuple[str, str] | None = None,
    sparse_name: str | None = None,
    **training: Any,
) -> dict[str, Listed]:
    """A dense recipe, and the one that trains it with `policy` from the run of the dense one.

    Args:
        what: the dense model and its data, in words.
        paper: figures of the dense and of the sparse model in the paper.
        sparse_name: by default the dense name with the policy's behind it.
        training: fields of `train` of the sparse recipe; `steps` or `epochs` is among them.
    """
    length = f"{training['steps'] // 1000}k iterations" if "steps" in training else f"{training['epochs']} epochs"
    method = type(policy).__name__.removesuffix("Config")
    in_paper = ("", "") if paper is None else tuple(f" ({figures} in the paper)" for figures in paper)
    sparse = with_policy(dense, policy, init_from=Path("runs") / name, vit_from=None, **training)
    return {
        name: Listed(f"Dense {what}{in_paper[0]}", dense),
        sparse_name or f"{name}_{kind_of(policy)}": Listed(f"{method}, {length} from {name}{in_paper[1]}", sparse),
    }
