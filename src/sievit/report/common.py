"""What reports share: progress, and images of a folder."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sievit.data.images import list_images


def progress(console: Console) -> Progress:
    """The bar of every loop over images."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def images_below(images: Path, out: Path) -> tuple[list[Path], list[str]]:
    """The image, or those of a folder without what lies in `out`; and their names, relative to the folder."""
    root = images if images.is_dir() else images.parent
    paths = [images]
    if images.is_dir():
        paths = [p for p in list_images(images) if not p.resolve().is_relative_to(out.resolve())]
    return paths, [path.relative_to(root).as_posix() for path in paths]
