"""How far a file agrees with the model that it was made from."""

from typing import Any

from torch import Tensor

PIXELS, SCORE, OVERLAP = 0.5, 1e-3, 0.9
"""What two detections of one object may differ by: pixels of a box's edges, score, intersection over union of masks."""


def agreeing(own: Any, other: Any) -> tuple[int, int]:
    """Of the results of one image: how many pixels, or detections of both, agree, and how many there are."""
    if isinstance(own, Tensor):
        return int((own == other).sum()), own.numel()
    same = (own["boxes"][:, None] - other["boxes"]).abs().amax(2) <= PIXELS
    same &= (own["scores"][:, None] - other["scores"]).abs() <= SCORE
    same &= own["labels"][:, None] == other["labels"]
    for i, j in same.nonzero().tolist() if "masks" in own else ():
        mine, its = own["masks"][i], other["masks"][j]
        same[i, j] = int((mine & its).sum()) >= OVERLAP * int((mine | its).sum())
    return int(same.any(1).sum() + same.any(0).sum()), sum(same.shape)
