"""Patches, positions, blocks.

Letters: b images, n = h*w grid tokens, p prefix tokens, c channels, d channels per head.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.policies.base import Policy, PolicyConfig, build_policy
from sievit.tokens import Tokens, Trace
from sievit.vit.block import Block, norm
from sievit.vit.config import ViTConfig
from sievit.vit.execution import Execution
from sievit.vit.loop import run_blocks
from sievit.vit.projections import Projections
from sievit.vit.rope import rope_table, unmoved

Sizes = list[tuple[int, int]]
"""Per image (height, width) in pixels, inside a padded batch."""


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, (b, 3, H, W) to (b, n, c)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, patch, stride=patch, bias=config.patch_bias)
        self.norm = norm(config, config.embed_dim, there=config.patch_norm)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))


class ViT(nn.Module):
    """Patch embedding, positions, blocks. Parameter names are timm's."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_prefix = config.num_prefix
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.num_registers, dim)) if config.num_registers else None
        self.num_stored_prefix = self.num_prefix if config.pos_embed == "all" else 0
        num_positions = self.num_stored_prefix + config.grid[0] * config.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, num_positions, dim)) if config.pos_embed != "none" else None
        self.norm_pre = norm(config, dim, there=config.norm_pre)
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, drop_path=rate) for rate in rates)
        self.norm = norm(config, dim, there=config.final_norm)
        self._init_weights()

    def _init_weights(self) -> None:
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for prefix in (self.cls_token, self.reg_token):
            if prefix is not None:
                nn.init.normal_(prefix, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, images: Tensor, sizes: Sizes | Tensor | None = None) -> Tokens:
        """Images (b, 3, H, W), normalised, to a canvas.

        Args:
            sizes: (height, width) in pixels of each image inside the padded batch. Positions are resized to each
                image's own grid, and tokens that stand on padding alone are marked as not valid, so that an image
                gives the same features alone and in any batch. None: the images fill the batch. A tensor (b, 2) int64
                says the same to a program that is exported.

        Raises:
            ConfigError: a side is not a multiple of the stride of the tokens.
            ValueError: a size does not fit into the batch.
        """
        stride = self.config.stride
        grid = (images.shape[2] // stride, images.shape[3] // stride)
        if images.shape[2] % stride or images.shape[3] % stride:
            what = "patch" if stride == self.config.patch_size else "token stride"
            raise ConfigError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels: not a multiple of {what} {stride}; "
                "resize or pad them"
            )
        x = self.patch_embed(self._fitted(images))  # (b, n, c)
        if isinstance(sizes, Tensor):
            if self.config.rope is not None:
                raise ConfigError("rotary positions of images that are padded have no program yet")
            own, cells = None, (sizes + stride - 1) // stride
            valid, positions = standing(cells, grid).flatten(1), self._positions_of(cells, grid)
        else:
            own = None if sizes is None else [(-(-h // stride), -(-w // stride)) for h, w in sizes]
            own = None if own is None or all(each == grid for each in own) else own
            valid = None if own is None else self._valid(own, grid, x.device)
            positions = self._on_canvas(own, grid, self._grid_positions)
        if positions is not None:
            x = x + positions.to(x.dtype)
        x = self.norm_pre(torch.cat([*self._prefix(x), x], dim=1))
        if valid is not None:
            x = x * F.pad(valid, (self.num_prefix, 0), value=True)[..., None]
        rope = self._on_canvas(own, grid, self._grid_rope)
        if rope is not None and self.num_prefix:
            still = unmoved(self.num_prefix, self.config.head_dim, rope)
            rope = torch.cat([still.expand(rope.shape[0], -1, -1), rope], dim=1)
        return Tokens(x=x, grid=grid, num_prefix=self.num_prefix, valid=valid, rope=rope)

    def _fitted(self, images: Tensor) -> Tensor:
        """The images so large that a patch stands for `stride` of their pixels."""
        config = self.config
        if config.stride == config.patch_size:
            return images
        # one more token of zeros at the edges, so that an image's last pixels look the same alone and in a padded batch
        height, width = (side // config.stride * config.patch_size for side in images.shape[2:])
        images = F.pad(images, (0, config.stride, 0, config.stride))
        larger = (height + config.patch_size, width + config.patch_size)
        if torch.compiler.is_exporting():  # OpenVINO's antialiasing is another one
            lines = zip(images.shape[2:], larger, (height, width), strict=True)
            down, across = (resize_weights(images.new_full((1,), own), old, new, _linear) for old, own, new in lines)
            return down @ images @ across.mT
        resized = F.interpolate(images, larger, mode="bilinear", align_corners=False, antialias=True)
        return resized[..., :height, :width]

    def _prefix(self, x: Tensor) -> list[Tensor]:
        """Class token and registers, (b, ., c) each."""
        tokens: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if not tokens:
            return []
        prefix = torch.cat(tokens, dim=1)
        if self.pos_embed is not None and self.num_stored_prefix:
            prefix = prefix + self.pos_embed[:, : self.num_stored_prefix]
        return [prefix.to(x.dtype).expand(x.shape[0], -1, -1)]

    run_blocks = run_blocks

    def forward(
        self,
        images: Tensor,
        policy: Policy,
        sizes: Sizes | Tensor | None = None,
        *,
        execution: Execution = Execution(),
    ) -> tuple[Tokens, Trace]:
        """Images (b, 3, H, W) to the canvas after the last block (normalised if `final_norm`) and the trace."""
        tokens = self.embed(images, sizes)
        tokens, trace = self.run_blocks(tokens, policy, Trace.start(tokens), execution=execution)
        return replace(tokens, x=self.norm(tokens.x)), trace

    def build_policy(self, config: PolicyConfig, **parts: Any) -> Policy:
        """The policy that `config` describes, for this backbone.

        Args:
            parts: further parts of the model that a policy may need (`Policy.needs`): `heads`.
        """
        own = self.config
        parts = {"project": self.project, "num_heads": own.num_heads, **parts}
        return build_policy(config, embed_dim=own.embed_dim, depth=own.depth, **parts)

    def project(self, index: int, tokens: Tokens) -> Projections:
        """What a policy may ask of the attention of block `index` before it, over the tokens that take part."""
        block = self.blocks[index]
        assert isinstance(block, Block)
        return Projections.before(block, tokens, class_token=self.config.class_token)

    def _grid_positions(self, grid: tuple[int, int]) -> Tensor | None:
        """(n, c): position embeddings of the grid tokens, resized to `grid`; None in families without."""
        if self.pos_embed is None:
            return None
        if torch.compiler.is_exporting():  # runtimes resize otherwise
            own = torch.stack([torch.full((1,), edge) for edge in grid], dim=1)
            positions = self._positions_of(own, grid)
            return None if positions is None else positions[0]
        stored = self.pos_embed[:, self.num_stored_prefix :]
        if grid == self.config.grid:
            return stored[0]
        return resized_positions(stored, self.config.grid, grid, antialias=self.config.pos_antialias)[0]

    def _positions_of(self, own: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """(b, n, c): position embeddings, resized to each image's `own` (b, 2) rows and columns, on a canvas."""
        config = self.config
        if self.pos_embed is None:
            return None
        stored = self.pos_embed[0, self.num_stored_prefix :].unflatten(0, config.grid).float()
        lines = zip(own.unbind(1), config.grid, grid, strict=True)
        kernel, antialias = partial(_cubic, a=-0.5 if config.pos_antialias else -0.75), config.pos_antialias
        rows, columns = (resize_weights(*line, kernel, antialias=antialias) for line in lines)
        across = torch.einsum("bxj,ijc->bixc", columns, stored)
        return torch.einsum("byi,bixc->byxc", rows, across).flatten(1, 2)

    def _grid_rope(self, grid: tuple[int, int]) -> Tensor | None:
        """(n, 2d): rotary positions of the grid tokens; None in families without."""
        config = self.config
        if config.rope is None:
            return None
        return rope_table(config.rope, grid, config.head_dim, self.patch_embed.proj.weight.device)

    @staticmethod
    def _on_canvas(
        grids: Sizes | None, grid: tuple[int, int], rows_of: Callable[[tuple[int, int]], Tensor | None]
    ) -> Tensor | None:
        """(b or 1, n, ...): `rows_of` of each image's own grid, on the canvas of all; zeros on padding. `grids` None:
        there is none."""
        if grids is None:
            rows = rows_of(grid)
            return None if rows is None else rows[None]
        planes: dict[tuple[int, int], Tensor] = {}
        for own in dict.fromkeys(grids):
            rows = rows_of(own)
            if rows is None:
                return None
            plane = rows.unflatten(0, own)
            planes[own] = F.pad(plane, (0, 0, 0, grid[1] - own[1], 0, grid[0] - own[0])).flatten(0, 1)
        if len(planes) == 1:
            return next(iter(planes.values()))[None]
        return torch.stack([planes[own] for own in grids])

    @staticmethod
    def _valid(grids: Sizes, grid: tuple[int, int], device: torch.device) -> Tensor:
        """(b, n) bool: which tokens of the canvas stand on their image."""
        for own in grids:
            if own[0] > grid[0] or own[1] > grid[1] or min(own) < 1:
                raise ValueError(f"an image of {own} tokens does not fit on a canvas of {grid}")
        return standing(torch.tensor(grids, device=device), grid).flatten(1)


def standing(own: Tensor, grid: tuple[int, int]) -> Tensor:
    """(b, h, w) bool: which cells of a map of `grid` (h, w) stand on images of `own` (b, 2) rows and columns."""
    y = torch.arange(grid[0], device=own.device) < own[:, :1]
    x = torch.arange(grid[1], device=own.device) < own[:, 1:]
    return y[:, :, None] & x[:, None, :]


def resized_positions(stored: Tensor, old: tuple[int, int], new: tuple[int, int], *, antialias: bool) -> Tensor:
    """(1, n, c): learned positions of one grid, resized bicubically to another."""
    planes = stored.transpose(1, 2).unflatten(2, old).float()
    planes = F.interpolate(planes, new, mode="bicubic", align_corners=False, antialias=antialias)
    return planes.flatten(2).transpose(1, 2)


def resize_weights(
    own: Tensor, old: int, length: int, kernel: Callable[[Tensor], Tensor], *, antialias: bool = True
) -> Tensor:
    """(b, length, old): what each cell of a line of `old` counts in each of the first `length` cells of lines that are
    resized from it to `own` (b,) cells, as `torch.nn.functional.interpolate` does by a kernel of distances x >= 0."""
    scale = (old / own.float())[:, None, None]
    centres = (torch.arange(length, device=own.device)[:, None] + 0.5) * scale - 0.5  # (b, length, 1)
    if antialias:
        weights = kernel(((torch.arange(old, device=own.device) - centres) / scale.clamp(min=1)).abs())
        return weights / weights.sum(2, keepdim=True).clamp(min=0.1)  # zero beyond the line
    weights = kernel((torch.arange(-2, old + 2, device=own.device) - centres).abs())
    first, inner, last = weights.split([3, old - 2, 3], dim=2)  # the edges are repeated
    return torch.cat([first.sum(2, keepdim=True), inner, last.sum(2, keepdim=True)], dim=2)


def _linear(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution at distances x >= 0."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0))
