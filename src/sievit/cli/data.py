"""`sievit data ...`."""

from pathlib import Path

from sievit.data.scenes import generate


def scenes(*, out: Path, num_images: int = 100, size: tuple[int, int] = (512, 512), seed: int = 0) -> None:
    """Generate scenes in COCO format: images/, annotations.json, labels/ (semantic).

    Args:
        out: folder to write; has to be new or empty.
        num_images: how many.
        size: height and width in pixels.
        seed: the same seed gives the same scenes.
    """
    generate(out, num_images=num_images, size=size, seed=seed)
    print(f"{out}: {num_images} scenes")
