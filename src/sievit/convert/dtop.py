"""The released SegViT and DToP: a ViT with attention-to-mask heads behind some of its blocks."""

import math
from collections.abc import Sequence

from torch import Tensor

from sievit.config import ConfigError
from sievit.convert.keys import Drop, Rules, heads_of, load_strictly, need, rename
from sievit.heads import ATMConfig
from sievit.losses import ATMLossConfig
from sievit.models.segmenter import SegmentationNet, build_net
from sievit.policies import DToPConfig, KeepAllConfig, PolicyConfig
from sievit.vit import ViTConfig

VIT_RULES: Rules = (
    (r"backbone\.cls_token", Drop("the class token leaves before the first block")),
    (r"backbone\.(pos_embed)", r"vit.\1"),
    (r"backbone\.patch_embed\.projection\.(.*)", r"vit.patch_embed.proj.\1"),
    (r"backbone\.layers\.(\d+)\.ln([12])\.(.*)", r"vit.blocks.\1.norm\2.\3"),
    (r"backbone\.layers\.(\d+)\.attn\.attn\.in_proj_(.*)", r"vit.blocks.\1.attn.qkv.\2"),
    (r"backbone\.layers\.(\d+)\.attn\.attn\.out_proj\.(.*)", r"vit.blocks.\1.attn.proj.\2"),
    (r"backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.(.*)", r"vit.blocks.\1.mlp.fc1.\2"),
    (r"backbone\.layers\.(\d+)\.ffn\.layers\.1\.(.*)", r"vit.blocks.\1.mlp.fc2.\2"),
)
"""mmsegmentation's plain ViT."""

ATM_RULES: Rules = (
    (r"heads\.(\d+)\.(input_proj\..*|class_embed\..*)", r"heads.\1.\2"),
    (r"heads\.(\d+)\.proj_norm\.(.*)", r"heads.\1.norm.\2"),
    (r"heads\.(\d+)\.q\.weight", r"heads.\1.queries"),
    (r"heads\.(\d+)\.decoder\.layers\.(\d+)\.self_attn\.in_proj_(.*)", r"heads.\1.layers.\2.self_attn.qkv.\3"),
    (r"heads\.(\d+)\.decoder\.layers\.(\d+)\.self_attn\.out_proj\.(.*)", r"heads.\1.layers.\2.self_attn.proj.\3"),
    (r"heads\.(\d+)\.decoder\.layers\.(\d+)\.multihead_attn\.(.*)", r"heads.\1.layers.\2.cross_attn.\3"),
    (r"heads\.(\d+)\.decoder\.layers\.(\d+)\.linear([12])\.(.*)", r"heads.\1.layers.\2.fc\3.\4"),
    (r"heads\.(\d+)\.decoder\.layers\.(\d+)\.(norm[123]\..*)", r"heads.\1.layers.\2.\3"),
    (r"heads\.\d+\.loss_decode\.criterion\.empty_weight", Drop("a constant of the loss")),
)
"""The heads, numbered by stage."""


def dtop_segmenter(
    state_dict: dict[str, Tensor],
    *,
    num_heads: int | None = None,
    head_num_heads: int,
    out_indices: Sequence[int],
    thresholds: float | Sequence[float],
    k: int = 5,
    released_loss: bool = False,
    drop_path_rate: float = 0.0,
) -> SegmentationNet:
    """The network that a state dict in the released DToP naming describes; sizes are read from the shapes.

    Args:
        num_heads: of the blocks; no shape tells it. None: 64 channels each. head_num_heads: of the heads' decoders.
        out_indices: 0-based blocks behind which the heads stand, the last one's included.
        thresholds: one for all auxiliary heads, or one each, or one each and the last head's; 1 prunes nothing.
        k: tokens per class that stay as context.
        released_loss: ignored pixels are background in the heads' losses, as in the released code.
        drop_path_rate: of the blocks, for further training.

    Returns:
        The network in evaluation mode. Called on normalised images (b, 3, H, W) it returns the scores
        (b, classes, H, W) and the trace; `trace.exited` holds per stage who has left, (b, n). The released heads resize
        to the size of the training images first: give `head_size=(512, 512)` in the call for that.

    Raises:
        ConfigError: keys are missing, unknown, or of a shape that does not fit the others.
    """
    given = (thresholds,) if isinstance(thresholds, int | float) else thresholds
    policy = DToPConfig(thresholds=tuple(float(t) for t in given), keep_per_class=k)
    loss = ATMLossConfig(ignored="background") if released_loss else ATMLossConfig()
    source = "a released DToP segmenter"
    return _net(state_dict, policy, num_heads, head_num_heads, tuple(out_indices), loss, drop_path_rate, source)


