"""What recipes share: a listed recipe, the sparse one that goes on from a dense one, and their ViTs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sievit.config import kind_of
from sievit.engine.recipe import Recipe
from sievit.policies import PolicyConfig
from sievit.vit import RopeConfig, ViTConfig


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


VIT_S = ViTConfig(embed_dim=384, num_heads=6, drop_path_rate=0.1, pos_antialias=False)
VIT_B = replace(VIT_S, embed_dim=768, num_heads=12)
VIT_L = replace(VIT_S, embed_dim=1024, depth=24, num_heads=16, drop_path_rate=0.3)

DINOV2_S = ViTConfig(
    grid=(37, 37), patch_size=14, embed_dim=384, depth=12, num_heads=6, class_token=True, layer_scale="both"
)
DINOV2_B = replace(DINOV2_S, embed_dim=768, num_heads=12)
DINOV3_S = ViTConfig(
    grid=(16, 16),
    embed_dim=384,
    num_heads=6,
    qkv_bias=False,
    class_token=True,
    num_registers=4,
    pos_embed="none",
    rope=RopeConfig(kind="centred", temperature=100.0),
    layer_scale="both",
    norm_eps=1e-5,
)
DINOV3_B = replace(DINOV3_S, embed_dim=768, num_heads=12)

NAMES = {
    DINOV2_S: "vit_small_patch14_dinov2.lvd142m",
    DINOV2_B: "vit_base_patch14_dinov2.lvd142m",
    DINOV3_S: "vit_small_patch16_dinov3.lvd1689m",
    DINOV3_B: "vit_base_patch16_dinov3.lvd1689m",
}
"""What timm calls the weights of DINOv2 (arXiv 2304.07193) and DINOv3 (arXiv 2508.10104)."""


def weights(vit: ViTConfig) -> Path:
    """For `train.vit_from`: timm's download of a backbone of `NAMES`."""
    return Path(f"timm:{NAMES[vit]}")
