"""RoIAlign over a pyramid: torchvision's kernel, and for CPU the same sums as one weighted gather.

torchvision's CPU kernel walks over a map channel by channel and its backward runs on one thread. Written as bags of
(pixel, weight) pairs over all levels at once, with the channels of a pixel side by side, `embedding_bag` does it ten to
twenty times faster, forward and backward.

Letters: b images, r boxes of the whole batch, c channels, s cells per side. Boxes are xyxy pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from sievit.heads.config import RoIConfig


def box_levels(boxes: Tensor, config: RoIConfig, num_levels: int) -> Tensor:
    """(r,) int: the map that each box (r, 4) is pooled from, larger boxes from coarser maps."""
    size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    relative = size / config.finest_size
    level = (relative + 1e-6).log2() if config.level_rule == "inside" else relative.log2() + 1e-6
    return level.floor().clamp(0, num_levels - 1).long()


def pool_boxes(features: list[Tensor], rois: Tensor, size: int, config: RoIConfig) -> Tensor:
    """RoIAlign of each box on the map of its level, in float32: (r, c, size, size), channels_last on CPU.

    Args:
        features: (b, c, h, w) at strides 4, 8, 16, 32.
        rois: (r, 5), the image and the box.
    """
    return (pool_by_bags if rois.device.type == "cpu" else pool_by_kernel)(features, rois, size, config)


def pool_by_kernel(
    features: list[Tensor], rois: Tensor, size: int, config: RoIConfig, *, fixed: bool = False
) -> Tensor:
    """`pool_boxes` with torchvision's kernel, level by level.

    Args:
        fixed: no shape depends on the boxes: all of them are pooled from every map.
    """
    levels = box_levels(rois[:, 1:], config, len(features))
    pooled = rois.new_zeros(rois.shape[0], features[0].shape[1], size, size)
    for level, feature in enumerate(features):
        here, options = levels == level, (size, 0.25 / 2**level, config.sampling_ratio, config.aligned)
        if fixed:
            own = roi_align(feature.float(), rois * here[:, None], *options)
            pooled = torch.where(here[:, None, None, None], own, pooled)
        else:
            index = here.nonzero().squeeze(1)
            pooled = pooled.index_copy(0, index, roi_align(feature.float(), rois.index_select(0, index), *options))
    return pooled


def pool_by_bags(features: list[Tensor], rois: Tensor, size: int, config: RoIConfig) -> Tensor:
    """`pool_boxes` as one weighted gather."""
    images, boxes = rois[:, 0].long(), rois[:, 1:]
    channels, levels = features[0].shape[1], box_levels(boxes, config, len(features))
    pixels = torch.cat([feature.permute(0, 2, 3, 1).reshape(-1, channels) for feature in features]).float()
    heights, widths = (torch.tensor([f.shape[axis] for f in features])[levels] for axis in (2, 3))
    firsts = torch.tensor([0, *(f.shape[0] * f.shape[2] * f.shape[3] for f in features[:-1])]).cumsum(0)[levels]
    corners = boxes * 0.25 / 2 ** levels[:, None] - (0.5 if config.aligned else 0.0)
    extents = corners[:, 2:] - corners[:, :2]
    if not config.aligned:
        extents = extents.clamp(min=1)
    rows = _interpolate(corners[:, 1], extents[:, 1], heights, size, config.sampling_ratio)
    columns = _interpolate(corners[:, 0], extents[:, 0], widths, size, config.sampling_ratio)
    index, weight, offsets = _outer(rows, columns, firsts + images * heights * widths, widths, size)
    bags = F.embedding_bag(index, pixels, offsets, mode="sum", per_sample_weights=weight)
    return bags.view(-1, size, size, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True, slots=True)
class Runs:
    """Along one axis, the run of neighbouring pixels that makes each cell of each box.

    Attributes:
        first, length, offset: (r*s,) int, the run's first pixel, its length, and where its weights begin.
        weights: (sum of lengths,) float.
    """

    first: Tensor
    length: Tensor
    offset: Tensor
    weights: Tensor


def _interpolate(start: Tensor, extent: Tensor, limit: Tensor, size: int, sampling_ratio: int) -> Runs:
    """Mean of linear interpolations at evenly spaced points of each cell, as RoIAlign takes them.

    Args:
        start, extent: (r,) float, the box along this axis in pixels of its map.
        limit: (r,) int, the map's length.
    """
    cell = extent / size
    count = torch.full_like(limit, sampling_ratio) if sampling_ratio > 0 else cell.ceil().long().clamp(min=0)
    low_cell = start[:, None] + torch.arange(size) * cell[:, None]
    low_cell, cell, count, limit = low_cell.flatten(), *(x.repeat_interleave(size) for x in (cell, count, limit))
    run = torch.arange(len(count)).repeat_interleave(count)  # (points,): the run that each point belongs to
    nth = torch.arange(len(run)) - (count.cumsum(0) - count)[run]
    position = low_cell[run] + (nth + 0.5) * (cell / count)[run]
    last = limit[run] - 1
    inside = (position >= -1) & (position <= last + 1)
    position = position.clamp(min=0)
    low = position.long().minimum(last)
    high = (low + 1).minimum(last)
    upper = torch.where(low == last, 0.0, position - low)
    share = inside / count[run]

    none = torch.zeros_like(count)
    first = none.scatter_reduce(0, run, low, "amin", include_self=False)
    length = none.scatter_reduce(0, run, high + 1, "amax") - first
    offset = length.cumsum(0) - length
    weights = share.new_zeros(int(length.sum()))
    at = (offset - first)[run]
    weights.index_add_(0, at + low, share * (1 - upper))
    weights.index_add_(0, at + high, share * upper)
    return Runs(first=first, length=length, offset=offset, weights=weights)


def _outer(rows: Runs, columns: Runs, base: Tensor, width: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels of each cell (r*s*s) of all boxes: their indices and weights, and where each cell's begin.

    Args:
        base: (r,) int, the index of the first pixel of the box's map.
        width: (r,) int, pixels per row of that map.
    """
    # A strip is one row of pixels within one cell: strips are ordered by box, cell row, cell column, pixel row.
    cells = torch.arange(len(base) * size * size)
    row = cells // size
    column = cells // (size * size) * size + cells % size
    num_strips, strip_length = rows.length[row], columns.length[column]
    cell = cells.repeat_interleave(num_strips)
    nth = torch.arange(len(cell)) - (num_strips.cumsum(0) - num_strips)[cell]
    row, column, box = row[cell], column[cell], cell // (size * size)
    length = columns.length[column]
    end = length.cumsum(0)
    strip_weight = rows.weights[rows.offset[row] + nth]
    to_pixel = base[box] + (rows.first[row] + nth) * width[box] + columns.first[column] - (end - length)
    to_weight = columns.offset[column] - (end - length)

    strip = torch.arange(len(cell)).repeat_interleave(length)
    counter = torch.arange(len(strip))
    index = counter + to_pixel[strip]
    weight = strip_weight[strip] * columns.weights[counter + to_weight[strip]]
    per_cell = num_strips * strip_length
    return index, weight, per_cell.cumsum(0) - per_cell
