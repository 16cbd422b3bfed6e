"""`sievit data ...`."""

from pathlib import Path

from sievit.config import Count, Seed
from sievit.data.scenes import Edge, generate


def scenes(*, out: Path, num_images: Count = 100, size: tuple[Edge, Edge] = (512, 512), seed: Seed = 0) -> None:
    """Generate scenes in COCO format: images/, annotations.json, labels/ (semantic).

    Args:
        out: folder to write; has to be new or empty.
        num_images: how many.
        size: height and width in pixels.
        seed: the same seed gives the same scenes.
    """
    generate(out, num_images=num_images, size=size, seed=seed)
    print(f"{out}: {num_images} scenes")
