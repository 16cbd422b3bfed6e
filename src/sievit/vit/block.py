"""The transformer block of the plain families, with timm's parameter names; visibility is the layout's."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sievit.vit.config import Activation, ViTConfig
from sievit.vit.packed import Layout
from sievit.vit.rope import rotate

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


def norm(config: ViTConfig, dim: int, *, there: bool = True) -> nn.Module:
    """The family's norm over `dim` channels, or nothing where it is not there."""
    if not there:
        return nn.Identity()
    return nn.LayerNorm(dim, eps=config.norm_eps) if config.norm == "layer" else nn.RMSNorm(dim, eps=config.norm_eps)


class LayerScale(nn.Module):
    """A learned scale per channel."""

    def __init__(self, dim: int, *, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Heads(NamedTuple):
    """Queries, keys (normalised, not yet rotated) and values of tokens, (..., h, d) each."""

    q: Tensor
    k: Tensor
    v: Tensor


class Attention(nn.Module):
    """Multi-head self-attention; the layout has visibility and rotary positions of the tokens."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.interleaved = config.rope is not None and config.rope.interleaved
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.q_norm = norm(config, config.head_dim, there=config.qk_norm)
        self.k_norm = norm(config, config.head_dim, there=config.qk_norm)
        self.norm = norm(config, dim, there=config.attn_norm)
        self.proj = nn.Linear(dim, dim, bias=config.proj_bias)

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Heads]:
        """Of the tokens of a layout (..., c) those that it computes, and all queries, keys and values."""
        computed = layout.queries(x)
        if computed is x:
            q, k, v = self.project(x, 0, 3)
        else:
            (q,), (k, v) = self.project(computed, 0, 1), self.project(x, 1, 3)
        heads = Heads(self.q_norm(q), self.k_norm(k), v)
        q, k = heads.q, heads.k
        if layout.rope is not None:
            q = rotate(q, layout.queries(layout.rope), interleaved=self.interleaved)
            k = rotate(k, layout.rope, interleaved=self.interleaved)
        return self.proj(self.norm(layout.attend(q, k, v).flatten(-2))), heads

    def project(self, x: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        """Of the tokens (..., c) those from `start` to `stop` of queries, keys and values, (..., h, d) each."""
        if (start, stop) == (0, 3):
            y = self.qkv(x)
        else:
            rows, bias = slice(start * self.qkv.in_features, stop * self.qkv.in_features), self.qkv.bias
            y = F.linear(x, self.qkv.weight[rows], None if bias is None else bias[rows])
        return y.unflatten(-1, (stop - start, self.num_heads, -1)).unbind(-3)


class Mlp(nn.Module):
    """Linear, activation, linear; or gated, with the first layer's first half as the gate."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim, hidden_dim = config.embed_dim, config.hidden_dim
        self.act, self.gated = ACTIVATIONS[config.act], config.gated_mlp
        self.fc1 = nn.Linear(dim, 2 * hidden_dim if config.gated_mlp else hidden_dim, bias=config.proj_bias)
        self.norm = norm(config, hidden_dim, there=config.mlp_norm)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=config.proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.fc2(self.norm(self.act(gate) * x))
        return self.fc2(self.norm(self.act(x)))


class Block(nn.Module):
    """Pre-norm transformer block; stochastic depth drops whole images from a branch."""

    def __init__(self, config: ViTConfig, *, drop_path: float) -> None:
        super().__init__()
        dim, scaled = config.embed_dim, config.layer_scale
        self.norm1 = norm(config, dim)
        self.attn = Attention(config)
        self.ls1 = nn.Identity() if scaled == "none" else LayerScale(dim, init_values=config.init_values)
        self.norm2 = norm(config, dim)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(dim, init_values=config.init_values) if scaled == "both" else nn.Identity()
        self.drop_path = drop_path

    def forward(self, x: Tensor, layout: Layout, num_images: int) -> Tensor:
        return self.feed(self.attend(x, layout, num_images)[0], layout, num_images)

    def attend(self, x: Tensor, layout: Layout, num_images: int) -> tuple[Tensor, Heads]:
        """The first half: attention, and the queries, keys and values that it used."""
        y, heads = self.attn(self.norm1(x), layout)
        return layout.queries(x) + self._dropped(self.ls1(y), layout, num_images), heads

    def feed(self, x: Tensor, layout: Layout, num_images: int) -> Tensor:
        """The second half: the MLP."""
        return x + self._dropped(self.ls2(self.mlp(self.norm2(x))), layout, num_images)

    def _dropped(self, y: Tensor, layout: Layout, num_images: int) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return y
        survives = torch.rand(num_images, device=y.device) >= self.drop_path
        return y * layout.per_image(survives.to(y.dtype) / (1.0 - self.drop_path))
