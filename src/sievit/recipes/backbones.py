"""The ViTs of the recipes, and what timm calls the weights of the self-supervised ones."""

from dataclasses import replace
from pathlib import Path

from sievit.vit import RopeConfig, ViTConfig

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
