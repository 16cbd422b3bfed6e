"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3), in plain PyTorch.

Letters: b images, q queries, s values over all levels, h heads, d channels per head, l levels, p points per level.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = list[tuple[int, int]]


class DeformAttn(nn.Module):
    """Each query attends to a few points around its position in every level of a feature pyramid.

    Args:
        value_ratio: width of the values, relative to `dim`.
    """

    def __init__(self, *, dim: int, num_heads: int, num_levels: int, num_points: int, value_ratio: float = 1.0) -> None:
        super().__init__()
        value_dim = int(dim * value_ratio)
        if value_dim % num_heads:
            raise ValueError(f"{value_dim} value channels are not a multiple of {num_heads} heads")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, value_dim)
        self.output_proj = nn.Linear(value_dim, dim)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.num_heads) * (2.0 * math.pi / self.num_heads)
        ring = torch.stack([angle.cos(), angle.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)  # (h, 2), on the unit square
        reach = torch.arange(1, self.num_points + 1)[:, None]
        bias = (ring[:, None, None] * reach).expand(-1, self.num_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for proj in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(proj.weight)
            nn.init.zeros_(proj.bias)

    def forward(
        self, queries: Tensor, points: Tensor, features: Tensor, shapes: Shapes, valid: Tensor | None = None
    ) -> Tensor:
        """The queries (b, q, c) after attention, in the same shape.

        Args:
            points: (q, 2), positions of the queries as x, y in 0..1 of the canvas.
            features: (b, s, c), the levels one after the other, row-major.
            shapes: (h, w) of each level.
            valid: (b, s) bool, features that stand on the image; others count as zero, as outside the map.
        """
        values = self.value_proj(features)
        if valid is not None:
            values = values * valid[..., None].to(values.dtype)
        # offsets and logits as one product: each of them is a narrow one
        projections = (self.sampling_offsets, self.attention_weights)
        weight, bias = (torch.cat([getattr(each, name) for each in projections]) for name in ("weight", "bias"))
        sizes = [each.out_features for each in projections]
        offsets, logits = F.linear(queries, weight, bias).float().split(sizes, dim=-1)
        offsets = offsets.unflatten(-1, (self.num_heads, self.num_levels, self.num_points, 2))
        weights = logits.unflatten(-1, (self.num_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))
        x, y = points.unbind(-1)
        centres = torch.stack([torch.stack([x * w, y * h], -1) for h, w in shapes], 1) - 0.5  # (q, l, 2) in pixels
        positions = offsets + centres[:, None, :, None]  # (b, q, h, l, p, 2)
        out = deform_sample(values.unflatten(-1, (self.num_heads, -1)), shapes, positions, weights)
        return self.output_proj(out.to(queries.dtype))


def deform_sample(values: Tensor, shapes: Shapes, positions: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinearly interpolated values, (b, q, h * d); zero outside a level. One embedding-bag gathers
    and sums rows, which is faster than `grid_sample` on each level.

    Args:
        values: (b, s, h, d).
        positions: (b, q, h, l, p, 2) float32, x and y in pixels of the level; 0 is the centre of the first pixel.
        weights: (b, q, h, l, p).
    """
    b, _, h, d = values.shape
    q = positions.shape[1]
    table = _bordered(values.flatten(2), shapes)  # (b, s', h * d)
    # of an image's rows of the table the first, by head, in rows of d
    origin = torch.arange(b, dtype=torch.int32, device=values.device)[:, None] * (table.shape[1] * h)
    origin = (origin + torch.arange(h, dtype=torch.int32, device=values.device))[:, None, :, None]  # (b, 1, h, 1)
    bags, shares, start = [], [], 0
    for level, (rows, columns) in enumerate(shapes):
        x, y = positions[:, :, :, level].unbind(-1)  # (b, q, h, p)
        x, y = x.clamp(-1, columns), y.clamp(-1, rows)  # from there outwards everything is zero
        x0, y0 = x.floor().nan_to_num(), y.floor().nan_to_num()  # what is not a number comes out as such, by its shares
        stride = columns + 1
        corner = ((y0 + 1) * stride + x0 + (start + 1)).to(torch.int32) * h + origin
        bags.append(torch.stack([corner, corner + h, corner + stride * h, corner + (stride + 1) * h], -1))
        below = (y - y0) * weights[:, :, :, level]
        above = weights[:, :, :, level] - below
        below_right, above_right = below * (x - x0), above * (x - x0)
        shares.append(torch.stack([above - above_right, above_right, below - below_right, below_right], -1))
        start += (rows + 3) * stride
    bag, share = (torch.stack(each, 3).flatten(0, 2).flatten(1) for each in (bags, shares))  # (b * q * h, l * p * 4)
    if torch.compiler.is_exporting():  # runtimes have no such operation
        rows = table.flatten(0, 1).unflatten(-1, (h, d)).flatten(0, 1)[bag.flatten().long()].unflatten(0, bag.shape)
        return (share[:, None].to(table.dtype) @ rows).reshape(b, q, h * d)
    out = F.embedding_bag(bag, table.view(-1, d), per_sample_weights=share.to(table.dtype), mode="sum")
    return out.view(b, q, h * d)


def _bordered(values: Tensor, shapes: Shapes) -> Tensor:
    """(b, s, c) with zeros around each level, so that corners outside need no test: a row above, two below, and a
    column before, which also stands behind the row before it; two more at the end, for the last corner's neighbours."""
    levels = values.split([rows * columns for rows, columns in shapes], dim=1)
    padded = [F.pad(x.unflatten(1, shape), (0, 0, 1, 0, 1, 2)) for x, shape in zip(levels, shapes, strict=True)]
    return torch.cat([*(x.flatten(1, 2) for x in padded), values.new_zeros(values.shape[0], 2, values.shape[2])], 1)


def reference_points(shapes: Shapes, device: torch.device) -> Tensor:
    """(q, 2): centres of the cells of each level in turn, row-major, as x, y in 0..1."""
    points = []
    for rows, columns in shapes:
        y = (torch.arange(rows, dtype=torch.float32, device=device) + 0.5) / rows
        x = (torch.arange(columns, dtype=torch.float32, device=device) + 0.5) / columns
        points.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
    return torch.cat(points)