def segvit_segmenter(
    state_dict: dict[str, Tensor],
    *,
    num_heads: int | None = None,
    head_num_heads: int,
    out_indices: Sequence[int],
    released_loss: bool = False,
    drop_path_rate: float = 0.0,
) -> SegmentationNet:
    """The dense network of the same naming, with auxiliary heads or without; else as `dtop_segmenter`."""
    loss = ATMLossConfig(ignored="background") if released_loss else ATMLossConfig()
    source = "a released SegViT segmenter"
    places = tuple(out_indices)
    return _net(state_dict, KeepAllConfig(), num_heads, head_num_heads, places, loss, drop_path_rate, source)


def _net(
    state_dict: dict[str, Tensor],
    policy: PolicyConfig,
    num_heads: int | None,
    head_num_heads: int,
    out_indices: tuple[int, ...],
    loss: ATMLossConfig,
    drop_path_rate: float,
    source: str,
) -> SegmentationNet:
    state = rename(numbered_heads(state_dict), (*VIT_RULES, *ATM_RULES), source=source)
    state = {key: value.float() for key, value in state.items()}
    positions = need(state, "vit.pos_embed", source=source, ndim=3)[:, 1:]  # the class token's row is not used
    state["vit.pos_embed"] = positions
    found = num_stages(state_dict)
    if found != len(out_indices):
        raise ConfigError(f"not {source} with heads behind the blocks {out_indices}: it has {found} heads")
    vit = _vit_config(state, num_heads=num_heads, drop_path_rate=drop_path_rate, source=source)
    queries = need(state, "heads.0.queries", source=source, ndim=2)
    hidden = need(state, "heads.0.layers.0.fc1.weight", source=source, ndim=2).shape[0]
    head = ATMConfig(
        channels=queries.shape[1],
        num_heads=head_num_heads,
        num_layers=1 + max(int(key.split(".")[3]) for key in state if key.startswith("heads.0.layers.")),
        mlp_ratio=hidden / queries.shape[1],
        loss=loss,
    )
    net = build_net(vit, policy, head, out_indices, len(queries))
    load_strictly(net, state, source=source)
    return net.eval()


def num_stages(state_dict: dict[str, Tensor]) -> int:
    """How many heads a state dict in the released naming has, the last one's included."""
    return len({key.split(".")[1] for key in numbered_heads(state_dict) if key.startswith("heads.")})


def numbered_heads(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The heads under `heads.0`, `heads.1`, ...: the auxiliary ones, and the decode head behind them."""
    auxiliary = {key.split(".")[1] for key in state if key.startswith("auxiliary_head.")}
    numbered = {}
    for key, value in state.items():
        if key.startswith("auxiliary_head."):
            key = key.replace("auxiliary_head.", "heads.", 1)
        elif key.startswith("decode_head."):
            key = key.replace("decode_head.", f"heads.{len(auxiliary)}.", 1)
        numbered[key] = value
    return numbered


def _vit_config(state: dict[str, Tensor], *, num_heads: int | None, drop_path_rate: float, source: str) -> ViTConfig:
    patches, positions = need(state, "vit.patch_embed.proj.weight", source=source, ndim=4), state["vit.pos_embed"]
    embed_dim, side = patches.shape[0], math.isqrt(positions.shape[1])  # the release stores a square of positions
    if side**2 != positions.shape[1]:
        raise ConfigError(f"not {source}: {positions.shape[1]} positions are no square grid")
    return ViTConfig(
        grid=(side, side),
        patch_size=patches.shape[2],
        embed_dim=embed_dim,
        depth=1 + max((int(key.split(".")[2]) for key in state if key.startswith("vit.blocks.")), default=0),
        num_heads=heads_of(embed_dim) if num_heads is None else num_heads,
        mlp_ratio=need(state, "vit.blocks.0.mlp.fc1.weight", source=source, ndim=2).shape[0] / embed_dim,
        norm_eps=1e-6,
        drop_path_rate=drop_path_rate,
        pos_antialias=False,
    )
