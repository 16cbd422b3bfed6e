"""Writing files whole or not at all, and folders that one process writes at a time."""

import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from sievit.config import ConfigError

LOCK = ".lock"
"""The file in a folder that the process which writes there has locked. Killed, it leaves the file and no lock."""


PART = re.compile(r"\.[0-9a-f]{8}\.\d+\.part")
"""The name of a file that `writing` writes: of its path, and of the process."""


class HeldError(ConfigError):
    """Another process writes to a folder."""


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` into the file `path`: whatever happens on the way, it holds all of the old or all of the new.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    with writing(path) as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Generator[BinaryIO]:
    """A file that becomes `path` when it is whole, for what is too large to be held; raises as `write_atomically`."""
    part = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, and nothing was changed", str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left of files they were writing, in the folder and below it; none may write now."""
    for part in folder.rglob(".*.part"):
        if PART.fullmatch(part.name):
            part.unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """`content` as JSON, whole or not at all; raises as `write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=indent) + "\n").encode())


def write_png(path: Path, picture: Any) -> None:
    """A PIL image as PNG, whole or not at all; its folder is made."""
    buffer = BytesIO()
    picture.save(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def digest(path: Path) -> str:
    """Tells the content of a file from any other."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextmanager
def held(folder: Path, *, lock: str = LOCK) -> Generator[None]:
    """A folder, which is made if it is missing, for this process alone; removed again if nothing was put into it.

    Args:
        lock: the file that is locked; another one for each of several processes that share the folder.

    Raises:
        HeldError: another process writes there.
        ConfigError: something that is no folder has this name.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{folder}: cannot be a folder, since there is a file of this name; give another") from error
    with _locked(folder / lock):
        try:
            yield
        finally:
            (folder / lock).unlink(missing_ok=True)
            with suppress(OSError):  # it holds something
                for path in made:
                    path.rmdir()


def _locked(path: Path) -> BinaryIO:
    """The open file, with a lock that ends when it is closed, or the process does; not inherited by other processes."""
    import fcntl

    while True:
        file = path.open("ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                text = f"{path.parent}: another process writes there; wait for it, or give another folder"
                raise HeldError(text) from error
            raise
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # its last owner has removed it meanwhile
