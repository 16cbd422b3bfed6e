"""Writing files so that nobody ever reads half of one."""

import os
from pathlib import Path


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
