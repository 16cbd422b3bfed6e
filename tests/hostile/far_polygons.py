"""Polygons that would end a process in the rasteriser, or take all of its memory; so this is a process of its own."""

import math
import resource

import pytest

from hostile.small import SIZE, content
from sievit.config import ConfigError
from sievit.data.annotations import load_annotations
from sievit.data.masks import decode

FAR = (1e5, 1e7, 1e8, 1e9, -1e9, 1e18, 1e300, 2**70, 10**400, math.inf, math.nan)


def far_polygons() -> int:
    """The memory in MB that they took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in FAR:
        for place in range(4):
            document = content()
            polygon = document["annotations"][0]["segmentation"][0]
            polygon[place] = value
            with pytest.raises(ConfigError, match=r"annotation 1 has .*polygon"):
                load_annotations(document)
            with pytest.raises(ValueError, match="polygon"):
                decode([polygon], SIZE)
    zigzag = [float(v) for i in range(20_000) for v in (0 if i % 2 else 2000, i % 2000)]
    with pytest.raises(ValueError, match="outline"):
        decode([zigzag], (2000, 2000))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


if __name__ == "__main__":
    print(far_polygons())
