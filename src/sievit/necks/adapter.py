"""ViT-Adapter (ICLR 2023, arXiv 2205.08534) around a plain ViT whose blocks may skip tokens.

A convolutional branch gives features at strides 8, 16 and 32; before each group of blocks an injector adds them to the
tokens, after it an extractor has them attend to the tokens. Tokens that blocks skip are on the canvas all the same, so
the branch uses the whole image.

Letters: b images, n = h*w tokens at stride 16, m = 4n + n + n/4 branch features, c channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from sievit.config import ConfigError, Count, Natural, Positive, Rate, variant
from sievit.necks import NeckConfig
from sievit.necks.deform_attn import DeformAttn, Shapes, reference_points
from sievit.necks.norm import BatchNorm2d, conv_norm_relu
from sievit.policies.base import Policy
from sievit.tokens import Tokens, Trace
from sievit.vit import Execution, Sizes, ViT
from sievit.vit.model import standing


@variant("adapter")
@dataclass(frozen=True)
class AdapterConfig(NeckConfig):
    """The adapter of the papers.

    Attributes:
        conv_inplane: width of the convolutional stem.
        num_points: sampling points per head and level of the deformable attention.
        deform_ratio: width of its values, relative to the embedding.
        cffn_ratio: hidden width of the extractors' feed-forward, relative to the embedding.
        num_interactions: groups that the blocks are split into, of equal length.
        num_extra_extractors: further extractors after the last group.
        drop_path_rate: stochastic depth of the extractors' feed-forward.
    """

    conv_inplane: Count = 64
    deform_num_heads: Count = 6
    num_points: Count = 4
    deform_ratio: Positive = 1.0
    cffn_ratio: Positive = 0.25
    num_interactions: Count = 4
    num_extra_extractors: Natural = 2
    drop_path_rate: Rate = 0.0


class Masks:
    """Which cells of a map stand on the images of a padded batch, by stride; nothing to do when all do."""

    def __init__(self, sizes: Sizes | Tensor | None, canvas: tuple[int, int], device: torch.device) -> None:
        self.canvas = canvas
        if isinstance(sizes, Tensor):
            self.sizes = sizes
            return
        full = sizes is None or all(tuple(size) == tuple(canvas) for size in sizes)
        self.sizes = None if full else torch.tensor(sizes, device=device)

    def at(self, stride: int) -> Tensor | None:
        """(b, 1, h, w) bool, or None when every cell stands on an image."""
        if self.sizes is None:
            return None
        cells, grid = (self.sizes + stride - 1) // stride, (self.canvas[0] // stride, self.canvas[1] // stride)
        return standing(cells, grid)[:, None]

    def apply(self, x: Tensor, stride: int) -> Tensor:
        """(b, c, h, w) with zeros where there is no image."""
        mask = self.at(stride)
        return x if mask is None else x * mask

    def rows(self, strides: tuple[int, ...]) -> Tensor | None:
        """(b, s) bool for flattened maps at several strides."""
        masks = [self.at(stride) for stride in strides]
        return None if masks[0] is None else torch.cat([mask.flatten(1) for mask in masks if mask is not None], 1)


class SpatialPrior(nn.Module):
    """A small convolutional pyramid: images to maps of c channels at strides 4, 8, 16, 32."""

    def __init__(self, *, inplane: int, embed_dim: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_bn(3, inplane, 2), *_conv_bn(inplane, inplane, 1), *_conv_bn(inplane, inplane, 1)
        )
        self.conv2 = nn.Sequential(*_conv_bn(inplane, 2 * inplane, 2))
        self.conv3 = nn.Sequential(*_conv_bn(2 * inplane, 4 * inplane, 2))
        self.conv4 = nn.Sequential(*_conv_bn(4 * inplane, 4 * inplane, 2))
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Conv2d(r * inplane, embed_dim, 1) for r in (1, 2, 4, 4))

    def forward(self, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = images.contiguous(memory_format=torch.channels_last)
        for first in (0, 3, 6):
            x = masks.apply(conv_norm_relu(self.stem[first : first + 3], x), 2)
        c1 = F.max_pool2d(x, 3, stride=2, padding=1)  # all values are >= 0, so zero padding is neutral
        c2 = masks.apply(conv_norm_relu(self.conv2, masks.apply(c1, 4)), 8)
        c3 = masks.apply(conv_norm_relu(self.conv3, c2), 16)
        c4 = masks.apply(conv_norm_relu(self.conv4, c3), 32)
        pairs = ((self.fc1, c1), (self.fc2, c2), (self.fc3, c3), (self.fc4, c4))
        f1, f2, f3, f4 = (_pixelwise(conv, x) for conv, x in pairs)
        return f1, f2, f3, f4


class Injector(nn.Module):
    """Adds branch features to the tokens: x + gamma * attention(x, c)."""

    def __init__(self, config: AdapterConfig, *, dim: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _deform_attn(config, dim=dim, num_levels=3)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, c: Tensor, points: Tensor, shapes: Shapes, valid: Tensor | None) -> Tensor:
        return x + self.gamma * self.attn(self.query_norm(x), points, self.feat_norm(c), shapes, valid)


class Extractor(nn.Module):
    """Adds attention to the tokens to the branch features, then mixes each with its neighbours."""

    def __init__(self, config: AdapterConfig, *, dim: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _deform_attn(config, dim=dim, num_levels=1)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvFfn(dim=dim, hidden_dim=int(dim * config.cffn_ratio))
        self.drop_path = config.drop_path_rate

    def forward(self, c: Tensor, x: Tensor, points: Tensor, shapes: Shapes, masks: Masks) -> Tensor:
        c = c + self.attn(self.query_norm(c), points, self.feat_norm(x), shapes[1:2], masks.rows((16,)))
        y = self.ffn(self.ffn_norm(c), shapes, masks.rows((8, 16, 32)))
        return c + stochastic_depth(y, self.drop_path, "row", self.training)


class ConvFfn(nn.Module):
    """Linear, depth-wise 3x3 convolution on each level, GELU, linear."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, shapes: Shapes, valid: Tensor | None) -> Tensor:
        x = self.fc1(x)
        if valid is not None:
            x = x * valid[..., None].to(x.dtype)
        levels = x.split([h * w for h, w in shapes], dim=1)
        maps = [_to_map(level, shape) for level, shape in zip(levels, shapes, strict=True)]
        x = torch.cat([self.dwconv(each).flatten(2).transpose(1, 2) for each in maps], dim=1)
        return self.fc2(F.gelu(x))


