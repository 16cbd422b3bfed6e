"""The released backbones: ViT-Adapter, and SViT, whose blocks are gated."""

import re

from torch import Tensor

from sievit.config import ConfigError
from sievit.convert.keys import Rules, load_strictly, need, numbers, released_vit, rename
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
    (r"blocks\.(\d+)\.TransformerEncoderLayer\.linear([12])\.(.*)", r"vit.blocks.\1.mlp.fc\2.\3"),
    (r"selective_modules\.(\d+)\.(?:mlp\.)?(.*)", r"policy.gates.\1.\2"),
)


DENSE_RULES: Rules = ((r"(blocks\.\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\..*)", r"vit.\1"),)
"""The blocks of the dense ViT-Adapter that SViT starts from."""

POINTS = 4
"""Of deformable attention, per head and level, in everything that was released."""


def adapter_backbone(
    state_dict: dict[str, Tensor],
    *,
    num_heads: int | None = None,
    deform_num_heads: int | None = None,
    targets: tuple[float, ...] | None = None,
    sample: bool = False,
    drop_path_rate: float = 0.0,
) -> ViTAdapter:
    """The backbone that a state dict in the naming of the released SViT describes, or of the dense ViT-Adapter that it
    starts from, whose layer norms are of another eps; sizes are read from the shapes.

    Args:
        state_dict: with or without the prefix `backbone.`; keys of the detector beside it (`neck.`, `rpn_head.`,
            `roi_head.`) are left out when there is a prefix.
        num_heads: of the blocks; no shape tells it. None: 64 channels each.
        deform_num_heads: of the deformable attention; None: as many as have four points each.
        targets: of SViT, share of tokens to keep, spread over the gated blocks; None: the paper's.
        sample: gates of SViT draw at inference, as the released test scripts do, instead of taking the arg-max.
        drop_path_rate: of blocks and adapter, for further training.

    Returns:
        The backbone in evaluation mode. Called on images (b, 3, H, W), sides multiples of 32, it returns the maps at
        strides 4, 8, 16, 32 and the trace.

    Raises:
        ConfigError: keys are missing, unknown, or of a shape that does not fit the others.
    """
    if any(key.startswith("backbone.") for key in state_dict):
        state_dict = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    state_dict = {k: v.float() if v.is_floating_point() else v for k, v in state_dict.items()}
    sparse = any(".TransformerEncoderLayer." in k or k.startswith("selective_modules.") for k in state_dict)
    source = f"a released {'SViT' if sparse else 'dense ViT-Adapter'} backbone"
    rules = (*(SPARSE_RULES if sparse else DENSE_RULES), *ADAPTER_RULES)
    state = rename(_number_extra_extractors(state_dict), rules, source=source)
    norm_eps = 1e-5 if sparse else 1e-6
    vit = released_vit(state, num_heads=num_heads, norm_eps=norm_eps, drop_path_rate=drop_path_rate, source=source)
    policy: PolicyConfig = KeepAllConfig()
    if sparse:
        hidden = need(state, "policy.gates.0.fc1.weight", source=source, ndim=2).shape[0]
        policy = SViTConfig(
            first_block=vit.depth - len(numbers(state, "policy.gates.")),
            targets=PAPER_SCHEDULE if targets is None else targets,
            hidden_ratio=hidden / vit.embed_dim,
            sample=sample,
        )
    adapter = _adapter_config(state, vit=vit, num_heads=deform_num_heads, source=source)
    backbone = build_backbone(adapter, vit, policy)
    assert isinstance(backbone, ViTAdapter)
    load_strictly(backbone, state, source=source)
    return backbone.eval()


def _number_extra_extractors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Extra extractors of the last interaction as extractors behind the interactions' own."""
    last = max(numbers(state, "interactions."), default=0)
    extra = re.compile(rf"interactions\.{last}\.extra_extractors\.(\d+)")
    return {extra.sub(lambda m: f"extractors.{last + 1 + int(m[1])}", key): value for key, value in state.items()}


def _adapter_config(state: dict[str, Tensor], *, vit: ViTConfig, num_heads: int | None, source: str) -> AdapterConfig:
    interactions, extractors = len(numbers(state, "injectors.")), len(numbers(state, "extractors."))
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
