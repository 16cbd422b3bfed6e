"""The released SegViT and DToP: a ViT with attention-to-mask heads behind some of its blocks."""

import re
from collections.abc import Collection, Sequence

from torch import Tensor

from sievit.config import ConfigError
from sievit.convert.keys import Rules, load_strictly, need, numbers, released_vit, rename
from sievit.heads import ATMConfig
from sievit.losses import ATMLossConfig
from sievit.models.segmenter import SegmentationNet, build_net
from sievit.policies import KeepAllConfig, PolicyConfig
from sievit.vit import ViTConfig

VIT_RULES: Rules = (
    (r"backbone\.cls_token", None),
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
    (r"heads\.\d+\.loss_decode\.criterion\.empty_weight", None),
)
"""The heads, numbered by stage."""

DROPPED = {
    r"backbone\.cls_token": "the class token leaves before the first block",
    r".*_head\..*loss_decode\.criterion\.empty_weight": "a constant of the loss",
}
"""The keys that these rules leave out, and why."""

SOURCE = "a released SegViT or DToP segmenter"


def segvit_segmenter(
    state_dict: dict[str, Tensor],
    *,
    num_heads: int | None = None,
    head_num_heads: int,
    out_indices: Sequence[int],
    policy: PolicyConfig | None = None,
    released_loss: bool = False,
    drop_path_rate: float = 0.0,
) -> SegmentationNet:
    """The network that a state dict in the naming of the released SegViT and DToP describes; sizes are read from the
    shapes.

    Args:
        num_heads: of the blocks; no shape tells it. None: 64 channels each. head_num_heads: of the heads' decoders.
        out_indices: 0-based blocks behind which the heads stand, the last one's included.
        policy: DToP's, with thresholds for its auxiliary heads; None: every token is computed.
        released_loss: ignored pixels are background in the heads' losses, as in the released code.
        drop_path_rate: of the blocks, for further training.

    Returns:
        The network in evaluation mode. Called on normalised images (b, 3, H, W) it returns the scores
        (b, classes, H, W) and the trace; `trace.exited` holds per stage who has left, (b, n). The released heads resize
        to the size of the training images first: give `head_size=(512, 512)` in the call for that.

    Raises:
        ConfigError: keys are missing, unknown, or of a shape that does not fit the others.
    """
    state, vit = read_network(state_dict, num_heads=num_heads, drop_path_rate=drop_path_rate)
    found = num_stages(state_dict)
    if found != len(out_indices):
        raise ConfigError(f"not {SOURCE} with heads behind the blocks {out_indices}: it has {found} heads")
    queries = need(state, "heads.0.queries", source=SOURCE, ndim=2)
    hidden = need(state, "heads.0.layers.0.fc1.weight", source=SOURCE, ndim=2).shape[0]
    head = ATMConfig(
        channels=queries.shape[1],
        num_heads=head_num_heads,
        num_layers=1 + max(numbers(state, "heads.0.layers.")),
        mlp_ratio=hidden / queries.shape[1],
        loss=ATMLossConfig(ignored="background") if released_loss else ATMLossConfig(),
    )
    net = build_net(vit, KeepAllConfig() if policy is None else policy, head, tuple(out_indices), len(queries))
    load_strictly(net, state, source=SOURCE)
    return net.eval()


def read_network(
    state_dict: dict[str, Tensor], *, num_heads: int | None, drop_path_rate: float = 0.0
) -> tuple[dict[str, Tensor], ViTConfig]:
    """The state dict under our names, in float32, and the ViT that it describes; else as `segvit_segmenter`."""
    state = rename(numbered_heads(state_dict), (*VIT_RULES, *ATM_RULES), source=SOURCE)
    state = {key: value.float() for key, value in state.items()}
    vit = released_vit(state, num_heads=num_heads, norm_eps=1e-6, drop_path_rate=drop_path_rate, source=SOURCE)
    return state, vit


def left_out(keys: Collection[str]) -> dict[str, list[str]]:
    """The keys that are not used, by the reason why."""
    found = {why: [key for key in keys if re.fullmatch(pattern, key)] for pattern, why in DROPPED.items()}
    return {why: names for why, names in found.items() if names}


def num_stages(state_dict: dict[str, Tensor]) -> int:
    """How many heads a state dict in the released naming has, the last one's included."""
    return len(numbers(numbered_heads(state_dict), "heads."))


def numbered_heads(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The heads under `heads.0`, `heads.1`, ...: the auxiliary ones, and the decode head behind them."""
    last = f"heads.{len(numbers(state, 'auxiliary_head.'))}."
    names = {key: re.sub(r"^decode_head\.", last, re.sub(r"^auxiliary_head\.", "heads.", key)) for key in state}
    return {names[key]: value for key, value in state.items()}
