"""The released backbones: ViT-Adapter, and SViT, whose blocks are gated."""

import math
import re

from torch import Tensor

from sievit.config import ConfigError
from sievit.convert.keys import Rules, heads_of, load_strictly, need, rename
from sievit.models.backbone import build_backbone
from sievit.necks.adapter import AdapterConfig, ViTAdapter
from sievit.policies import KeepAllConfig, PolicyConfig, SViTConfig
from sievit.policies.selection import PAPER_SCHEDULE
from sievit.vit import ViTConfig

ADAPTER_RULES: Rules = (
    (r"(patch_embed\.proj\..*|pos_embed)", r"vit.\1"),
    (r"interactions\.(\d+)\.injector\.(.*)", r"injectors.\1.\2"),
    (r"interactions\.(\d+)\.extractor\.(ffn\.dwconv)\.dwconv\.(.*)", r"extractors.\1.\2.\3"),
    (r"interactions\.(\d+)\.extractor\.(.*)", r"extractors.\1.\2"),
    (r"(extractors\.\d+\.ffn\.dwconv)\.dwconv\.(.*)", r"\1.\2"),
    (r"(extractors\..*)", r"\1"),
    (r"norm1\.(.*)", r"norms.0.\1"),
    (r"norm2\.(.*)", r"norms.1.\1"),
    (r"norm3\.(.*)", r"norms.2.\1"),
    (r"norm4\.(.*)", r"norms.3.\1"),
    (r"((?:spm|up|level_embed)\b.*)", r"\1"),
)
"""Everything outside the blocks; the extra extractors are numbered behind the others before these rules apply."""

SPARSE_RULES: Rules = (
    (r"blocks\.(\d+)\.TransformerEncoderLayer\.(norm[12]\..*)", r"vit.blocks.\1.\2"),
    (r"blocks\.(\d+)\.TransformerEncoderLayer\.self_attn\.in_proj_(.*)", r"vit.blocks.\1.attn.qkv.\2"),
    (r"blocks\.(\d+)\.TransformerEncoderLayer\.self_attn\.out_proj\.(.*)", r"vit.blocks.\1.attn.proj.\2"),
    (r"blocks\.(\d+)\.TransformerEncoderLayer\.linear1\.(.*)", r"vit.blocks.\1.mlp.fc1.\2"),
    (r"blocks\.(\d+)\.TransformerEncoderLayer\.linear2\.(.*)", r"vit.blocks.\1.mlp.fc2.\2"),
    (r"selective_modules\.(\d+)\.mlp\.(.*)", r"policy.gates.\1.\2"),
    (r"selective_modules\.(\d+)\.(norm\..*)", r"policy.gates.\1.\2"),
)


DENSE_RULES: Rules = ((r"(blocks\.\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\..*)", r"vit.\1"),)
"""The blocks of the dense ViT-Adapter that SViT starts from."""

POINTS = 4
"""Of deformable attention, per head and level, in everything that was released."""


def svit_backbone(
    state_dict: dict[str, Tensor],
    *,
    num_heads: int | None = None,
    deform_num_heads: int | None = None,
    targets: tuple[float, ...] | None = None,
    sample: bool = False,
    drop_path_rate: float = 0.0,
) -> ViTAdapter:
    """The backbone that a state dict in the released SViT naming describes; sizes are read from the shapes.

    Args:
        state_dict: with or without the prefix `backbone.`; keys of the detector beside it (`neck.`, `rpn_head.`,
            `roi_head.`) are left out when there is a prefix.
        num_heads: of the blocks; no shape tells it. None: 64 channels each.
        deform_num_heads: of the deformable attention; None: as many as have four points each.
        targets: share of tokens to keep, spread over the gated blocks; None: the paper's.
        sample: gates draw at inference, as the released test scripts do, instead of taking the arg-max.
        drop_path_rate: of blocks and adapter, for further training.

    Returns:
        The backbone in evaluation mode. Called on images (b, 3, H, W), sides multiples of 32, it returns the maps at
        strides 4, 8, 16, 32 and the trace.

    Raises:
        ConfigError: keys are missing, unknown, or of a shape that does not fit the others.
    """
    source = "a released SViT backbone"
    state = _renamed(state_dict, SPARSE_RULES, source)
    vit = _vit_config(state, num_heads=num_heads, norm_eps=1e-5, drop_path_rate=drop_path_rate, source=source)
    num_gates = len({key.split(".")[2] for key in state if key.startswith("policy.gates.")})
    hidden = need(state, "policy.gates.0.fc1.weight", source=source, ndim=2).shape[0]
    policy = SViTConfig(
        first_block=vit.depth - num_gates,
        targets=PAPER_SCHEDULE if targets is None else targets,
        hidden_ratio=hidden / vit.embed_dim,
        sample=sample,
    )
    return _backbone(state, vit, policy, deform_num_heads, source)


