"""Instance masks: run lengths (COCO's RLE) and small patches that are rendered only where a crop needs them.

A large image with hundreds of objects has gigabytes of dense masks and a few hundred kilobytes of patches.

COCO's run lengths go down the columns and begin with a run of zeros. Its compressed form writes each length in groups
of five bits, least significant first, as the difference to the length two places before from the fourth on
(`rleToString` and `rleFrString` in pycocotools' maskApi.c).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from sievit.text import is_number, is_whole

ROUNDING = 2.0
"""Pixels by which boxes and polygons may stick out of their image, as annotation tools round; they are clipped."""

_OUTLINE = 2e6
"""Pixels that the outline of a polygon may be long; pycocotools takes 130 bytes for each of them."""


@dataclass(frozen=True)
class Patch:
    """One mask: `bits` (h, w) bool, tight around the object, its upper left corner at pixel (y, x) of the image."""

    y: int
    x: int
    bits: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """xyxy in pixels, the far edges exclusive."""
        return self.x, self.y, self.x + self.bits.shape[1], self.y + self.bits.shape[0]


@dataclass(frozen=True)
class Masks:
    """The masks of one image of `size` (height, width)."""

    patches: tuple[Patch, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.patches)

    @classmethod
    def from_dense(cls, masks: Tensor | np.ndarray) -> "Masks":
        """From (k, h, w), anything but zero being the object."""
        dense = np.asarray(masks) != 0
        return cls(tuple(tight_patch(mask) for mask in dense), (dense.shape[1], dense.shape[2]))

    @property
    def boxes(self) -> Tensor:
        """The extents, xyxy, (k, 4) float32; all zero for an empty mask."""
        return torch.tensor([patch.box for patch in self.patches], dtype=torch.float32).reshape(-1, 4)

    @property
    def nbytes(self) -> int:
        return sum(patch.bits.size for patch in self.patches)

    def select(self, keep: Sequence[int]) -> "Masks":
        return Masks(tuple(self.patches[i] for i in keep), self.size)

    def dense(self) -> Tensor:
        """(k, h, w) uint8, 0 or 1."""
        return self.render(np.arange(self.size[0]), np.arange(self.size[1]))

    def render(self, rows: np.ndarray, cols: np.ndarray) -> Tensor:
        """`dense()[:, rows][:, :, cols]` without the dense masks, (k, len(rows), len(cols)) uint8.

        `rows` and `cols` are monotone, rising or falling: that covers crops, nearest-neighbour resizing and flips.
        """
        out = np.zeros((len(self.patches), len(rows), len(cols)), dtype=bool)
        if len(self.patches) and len(rows) and len(cols):
            boxes = np.array([patch.box for patch in self.patches])
            bottoms, tops = _spans(rows, boxes[:, 1], boxes[:, 3])
            lefts, rights = _spans(cols, boxes[:, 0], boxes[:, 2])
            for i, patch in enumerate(self.patches):
                r, c = slice(bottoms[i], tops[i]), slice(lefts[i], rights[i])
                if r.start < r.stop and c.start < c.stop:
                    out[i, r, c] = patch.bits[(rows[r] - patch.y)[:, None], cols[c] - patch.x]
        return torch.from_numpy(out.view(np.uint8))


def _spans(index: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of the positions in the monotone `index` whose values are in [low, high)."""
    if index[0] <= index[-1]:
        return np.searchsorted(index, low), np.searchsorted(index, high)
    size = len(index)
    return size - np.searchsorted(index[::-1], high), size - np.searchsorted(index[::-1], low)


def tight_patch(bits: np.ndarray, *, y: int = 0, x: int = 0) -> Patch:
    """Cut the zero margins off a mask (h, w) that lies at (y, x)."""
    rows, cols = np.flatnonzero(bits.any(1)), np.flatnonzero(bits.any(0))
    if not len(rows):
        return Patch(0, 0, np.zeros((0, 0), dtype=bool))
    tight = bits[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    return Patch(y + int(rows[0]), x + int(cols[0]), np.ascontiguousarray(tight, dtype=bool))


def decode_counts(counts: str | bytes) -> np.ndarray:
    """The run lengths of a compressed RLE string.

    Raises:
        ValueError: it is empty, ends within a number or holds other characters.
    """
    if not counts:
        raise ValueError("an RLE string is empty")
    codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, dtype=np.uint8)
    codes = codes.astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("an RLE string holds a character that run lengths cannot have")
    if codes[-1] & 32:
        raise ValueError("an RLE string ends within a number")
    last = np.flatnonzero(codes & 32 == 0)  # the last group of each number
    first = np.concatenate([[0], last[:-1] + 1])
    groups = last - first + 1
    if groups.max() > 8:
        raise ValueError("an RLE string holds a run that no image can have")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(first, groups))
    runs = np.add.reduceat((codes & 31) << shifts, first)
    runs -= np.where(codes[last] & 16, 1 << (5 * groups), 0)
    for differences in (runs[1::2], runs[2::2]):
        np.cumsum(differences, out=differences)
    return runs


