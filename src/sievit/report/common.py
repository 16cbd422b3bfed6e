"""What reports of all kinds of models share: progress, and pictures in files."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sievit.data.images import list_images
from sievit.files import write_atomically


def progress(console: Console) -> Progress:
    """The bar of every loop over images."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def save_picture(picture: Image.Image, path: Path) -> None:
    """As PNG, whole or not at all."""
    buffer = BytesIO()
    picture.save(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def images_below(images: Path, out: Path) -> tuple[list[Path], list[str]]:
    """The image, or those of a folder without what lies in `out`; and their names, relative to the folder."""
    root = images if images.is_dir() else images.parent
    paths = [images]
    if images.is_dir():
        paths = [p for p in list_images(images) if not p.resolve().is_relative_to(out.resolve())]
    return paths, [path.relative_to(root).as_posix() for path in paths]


def picture_names(names: Sequence[str]) -> dict[str, str]:
    """Where each image's picture goes: its name as PNG, or with .png behind it where two would be called the same."""
    plain = [str(Path(name).with_suffix(".png")) for name in names]
    return {name: short if plain.count(short) == 1 else f"{name}.png" for name, short in zip(names, plain, strict=True)}


def tell_failures(failures: Sequence[str], total: int, console: Console) -> int:
    """Print what could not be done; the exit status."""
    for failure in failures:
        console.print(f"error: {failure}", soft_wrap=True, markup=False, highlight=False)
    if failures:
        console.print(f"{len(failures)} of {total} images could not be used")
    return 1 if failures else 0