def vit_adapter_backbone(
    state_dict: dict[str, Tensor],
    *,
    num_heads: int | None = None,
    deform_num_heads: int | None = None,
    drop_path_rate: float = 0.0,
) -> ViTAdapter:
    """The backbone that a state dict in the naming of the dense ViT-Adapter describes.

    Its layer norms are of another eps than those of the sparse model that is made from it. Arguments, result and errors
    as of `svit_backbone`.
    """
    source = "a released dense ViT-Adapter backbone"
    state = _renamed(state_dict, DENSE_RULES, source)
    vit = _vit_config(state, num_heads=num_heads, norm_eps=1e-6, drop_path_rate=drop_path_rate, source=source)
    return _backbone(state, vit, KeepAllConfig(), deform_num_heads, source)


def _renamed(state_dict: dict[str, Tensor], blocks: Rules, source: str) -> dict[str, Tensor]:
    """The backbone's part under our names."""
    if any(key.startswith("backbone.") for key in state_dict):
        state_dict = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    state_dict = {k: v.float() if v.is_floating_point() else v for k, v in state_dict.items()}
    state = rename(_number_extra_extractors(state_dict), (*blocks, *ADAPTER_RULES), source=source)
    state["vit.pos_embed"] = need(state, "vit.pos_embed", source=source, ndim=3)[
        :, 1:
    ]  # the class token's row is not used
    return state


def _backbone(
    state: dict[str, Tensor], vit: ViTConfig, policy: PolicyConfig, deform_num_heads: int | None, source: str
) -> ViTAdapter:
    adapter = _adapter_config(state, vit=vit, num_heads=deform_num_heads, source=source)
    backbone = build_backbone(adapter, vit, policy)
    assert isinstance(backbone, ViTAdapter)
    load_strictly(backbone, state, source=source)
    return backbone.eval()


def _number_extra_extractors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Extra extractors of the last interaction as extractors behind the interactions' own."""
    groups = [re.match(r"interactions\.(\d+)\.", key) for key in state]
    last = max((int(group[1]) for group in groups if group), default=0)
    numbered = {}
    for key, value in state.items():
        prefix = f"interactions.{last}.extra_extractors."
        if key.startswith(prefix):
            number, rest = key.removeprefix(prefix).split(".", 1)
            key = f"extractors.{last + 1 + int(number)}.{rest}"
        numbered[key] = value
    return numbered


def _vit_config(
    state: dict[str, Tensor], *, num_heads: int | None, norm_eps: float, drop_path_rate: float, source: str
) -> ViTConfig:
    patches = need(state, "vit.patch_embed.proj.weight", source=source, ndim=4)
    embed_dim = patches.shape[0]
    side = math.isqrt(state["vit.pos_embed"].shape[1])  # the release stores a square of positions
    if side**2 != state["vit.pos_embed"].shape[1]:
        raise ConfigError(f"not {source}: {state['vit.pos_embed'].shape[1]} positions are no square grid")
    return ViTConfig(
        grid=(side, side),
        patch_size=patches.shape[2],
        embed_dim=embed_dim,
        depth=1 + max((int(key.split(".")[2]) for key in state if key.startswith("vit.blocks.")), default=0),
        num_heads=heads_of(embed_dim) if num_heads is None else num_heads,
        mlp_ratio=need(state, "vit.blocks.0.mlp.fc1.weight", source=source, ndim=2).shape[0] / embed_dim,
        norm_eps=norm_eps,
        drop_path_rate=drop_path_rate,
        pos_antialias=False,
    )


def _adapter_config(state: dict[str, Tensor], *, vit: ViTConfig, num_heads: int | None, source: str) -> AdapterConfig:
    interactions = len({key.split(".")[1] for key in state if key.startswith("injectors.")})
    extractors = len({key.split(".")[1] for key in state if key.startswith("extractors.")})
    points = need(state, "extractors.0.attn.attention_weights.weight", source=source, ndim=2).shape[0]  # of all heads
    num_heads = max(points // POINTS, 1) if num_heads is None else num_heads
    if num_heads < 1 or points % num_heads:
        raise ConfigError(f"{points} points of deformable attention do not go to {num_heads} heads (deform_num_heads)")
    return AdapterConfig(
        conv_inplane=need(state, "spm.stem.0.weight", source=source, ndim=4).shape[0],
        deform_num_heads=num_heads,
        num_points=points // num_heads,
        deform_ratio=need(state, "extractors.0.attn.value_proj.weight", source=source, ndim=2).shape[0] / vit.embed_dim,
        cffn_ratio=need(state, "extractors.0.ffn.fc1.weight", source=source, ndim=2).shape[0] / vit.embed_dim,
        num_interactions=interactions,
        num_extra_extractors=extractors - interactions,
        drop_path_rate=vit.drop_path_rate,
    )
