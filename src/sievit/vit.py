"""A plain vision transformer with timm's parameter names, and the one loop over its blocks.

Letters: b images, n = h*w grid tokens, p prefix tokens, t packed tokens, c channels.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sievit.packed import (
    Backend,
    Dense,
    Layout,
    Masked,
    Packed,
    PackedAmong,
    Packing,
    pack,
    pad,
    padding_mask,
    unpack,
)
from sievit.policies.base import Policy
from sievit.tokens import Tokens, Trace

Mode = Literal["auto", "packed", "padded", "masked"]
Sizes = list[tuple[int, int]]


@dataclass(frozen=True)
class ViTConfig:
    """A plain ViT of the DeiT / AugReg / MAE family; names are timm's.

    Attributes:
        grid: (h, w) in tokens that the position embedding is stored for; it is resized to every other grid.
        drop_path_rate: stochastic depth, growing linearly over the blocks from 0 to this rate.
        final_norm: whether the last tokens are normalised (timm's `norm`); dense heads usually take them raw.
        pos_antialias: resize positions with an anti-aliased bicubic filter, as timm does (the SViT release does not).
    """

    grid: tuple[int, int] = (14, 14)
    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    class_token: bool = False
    final_norm: bool = False
    norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    pos_antialias: bool = True

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, (b, 3, H, W) to (b, n, c)."""

    def __init__(self, *, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; `layout` knows which tokens see each other."""

    def __init__(self, *, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        computed = layout.queries(x)
        if computed is x:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # (..., h, d)
        else:
            q, k, v = self._project_apart(computed, x)
        return self.proj(layout.attend(q, k, v).flatten(-2))

    def _project_apart(self, computed: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of some tokens, keys and values of more."""
        dim, bias = self.qkv.in_features, self.qkv.bias
        q = F.linear(computed, self.qkv.weight[:dim], None if bias is None else bias[:dim])
        kv = F.linear(seen, self.qkv.weight[dim:], None if bias is None else bias[dim:])
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return q.unflatten(-1, (self.num_heads, -1)), k, v


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; stochastic depth drops whole images from a branch."""

    def __init__(self, config: ViTConfig, *, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(dim=dim, num_heads=config.num_heads, qkv_bias=config.qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * config.mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, layout: Layout, num_images: int) -> Tensor:
        x = layout.queries(x) + self._dropped(self.attn(self.norm1(x), layout), layout, num_images)
        return x + self._dropped(self.mlp(self.norm2(x)), layout, num_images)

    def _dropped(self, y: Tensor, layout: Layout, num_images: int) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return y
        survives = torch.rand(num_images, device=y.device) >= self.drop_path
        return y * layout.per_image(survives.to(y.dtype) / (1.0 - self.drop_path))


def execute(
    block: Block, tokens: Tokens, *, mode: Mode = "auto", backend: Backend = "auto", inplace: bool = False
) -> Tokens:
    """Compute one block for the tokens that take part; all others stay as they are.

    Args:
        mode: `packed` computes exactly the chosen tokens; `padded` pads each image's chosen tokens to the longest
            image; `masked` computes everything and hides the others, which is what straight-through gates need.
            `auto` is `masked` where the canvas carries a gate and `packed` elsewhere.
        backend: attention of the packed mode, see `Packed`.
        inplace: write results into the canvas that came in; for a caller that owns it and needs no gradient.
    """
    part, b = tokens.taking_part(), tokens.x.shape[0]
    if mode == "auto":
        mode = "packed" if tokens.gate is None else "masked"
    if part is None and tokens.gate is None:
        return replace(tokens, x=block(tokens.x, Dense(), b))
    if mode == "masked":
        return _execute_masked(block, tokens)
    assert part is not None, "a gate without a choice"
    packing = Packing.of(part)
    if not sum(packing.lengths):
        return tokens
    if tokens.context is not None:
        visible = part | F.pad(tokens.context, (tokens.num_prefix, 0), value=True)
        among = Packing.of(visible)
        packed = block(pack(tokens.x, among), PackedAmong(packing, among), b)
        return replace(tokens, x=unpack(tokens.x, packed, packing, inplace=inplace))
    packed = pack(tokens.x, packing)
    if mode == "padded":
        padded = block(pad(packed, packing), Masked(padding_mask(packing)), b)
        packed = padded.flatten(0, 1).index_select(0, packing.slots)
    else:
        packed = block(packed, Packed(packing, backend), b)
    return replace(tokens, x=unpack(tokens.x, packed, packing, inplace=inplace))


def _execute_masked(block: Block, tokens: Tokens) -> Tokens:
    """x = m * block(x) + (1 - m) * x, with the deselected tokens hidden as keys (SViT, section 3)."""
    part = tokens.taking_part()
    if part is None:
        part = torch.ones(tokens.x.shape[:2], dtype=torch.bool, device=tokens.x.device)
    seen = part
    if tokens.context is not None:
        seen = part | F.pad(tokens.context, (tokens.num_prefix, 0), value=True)
    y = block(tokens.x, Masked(seen), tokens.x.shape[0])
    if tokens.gate is None:
        return replace(tokens, x=torch.where(part[..., None], y, tokens.x))
    gate = F.pad(tokens.gate, (tokens.num_prefix, 0), value=1.0)[..., None].to(y.dtype)
    return replace(tokens, x=gate * y + (1 - gate) * tokens.x)


class ViT(nn.Module):
    """Patch embedding, positions, blocks. Parameter names are timm's."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_prefix = int(config.class_token)
        self.patch_embed = PatchEmbed(patch_size=config.patch_size, embed_dim=config.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim)) if config.class_token else None
        num_positions = self.num_prefix + config.grid[0] * config.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, num_positions, config.embed_dim))
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, images: Tensor, sizes: Sizes | None = None) -> Tokens:
        """Images (b, 3, H, W), normalised, to a canvas.

        Args:
            sizes: (height, width) in pixels of each image inside the padded batch. Positions are resized to each
                image's own grid, and tokens that stand on padding alone are marked as not valid, so that an image
                gives the same features alone and in any batch. None: the images fill the batch.

        Raises:
            ValueError: a side is not a multiple of the patch size, or a size does not fit into the batch.
        """
        patch = self.config.patch_size
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        if images.shape[2] % patch or images.shape[3] % patch:
            raise ValueError(f"images of {images.shape[2]}x{images.shape[3]} pixels: not a multiple of patch {patch}")
        x = self.patch_embed(images)  # (b, n, c)
        grids = None if sizes is None else [(-(-h // patch), -(-w // patch)) for h, w in sizes]
        if grids is None or all(g == grid for g in grids):
            valid, positions = None, self._grid_positions(grid)
        else:
            valid, positions = self._canvas_positions(grids, grid)
            x = x * valid[..., None]
        x = x + positions.to(x.dtype)
        if self.cls_token is not None:
            prefix = self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([prefix.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        return Tokens(x=x, grid=grid, num_prefix=self.num_prefix, valid=valid)

    def run_blocks(
        self,
        tokens: Tokens,
        policy: Policy,
        trace: Trace,
        *,
        start: int = 0,
        stop: int | None = None,
        mode: Mode = "auto",
        backend: Backend = "auto",
    ) -> tuple[Tokens, Trace]:
        """The one loop: before each block the policy decides, then the executor computes, then the trace remembers."""
        inplace = not torch.is_grad_enabled()
        if inplace:
            tokens = replace(tokens, x=tokens.x.clone(memory_format=torch.contiguous_format))
        stop = len(self.blocks) if stop is None else stop
        for index in range(start, stop):
            tokens, aux = policy.before_block(index, tokens, trace)
            block = self.blocks[index]
            assert isinstance(block, Block)
            tokens = execute(block, tokens, mode=mode, backend=backend, inplace=inplace)
            trace = trace.record(tokens, aux)
        if stop == len(self.blocks):
            tokens, aux = policy.after_blocks(tokens, trace)
            trace = trace.finish(aux)
        return replace(tokens, gate=None), trace

    def forward(
        self,
        images: Tensor,
        policy: Policy,
        sizes: Sizes | None = None,
        *,
        mode: Mode = "auto",
        backend: Backend = "auto",
    ) -> tuple[Tokens, Trace]:
        """Images (b, 3, H, W) to the canvas after the last block (normalised if `final_norm`) and the trace."""
        tokens = self.embed(images, sizes)
        tokens, trace = self.run_blocks(tokens, policy, Trace.start(tokens), mode=mode, backend=backend)
        return replace(tokens, x=self.norm(tokens.x)), trace

    def _grid_positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, n, c): position embeddings of the grid tokens, resized to `grid`."""
        stored = self.pos_embed[:, self.num_prefix :]
        if grid == self.config.grid:
            return stored
        planes = stored.transpose(1, 2).unflatten(2, self.config.grid).float()
        planes = F.interpolate(planes, grid, mode="bicubic", align_corners=False, antialias=self.config.pos_antialias)
        return planes.flatten(2).transpose(1, 2)

    def _canvas_positions(self, grids: Sizes, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(b, n) bool and (b, n, c): for images of several grids on one canvas, zeros on padding."""
        positions = self.pos_embed.new_zeros(len(grids), *grid, self.config.embed_dim)
        valid = torch.zeros(len(grids), *grid, dtype=torch.bool, device=positions.device)
        for own in set(grids):
            if own[0] > grid[0] or own[1] > grid[1] or min(own) < 1:
                raise ValueError(f"an image of {own} tokens does not fit on a canvas of {grid}")
            rows = torch.tensor([i for i, g in enumerate(grids) if g == own], device=positions.device)
            plane = self._grid_positions(own).unflatten(1, own)[0]
            own_canvas = F.pad(plane, (0, 0, 0, grid[1] - own[1], 0, grid[0] - own[0]))
            positions = positions.index_copy(0, rows, own_canvas.expand(len(rows), -1, -1, -1).to(positions.dtype))
            valid[rows, : own[0], : own[1]] = True
        return valid.flatten(1), positions.flatten(1, 2)
