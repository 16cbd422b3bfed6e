"""Plain ViTs of timm: the DeiT / AugReg / MAE family."""

from typing import Any

from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.convert.keys import Rules, load_strictly, need, rename
from sievit.vit import ViT, ViTConfig

RULES: Rules = (
    (r"(cls_token|pos_embed|patch_embed\.proj\..*)", r"\1"),
    (r"(blocks\.\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\..*)", r"\1"),
    (r"(norm\..*)", r"\1"),
    (r"(?:head|fc_norm)\..*", None),  # the classifier
)


def timm_vit(
    source: nn.Module | dict[str, Tensor],
    *,
    num_heads: int | None = None,
    grid: tuple[int, int] | None = None,
    norm_eps: float = 1e-6,
) -> ViT:
    """Our ViT with the weights of timm's.

    Args:
        source: a timm `VisionTransformer` or its state dict.
        num_heads: needed for a state dict, where no shape tells it.
        grid: (h, w) of the position embedding; needed for a state dict whose grid is not square.
        norm_eps: of the layer norms; read from a module.

    Raises:
        ConfigError: the model is of another family, or keys are missing, unknown or of other shapes.
    """
    if isinstance(source, nn.Module):
        num_heads, grid, norm_eps = _read_module(source)
        state = source.state_dict()
    else:
        state = source
    name = "a plain timm ViT (DeiT, AugReg, MAE)"
    if num_heads is None:
        raise ConfigError("a state dict does not tell the number of heads: give num_heads")
    state = rename(state, RULES, source=name)
    patches = need(state, "patch_embed.proj.weight", source=name)
    embed_dim = patches.shape[0]
    prefix = int("cls_token" in state)
    positions = need(state, "pos_embed", source=name).shape[1] - prefix
    if grid is None:
        side = round(positions**0.5)
        grid = (side, side)
    if grid[0] * grid[1] != positions:
        raise ConfigError(f"{positions} positions do not fill a grid of {grid[0]}x{grid[1]}: give grid")
    vit = ViT(
        ViTConfig(
            grid=grid,
            patch_size=patches.shape[2],
            embed_dim=embed_dim,
            depth=1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=0),
            num_heads=num_heads,
            mlp_ratio=need(state, "blocks.0.mlp.fc1.weight", source=name).shape[0] / embed_dim,
            qkv_bias="blocks.0.attn.qkv.bias" in state,
            class_token=bool(prefix),
            final_norm="norm.weight" in state,
            norm_eps=norm_eps,
        )
    )
    load_strictly(vit, state, source=name)
    return vit.eval()


def _read_module(model: nn.Module) -> tuple[int, tuple[int, int], float]:
    """Heads, grid and eps, after a look at everything that the family does not have."""
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise ConfigError(f"{type(model).__name__} is not a plain timm VisionTransformer")
    if getattr(model, "no_embed_class", False):
        raise ConfigError("timm models whose positions leave out the class token are not supported yet")
    if not isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity):
        raise ConfigError("timm models with a norm before the blocks (CLIP style) are not supported yet")
    block: Any = model.blocks[0]
    activation = getattr(block.mlp, "act", None)
    if not isinstance(activation, nn.GELU):
        raise ConfigError(f"timm models with {type(activation).__name__} in the MLP are not supported yet")
    grid = model.patch_embed.grid_size
    return int(block.attn.num_heads), (int(grid[0]), int(grid[1])), float(block.norm1.eps)
