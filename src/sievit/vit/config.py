"""What a plain ViT can be. Words and defaults are timm's."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from sievit.config import Config, ConfigError, Count, Finite, NonNegative, Positive, Rate

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]


@dataclass(frozen=True)
class RopeConfig(Config):
    """Rotary positions of the grid tokens (RoFormer, arXiv 2104.09864, on two axes): one angle per axis and frequency.

    Attributes:
        kind: "index": a token's row and column, at frequencies temperature^-i (EVA-02, arXiv 2303.11331); "centred":
            its centre in -1..1 on each axis, at wave lengths temperature^i (DINOv3, arXiv 2508.10104).
        reference: (h, w) in tokens of the pre-training, which rows and columns of every other grid are scaled to; None
            leaves them as they are. Of "index" only.
        offset: added to rows and columns, in tokens.
        xy: columns first.
        interleaved: pairs of neighbouring channels are rotated, instead of channel i with i + d/2.
    """

    kind: Literal["index", "centred"]
    temperature: Positive
    reference: tuple[Count, Count] | None = None
    offset: Finite = 0.0
    xy: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class ViTConfig(Config):
    """A plain ViT: DeiT, AugReg, MAE, CLIP, DINOv2, DINOv3, EVA-02 and their like; names are timm's where it has one.

    Attributes:
        grid: (h, w) in tokens that the position embedding is stored for; it is resized to every other grid.
        token_stride: pixels of the input per token, where that is not the patch size: images are resized by
            patch_size / token_stride first. For a detector, whose maps stand at stride 16, on a ViT of patch 14.
        mlp_ratio: width of the MLP's middle, relative to the embedding; of a gated one, of each half.
        num_registers: further prefix tokens behind the class token, which like it always take part.
        pos_embed: learned positions of "all" tokens, of the "patches" without the prefix (timm's no_embed_class), or
            "none".
        pos_antialias: resize positions with an anti-aliased bicubic filter, as timm does (the SViT release and
            transformers do not).
        rope: rotary positions of the grid tokens, which travel with them.
        layer_scale: branches that end with a learned scale per channel.
        init_values: what these scales start from.
        gated_mlp: the MLP is fc2(act(a) * b), (a, b) = fc1(x): SwiGLU.
        qk_norm, attn_norm, mlp_norm: norms of queries and keys per head, before the attention's projection
            (scale_attn_norm), before the MLP's second layer (scale_mlp_norm).
        norm: "layer" or "rms", of all norms.
        norm_pre: a norm before the first block (CLIP). patch_norm: one behind the patch embedding.
        final_norm: whether the last tokens are normalised (timm's `norm`); dense heads usually take them raw.
        drop_path_rate: stochastic depth, growing linearly over the blocks from 0 to this rate.
    """

    grid: tuple[Count, Count] = (14, 14)
    patch_size: Count = 16
    token_stride: Count | None = None
    embed_dim: Annotated[int, Interval(ge=1, le=2**16)] = 192
    depth: Annotated[int, Interval(ge=1, le=256)] = 12
    num_heads: Count = 3
    mlp_ratio: Annotated[float, Interval(gt=0, le=64)] = 4.0
    qkv_bias: bool = True
    proj_bias: bool = True
    patch_bias: bool = True
    class_token: bool = False
    num_registers: Annotated[int, Interval(ge=0, le=1000)] = 0
    pos_embed: Literal["all", "patches", "none"] = "all"
    pos_antialias: bool = True
    rope: RopeConfig | None = None
    layer_scale: Literal["none", "both", "attn"] = "none"
    init_values: Finite = 1e-5
    act: Activation = "gelu"
    gated_mlp: bool = False
    qk_norm: bool = False
    attn_norm: bool = False
    mlp_norm: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: NonNegative = 1e-6
    norm_pre: bool = False
    patch_norm: bool = False
    final_norm: bool = False
    drop_path_rate: Rate = 0.0

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.rope is not None and self.head_dim % 4:
            raise ConfigError(f"rotary positions need heads of a multiple of 4 channels, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Channels in the middle of the MLP; of a gated one, what fc2 takes."""
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def num_prefix(self) -> int:
        """Prefix tokens: class token and registers."""
        return int(self.class_token) + self.num_registers

    @property
    def stride(self) -> int:
        """Pixels of the input per token and side."""
        return self.token_stride or self.patch_size
