"""Writing files whole or not at all."""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` into the file `path`: whatever happens on the way, it holds all of the old or all of the new.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, and nothing was changed", str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def write_png(path: Path, picture: Any) -> None:
    """A PIL image as PNG, whole or not at all; its folder is made."""
    buffer = BytesIO()
    picture.save(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def png_names(names: Sequence[str]) -> dict[str, str]:
    """The file of each image's picture: its name as PNG, or with .png behind it where two would be called the same."""
    plain = [str(Path(name).with_suffix(".png")) for name in names]
    return {name: short if plain.count(short) == 1 else f"{name}.png" for name, short in zip(names, plain, strict=True)}