def patch_from_runs(runs: np.ndarray, size: tuple[int, int]) -> Patch:
    """The mask of run lengths (columns first, zeros first) in an image of `size` (height, width).

    Raises:
        ValueError: the runs are negative or do not add up to the image.
    """
    height, width = size
    if runs.min(initial=0) < 0 or runs.max(initial=0) > height * width or runs.sum() != height * width:
        raise ValueError(f"the run lengths add up to {runs.sum()}, not to {height} x {width} pixels")
    ends = np.cumsum(runs)
    ones = np.flatnonzero(runs[1::2]) * 2 + 1
    if not len(ones):
        return Patch(0, 0, np.zeros((0, 0), dtype=bool))
    left = int(ends[ones[0]] - runs[ones[0]]) // height
    right = (int(ends[ones[-1]]) - 1) // height + 1
    edges = np.clip(ends, left * height, right * height) - left * height
    lengths = np.diff(edges, prepend=0)
    columns = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return tight_patch(columns.reshape(right - left, height).T, x=left)


def reach(box: tuple[float, float, float, float], size: tuple[int, int]) -> float:
    """Pixels by which a box xyxy sticks out of an image of `size` (height, width); infinite if all of it is outside."""
    height, width = size
    outside = box[2] <= 0 or box[3] <= 0 or box[0] >= width or box[1] >= height
    return math.inf if outside else max(-box[0], -box[1], box[2] - width, box[3] - height)


def check_polygons(polygons: Sequence[Any], size: tuple[int, int]) -> None:
    """Whether polygons can be drawn in an image of `size` (height, width): what is far outside takes all memory.

    Raises:
        ValueError: one of them is no list of points, too long, or sticks out of the image by more than `ROUNDING`.
    """
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(is_number, polygon)):
            raise ValueError("a polygon that is not a list of at least three x, y pairs")
    x, y = ([value for polygon in polygons for value in polygon[axis::2]] for axis in (0, 1))
    out = reach((min(x), min(y), max(x), max(y)), size)
    if out > ROUNDING:
        how = "lie outside" if out == math.inf else f"reach {out:g} pixels outside"
        raise ValueError(f"polygons that {how} an image of {size[1]}x{size[0]} pixels")
    for polygon in polygons:
        if len(polygon) * max(size) > _OUTLINE and _outline(polygon) > _OUTLINE:
            raise ValueError(f"a polygon whose outline is longer than {_OUTLINE:g} pixels")


def _outline(polygon: list[float]) -> float:
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    return sum(max(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in pairwise([*points, points[0]]))


def decode(segmentation: Any, size: tuple[int, int]) -> Patch:
    """The mask of one COCO segmentation: polygons, compressed or uncompressed RLE.

    Raises:
        ValueError: the polygons or the run lengths do not fit the image of `size` (height, width).
    """
    if isinstance(segmentation, list):
        check_polygons(segmentation, size)
        merged = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
        return patch_from_runs(decode_counts(merged["counts"]), size)
    counts = segmentation["counts"]
    if not isinstance(counts, list):
        return patch_from_runs(decode_counts(counts), size)
    if not all(is_whole(count) and 0 <= count <= size[0] * size[1] for count in counts):
        raise ValueError(f"run lengths are whole numbers, from 0 to {size[0]} x {size[1]} pixels")
    return patch_from_runs(np.array(counts, dtype=np.int64), size)


def encode(patch: Patch, size: tuple[int, int]) -> dict[str, Any]:
    """A mask as compressed RLE that goes into JSON, in an image of `size` (height, width)."""
    height, width = size
    rows, cols = patch.bits.shape
    assert patch.y + rows <= height and patch.x + cols <= width, "the patch sticks out of the image"
    columns = np.zeros((cols, height), dtype=np.int8)
    columns[:, patch.y : patch.y + rows] = patch.bits.T
    changes = np.flatnonzero(np.diff(columns.ravel(), prepend=np.int8(0), append=np.int8(0))) + patch.x * height
    runs = np.diff(changes[changes < height * width], prepend=0, append=height * width)
    rle = coco_mask.frPyObjects({"counts": runs.tolist(), "size": [height, width]}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
