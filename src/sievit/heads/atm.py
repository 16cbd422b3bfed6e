"""Attention to mask (SegViT, arXiv 2210.05844): a query per class; its attention to the tokens is the class's mask."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from sievit.config import ConfigError, Count, Positive, Rate, variant
from sievit.heads.semantic import SemanticHead, SemanticHeadConfig, on_canvas, register_head
from sievit.losses import ATMLossConfig, atm_loss
from sievit.tokens import Prediction, Tokens
from sievit.vit.packed import Packing, any_length, pad, padding_mask


@variant("atm")
@dataclass(frozen=True)
class ATMConfig(SemanticHeadConfig):
    """SegViT's head; the defaults are DToP's for a ViT-B.

    Attributes:
        channels: width of the decoder. num_heads: of its attentions. num_layers: decoder layers.
        mlp_ratio: hidden width of their MLPs.
        dropout: on the attentions, the branches and inside the MLPs.
    """

    channels: Count = 384
    num_heads: Count = 6
    num_layers: Count = 3
    mlp_ratio: Positive = 4.0
    dropout: Rate = 0.1
    loss: ATMLossConfig = field(default_factory=ATMLossConfig)

    def __post_init__(self) -> None:
        if self.channels % self.num_heads:
            raise ConfigError(f"atm: channels {self.channels} is not a multiple of num_heads {self.num_heads}")


class Memory:
    """Pads the keys and values of packed tokens by image; without a `packing` they are whole canvases (b, n, c)."""

    def __init__(self, packing: Packing | None) -> None:
        self.packing = packing
        self.mask: Bool[Tensor, "b longest"] | None = None
        if packing is not None and len(set(packing.lengths)) > 1:
            visible = padding_mask(packing)
            # an image without tokens attends to zeros; its result is not used
            self.mask = visible | ~visible.any(1, keepdim=True)

    def by_image(self, x: Float[Tensor, "*rows c"]) -> Float[Tensor, "b longest c"]:
        """(t, c) or (b, n, c) to (b, longest, c)."""
        return x if self.packing is None else pad(x, self.packing)


class CrossAttention(nn.Module):
    """Attention of queries (b, k, d) to tokens, and the mean over heads of the scaled logits, (b, k, longest)."""

    def __init__(self, dim: int, *, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self, queries: Float[Tensor, "b k d"], x: Float[Tensor, "*rows d"], memory: Memory, *, with_maps: bool
    ) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b k longest"] | None]:
        q, k, v = self.q(queries), memory.by_image(self.k(x)), memory.by_image(self.v(x))
        split = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        mask = None if memory.mask is None else memory.mask[:, None, None, :]
        with nullcontext() if memory.packing is None else any_length():
            out = F.scaled_dot_product_attention(*split, attn_mask=mask, dropout_p=self.dropout * self.training)
        maps = None
        if with_maps:  # the sum over heads of their products is the product over all channels
            head_dim = q.shape[-1] // self.num_heads
            maps = (q * (head_dim**-0.5 / self.num_heads)) @ k.transpose(1, 2)
        return self.proj(out.transpose(1, 2).flatten(2)), maps


class SelfAttention(nn.Module):
    """Queries (b, k, d) among themselves."""

    def __init__(self, dim: int, *, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, queries: Float[Tensor, "b k d"]) -> Float[Tensor, "b k d"]:
        q, k, v = self.qkv(queries).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)  # (b, h, k, d)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training)
        return self.proj(out.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Post-norm: self-attention, cross-attention, MLP with ReLU."""

    def __init__(self, config: ATMConfig) -> None:
        super().__init__()
        dim, hidden = config.channels, int(config.channels * config.mlp_ratio)
        self.self_attn = SelfAttention(dim, num_heads=config.num_heads, dropout=config.dropout)
        self.cross_attn = CrossAttention(dim, num_heads=config.num_heads, dropout=config.dropout)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, queries: Float[Tensor, "b k d"], x: Float[Tensor, "*rows d"], memory: Memory, *, with_maps: bool
    ) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b k longest"] | None]:
        queries = self.norm1(queries + self.drop(self.self_attn(queries)))
        attended, maps = self.cross_attn(queries, x, memory, with_maps=with_maps)
        queries = self.norm2(queries + self.drop(attended))
        hidden = self.drop(F.relu(self.fc1(queries)))
        return self.norm3(queries + self.drop(self.fc2(hidden))), maps


@register_head(ATMConfig)
class ATM(SemanticHead):
    """A decoder of class queries; the maps are the last layer's attention logits, before the softmax.

    With a `part`, only its tokens are projected, packed; the maps of the others stay those of `previous`.
    """

    def __init__(self, config: ATMConfig, *, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.input_proj = nn.Linear(embed_dim, config.channels)
        self.norm = nn.LayerNorm(config.channels)
        self.queries = nn.Parameter(torch.empty(num_classes, config.channels))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.class_embed = nn.Linear(config.channels, 2)
        nn.init.normal_(self.queries)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tokens, part: Bool[Tensor, "b n"] | None = None, previous: Prediction | None = None
    ) -> Prediction:
        x, packing = tokens.patches, None
        if part is not None:
            packing = Packing.of(part)
            if previous is not None and not sum(packing.lengths):
                return previous
            x = x.flatten(0, 1).index_select(0, packing.index)
        x, memory = self.norm(self.input_proj(x)), Memory(packing)
        queries, maps = self.queries.expand(tokens.x.shape[0], -1, -1), None
        for i, layer in enumerate(self.layers):
            queries, maps = layer(queries, x, memory, with_maps=i + 1 == len(self.layers))
        assert maps is not None
        classes = self.class_embed(queries)
        if packing is None:
            return Prediction(maps, classes)
        assert part is not None
        if previous is not None and previous.classes is not None:  # an image without tokens keeps its earlier scores
            classes = torch.where(part.any(1)[:, None, None], classes, previous.classes)
        packed = maps.transpose(1, 2).flatten(0, 1).index_select(0, packing.slots)  # (t, k)
        return Prediction(on_canvas(packed, packing, part.shape, previous), classes)

    def losses(
        self, prediction: Prediction, grid: tuple[int, int], labels: Int[Tensor, "b H W"], ignore_index: int
    ) -> dict[str, Float[Tensor, ""]]:
        assert prediction.classes is not None
        maps = prediction.maps.unflatten(2, grid)
        return atm_loss(prediction.classes, maps, labels, ignore_index=ignore_index, config=self.config.loss)

    def macs(self, tokens: Num[Tensor, " b"], grid: tuple[int, int]) -> Float[Tensor, " b"]:
        t, c, d = tokens.double(), self.input_proj.in_features, self.config.channels
        k = len(self.queries)
        of_queries = 4 * k * d**2 + 2 * k**2 * d + 2 * k * d * int(d * self.config.mlp_ratio) + 2 * k * d**2
        of_tokens = 2 * t * d**2 + 2 * k * t * d
        maps = k * t * d  # the product of the last layer's queries and keys, without the softmax
        computed = t > 0  # else the earlier prediction stands
        return t * c * d + computed * (len(self.layers) * (of_queries + of_tokens) + maps + 2 * k * d)
