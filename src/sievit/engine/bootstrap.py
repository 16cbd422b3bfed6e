"""How much of a difference between two models is chance: the paired bootstrap over images.

Both models are judged on the same images. So many times as many images are drawn anew, with replacement, and both are
judged on what was drawn; the interval holds the middle 95 % of the differences (Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13).
"""

import numpy as np

from sievit.tasks.base import Metric

DRAWS = 1000
LEVEL = 0.95


def differences(
    first: Metric, second: Metric, images: int, *, draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> dict[str, list[float]]:
    """By figure `[difference, low, high]` of the second model minus the first one.

    Args:
        first: metric that was updated with `images`.
        second: metric that was updated with the same images, in the same order.
        draws: how often images are drawn.
        level: share of the differences that lie in the interval.
        seed: of the draws.
    """
    both = drawn(images, draws=draws, seed=seed)
    before, after = first.resampled(both), second.resampled(both)
    return {name: interval(after[name] - before[name], level=level) for name in before}


def interval(differences: np.ndarray, *, level: float = LEVEL) -> list[float]:
    """`[difference, low, high]` of one on all images and others, (1 + draws,), on images that were drawn."""
    whole, *spread = differences
    return [round(float(x), 5) for x in (whole, *np.quantile(spread, (0.5 - level / 2, 0.5 + level / 2)))]


def drawn(images: int, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(1 + draws, images): every image once, then as many images drawn with replacement, always the same."""
    found = np.random.default_rng(seed).integers(images, size=(draws, images))
    return np.concatenate([np.arange(images)[None], found])