class ViTAdapter(nn.Module):
    """A backbone: images (b, 3, H, W) to four maps, with a policy that chooses the tokens that the blocks compute."""

    size_divisor = 32

    def __init__(self, config: AdapterConfig, *, vit: ViT, policy: Policy) -> None:
        super().__init__()
        dim, depth = vit.config.embed_dim, vit.config.depth
        if vit.config.stride != 16:
            raise ConfigError(f"the adapter needs a token per 16 pixels, not {vit.config.stride}: set token_stride=16")
        if depth % config.num_interactions:
            raise ValueError(f"{depth} blocks do not split into {config.num_interactions} interactions")
        self.config = config
        self.out_channels = dim
        self.vit = vit
        self.policy = policy
        self.spm = SpatialPrior(inplane=config.conv_inplane, embed_dim=dim)
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        nn.init.normal_(self.level_embed)
        self.injectors = nn.ModuleList(Injector(config, dim=dim) for _ in range(config.num_interactions))
        extractors = config.num_interactions + config.num_extra_extractors
        self.extractors = nn.ModuleList(Extractor(config, dim=dim) for _ in range(extractors))
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.norms = nn.ModuleList(BatchNorm2d(dim) for _ in range(4))

    def forward(
        self,
        images: Tensor,
        sizes: Sizes | Tensor | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution = Execution(),
    ) -> tuple[dict[str, Tensor], Trace]:
        """Maps "0" to "3" at strides 4, 8, 16, 32, each (b, c, H/s, W/s), and the trace of the blocks.

        Args:
            images: (b, 3, H, W), normalised; H and W multiples of 32.
            sizes: (height, width) of each image inside the padded batch; None when the images fill it. See `ViT.embed`.
            policy: in place of the backbone's.
        """
        canvas = (images.shape[2], images.shape[3])
        if canvas[0] % 32 or canvas[1] % 32:
            raise ValueError(f"images of {canvas[0]}x{canvas[1]} pixels: the adapter needs multiples of 32")
        policy = self.policy if policy is None else policy
        shapes = [(canvas[0] // s, canvas[1] // s) for s in (8, 16, 32)]
        masks = Masks(sizes, canvas, images.device)
        c1, *levels = self.spm(images, masks)
        pairs = zip(levels, self.level_embed, strict=True)
        c = torch.cat([x.flatten(2).transpose(1, 2) + embed for x, embed in pairs], dim=1)  # (b, m, c)
        tokens = self.vit.embed(images, sizes)
        trace = Trace.start(tokens)
        token_points = reference_points(shapes[1:2], images.device)
        branch_points = reference_points(shapes, images.device)
        group = len(self.vit.blocks) // self.config.num_interactions
        for i, injector in enumerate(self.injectors):
            x = injector(tokens.patches, c, token_points, shapes, masks.rows((8, 16, 32)))
            tokens = tokens.replace_patches(x)
            tokens, trace = self.vit.run_blocks(
                tokens, policy, trace, start=i * group, stop=(i + 1) * group, execution=execution
            )
            stop = None if i + 1 == len(self.injectors) else i + 1  # the further extractors follow the last one
            for extractor in self.extractors[i:stop]:
                c = extractor(c, tokens.patches, branch_points, shapes, masks)
        return self._maps(c1, c, tokens, shapes, masks), trace

    def sampling_macs(self, size: tuple[int, int]) -> float:
        """Multiply-adds of bilinear sampling for an image of `size`: four per channel and point, one for its weight."""
        cells = [(size[0] // s) * (size[1] // s) for s in (8, 16, 32)]
        channels = self.vit.config.embed_dim * self.config.deform_ratio * self.config.num_points * 5
        injected = len(self.injectors) * cells[1] * 3
        extracted = len(self.extractors) * sum(cells)
        return (injected + extracted) * channels

    def timed_parts(self) -> list[tuple[object, str, str]]:
        """Object and name of the methods to time, and the name of each part of the neck in the report."""
        parts: list[tuple[object, str, str]] = [(self.spm, "forward", "neck: spatial prior")]
        parts += [(injector, "forward", "neck: injectors") for injector in self.injectors]
        parts += [(extractor, "forward", "neck: extractors") for extractor in self.extractors]
        return [*parts, (self, "_maps", "neck: maps")]

    def _maps(self, c1: Tensor, c: Tensor, tokens: Tokens, shapes: Shapes, masks: Masks) -> dict[str, Tensor]:
        """Branch features plus the tokens resized to each stride, normalised."""
        levels = c.split([h * w for h, w in shapes], dim=1)
        c2, c3, c4 = (_to_map(level, shape) for level, shape in zip(levels, shapes, strict=True))
        c1 = _sum(self._up(c2), c1)
        x = masks.apply(tokens.map(), 16)
        maps = {}
        for i, (level, scale) in enumerate(((c1, 4.0), (c2, 2.0), (c3, 1.0), (c4, 0.5))):
            resized = x if scale == 1.0 else F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            maps[str(i)] = masks.apply(self.norms[i](_sum(level, resized)), 4 * 2**i)
        return maps

    def _up(self, x: Tensor) -> Tensor:
        """`self.up`, (b, c, h, w) to (b, c, 2h, 2w), as one product per token, channels last."""
        weight, bias = self.up.weight, self.up.bias
        assert bias is not None
        rows = weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * c, c)
        y = F.linear(x.permute(0, 2, 3, 1), rows, bias.repeat(4)).unflatten(3, (2, 2, -1))  # (b, h, w, 2, 2, c)
        return y.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _deform_attn(config: AdapterConfig, *, dim: int, num_levels: int) -> DeformAttn:
    return DeformAttn(
        dim=dim,
        num_heads=config.deform_num_heads,
        num_levels=num_levels,
        num_points=config.num_points,
        value_ratio=config.deform_ratio,
    )


def _conv_bn(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return conv, BatchNorm2d(out_channels), nn.ReLU()


def _pixelwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of one pixel, as a product that leaves the channels last."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight[:, :, 0, 0], conv.bias).permute(0, 3, 1, 2)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """a + b, in inference in a's memory, which is not used again. The cast matters: adding float32 to bfloat16 costs
    thirty times as much as casting it first."""
    return a + b if torch.is_grad_enabled() else a.add_(b.to(a.dtype))


def _to_map(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """(b, h*w, c) to (b, c, h, w), channels last."""
    return x.unflatten(1, shape).permute(0, 3, 1, 2)
